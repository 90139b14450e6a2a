"""Times every path of an artifact, the paths taking turns, by nothing but the clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from edgebudget_runtime.inputs import Array
from edgebudget_runtime.walk import Segments

_WARM_RUNS, _WARM_S = 5, 0.5  # of each path: as many runs, or as long, whichever ends first
_REPORT_S = 1.0


@dataclass(slots=True)
class Times:
    """Milliseconds, oldest first: of whole paths, and of their segments."""

    paths: dict[str, list[float]] = field(default_factory=dict)
    segments: dict[str, list[float]] = field(default_factory=dict)

    def add(self, id: str, path: Sequence[str], seconds: float, parts: Sequence[float]) -> None:
        """Take in one run."""
        self.paths.setdefault(id, []).append(seconds * 1e3)
        for segment, s in zip(path, parts, strict=True):
            self.segments.setdefault(segment, []).append(s * 1e3)


class Paths:
    """Runs paths, each on an input of its own."""

    def __init__(
        self,
        segments: Segments,
        paths: Mapping[str, tuple[str, ...]],
        inputs: Mapping[str, Mapping[str, Array]],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.segments, self.paths, self.inputs, self.clock = segments, paths, inputs, clock

    def run(self, id: str) -> tuple[float, list[float]]:
        """Run one path once: the seconds of the whole, and of each segment.

        Raises:
            ArtifactError: EB502 to EB504, EB509 a segment cannot be run.
        """
        state = dict(self.inputs[id])
        parts = []
        run = self.segments.run
        began = self.clock()
        for segment in self.paths[id]:
            seconds, _ = run(segment, state)
            parts.append(seconds)
        return self.clock() - began, parts

    def once(self, id: str) -> int:
        """Run one path once; that was 1 inference.

        Raises:
            ArtifactError: as `run`.
        """
        self.run(id)
        return 1

    def warm(self, id: str) -> int:
        """Load a path and let caches and clocks settle; how many runs that took."""
        for segment in self.paths[id]:
            self.segments.sessions.get(segment)
        ended = self.clock() + _WARM_S
        count = 0
        while count < 1 or (count < _WARM_RUNS and self.clock() < ended):
            self.run(id)
            count += 1
        return count

    def times(self, seconds: float, runs: int) -> Iterator[Times]:
        """Time paths in turn, A B C A B C ...; what is new comes about every second.

        Each path runs at least once, at most `runs` times, and no turn begins after `seconds`.
        """
        ended = self.clock() + seconds
        found, told = Times(), self.clock()
        for turn in range(runs):
            if turn and self.clock() >= ended:
                break
            for id, path in self.paths.items():
                whole, parts = self.run(id)
                if whole > 0 and all(p > 0 for p in parts):  # else the clock was set back
                    found.add(id, path, whole, parts)
            if self.clock() - told >= _REPORT_S:
                yield found
                found, told = Times(), self.clock()
        if found.paths:
            yield found
