"""Keeps a runner's profile: read at load, measured at first use, written back when it ends."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Literal

from edgebudget_runtime import engine, profile
from edgebudget_runtime.cost import Figure
from edgebudget_runtime.device_id import Device
from edgebudget_runtime.errors import EdgeBudgetError, UsageError
from edgebudget_runtime.inputs import Array
from edgebudget_runtime.manifest import Manifest
from edgebudget_runtime.planner import Planner
from edgebudget_runtime.profile import Profile
from edgebudget_runtime.walk import Segments

Given = Profile | Path | str | Literal[False] | None
_BUDGET_S = 1.8  # of calibration, opening the segments included


class Profiling:
    """The profile of one artifact on this device. `planner` is the newest one.

    `given`: None is the file of this device in the user's cache folder, a path another file, a
    `Profile` one that is neither measured nor kept, False none. `note` says why a profile was
    left aside. `power_w` is the mean power that the user states, in watts.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        device: Device,
        given: Given,
        on_drift: Callable[[float], None],
        power_w: float | None = None,
    ) -> None:
        if power_w is not None and not 0 < power_w < math.inf:
            raise UsageError("EB174", f"power_w={power_w} is not positive", hint="state its watts")
        self._power_w = power_w
        self._manifest, self._device, self._on_drift = manifest, device, on_drift
        self._ids = tuple(s.id for s in manifest.segments)
        self.note = ""
        self._artifact = profile.digest(folder)
        self._file: Path | None = None
        found: Profile | None = None
        if isinstance(given, Profile):
            found, self.note = self._own(given)
        elif given is not False:
            default = profile.default_file(self._artifact, device)
            self._file = default if given is None else Path(given)
            found, self.note = profile.load(self._file, self._artifact, device, self._ids)
        self._found = found
        self.planner = self._planner(found)
        self._thread: Thread | None = None
        self._stop, self._starting = Event(), Lock()

    @property
    def wanted(self) -> bool:
        """Whether the device has to be measured."""
        return not self.planner.learnt and self._file is not None and self._thread is None

    def start(self, segments: Segments, given: Mapping[str, Array]) -> None:
        """Measure in the background, on one input."""
        with self._starting:
            if not self.wanted:  # another caller was first
                return
            copies = {k: a.copy() for k, a in given.items()}
            self._thread = Thread(
                target=self._measure,
                args=(segments, copies),
                name="edgebudget-profile",
                daemon=True,
            )
            self._thread.start()

    def measure(self, segments: Segments, given: Mapping[str, Array]) -> None:
        """Measure now, on one input.

        Raises:
            UsageError: EB187 no segment could be run.
        """
        self.wait()
        if not self._measure(segments, dict(given)):
            raise UsageError(
                "EB187",
                f"nothing could be measured: {self.note}",
                hint="check that the artifact answers this input",
            )

    def wait(self) -> None:
        """Until a measurement in the background has ended."""
        if self._thread is not None:
            self._thread.join()

    def close(self) -> None:
        """End a measurement, and keep what was learnt since the profile was read."""
        self._stop.set()
        self.wait()
        if self.planner.learnt and self._file is not None:
            history = self.planner.latencies.history()
            self._save({s: v for s, v in history.items() if v})

    def _measure(self, segments: Segments, given: dict[str, Array]) -> bool:
        began = time.perf_counter()
        try:
            feeds = self._feeds(segments, given)
        except EdgeBudgetError as e:
            self.note = e.what
            return False
        left = max(_BUDGET_S - (time.perf_counter() - began), 0.2)
        samples: dict[str, tuple[float, ...]] = {}
        # Where not all fit in memory at once, turns would time their opening.
        turns = [list(feeds)] if segments.sessions.all_fit else [[s] for s in feeds]
        for turn in turns:
            try:
                for id in turn:
                    segments.sessions.get(id)
                run = _Runs(segments, feeds, self._stop)
                samples |= profile.calibrate(run, turn, left / len(turns))
            except EdgeBudgetError as e:
                self.note = e.what
        if self._stop.is_set() or not samples:
            return False
        self.note = self._save(samples)
        self.planner = self._planner(self._profile(samples))
        return True

    def _feeds(self, segments: Segments, given: dict[str, Array]) -> dict[str, dict[str, Array]]:
        """What each segment takes for this input, by running every path that works."""
        feeds: dict[str, dict[str, Array]] = {}
        _, places = self.planner.accepting(given)
        failed: EdgeBudgetError | None = None
        for place in places:
            state = dict(given)
            for id in self.planner.front.options[place].path:
                if self._stop.is_set():
                    return {}
                feed = {t.name: state[t.name] for t in segments.by_id[id].inputs}
                try:
                    segments.run(id, state)
                except EdgeBudgetError as e:
                    failed = e
                    break
                feeds[id] = feed
        if not feeds and failed is not None:
            raise failed
        return feeds

    def _planner(self, found: Profile | None) -> Planner:
        return Planner(
            self._manifest,
            usual=None if found is None else found.samples_ms,
            energy=None if found is None else self._energy(found),
            on_drift=self._on_drift,
        )

    def _energy(self, found: Profile) -> Mapping[str, Figure]:
        """By the stated power where every segment of a path was timed, else as the profile says."""
        if self._power_w is None:
            return found.energy
        usual = {s: statistics.median(v) for s, v in found.samples_ms.items()}
        modelled = {
            sub.id: profile.path_energy(sub, sum(usual[s] for s in sub.path), self._power_w)
            for sub in self._manifest.subnetworks
            if usual.keys() >= set(sub.path)
        }
        return {**found.energy, **modelled}

    def _own(self, given: Profile) -> tuple[Profile | None, str]:
        if given.artifact != self._artifact or not set(given.samples_ms) <= set(self._ids):
            return None, "the profile is of another artifact"
        if given.device != self._device:
            return None, "the profile is of another device or engine"
        return given, ""

    def _profile(self, samples: Mapping[str, tuple[float, ...]]) -> Profile:
        if self._found is not None:  # its energy and detail are dearer than a new latency
            return replace(self._found, samples_ms={**self._found.samples_ms, **samples})
        return Profile(artifact=self._artifact, device=self._device, samples_ms=samples)

    def _save(self, samples: Mapping[str, tuple[float, ...]]) -> str:
        if self._file is None or not samples:
            return ""
        return profile.save(self._profile(samples), self._file)


class _Runs:
    """Runs one segment once, for calibration."""

    def __init__(
        self, segments: Segments, feeds: Mapping[str, Mapping[str, Array]], stop: Event
    ) -> None:
        self._segments, self._feeds, self._stop = segments, feeds, stop

    def __call__(self, id: str) -> None:
        if self._stop.is_set():
            return
        session, _ = self._segments.sessions.get(id)
        engine.run_session(session, self._feeds[id])
