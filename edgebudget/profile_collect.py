"""From the probe's lines to a profile; whatever came before the device was lost is kept."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from edgebudget import profile_notes
from edgebudget_runtime import codec
from edgebudget_runtime.cost import UNKNOWN, Figure
from edgebudget_runtime.device_id import Device
from edgebudget_runtime.errors import (
    ArtifactError,
    EdgeBudgetError,
    TargetError,
    UnsupportedError,
    UsageError,
)
from edgebudget_runtime.latency_bound import SIZE
from edgebudget_runtime.measure.layers import Kernel
from edgebudget_runtime.profile import Profile
from edgebudget_runtime.profile_detail import Detail, LayerTime, PathTimes

_ERRORS: Mapping[str, type[EdgeBudgetError]] = {
    "EB1": UsageError,
    "EB2": UnsupportedError,
    "EB5": ArtifactError,
    "EB6": TargetError,
}


@dataclass(slots=True)
class Collected:
    """What a device has told so far."""

    device: Device | None = None
    warm: dict[str, int] = field(default_factory=dict)
    paths: dict[str, list[float]] = field(default_factory=dict)
    segments: dict[str, list[float]] = field(default_factory=dict)
    memory: Figure = UNKNOWN
    conditions: dict[str, Figure] = field(default_factory=dict)
    kernels: dict[str, list[Kernel]] = field(default_factory=dict)
    idle_w: Figure = UNKNOWN
    net: dict[str, Figure] = field(default_factory=dict)
    gross: dict[str, Figure] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    ended: bool = False
    error: EdgeBudgetError | None = None  # why it did not come to its end

    def profile(
        self, artifact: str, where: str, target: str, layers: tuple[LayerTime, ...]
    ) -> Profile:
        """All of it as a profile of an artifact (its digest).

        Raises:
            EdgeBudgetError: nothing was timed; the reason why.
        """
        if self.device is None or not self.segments:
            raise self.error or TargetError(
                "EB644", f"{where} told no time", hint="try again; see --help for what it takes"
            )
        notes = [*self.notes, *profile_notes.notes(self.paths, self.conditions, self.device.cores)]
        if self.error is not None:
            notes.append(f"partial, {where} stopped early: {self.error.what}")
        return Profile(
            artifact=artifact,
            device=self.device,
            samples_ms={s: tuple(ms[-SIZE:]) for s, ms in self.segments.items()},
            energy={k: f for k, f in self.net.items() if f.value is not None},
            detail=Detail(
                where=where,
                target=target,
                runs_before=min(self.warm.values(), default=0),
                paths={id: PathTimes.of(ms) for id, ms in self.paths.items()},
                layers=layers,
                memory_bytes=self.memory,
                conditions=self.conditions,
                idle_w=self.idle_w,
                gross_energy=self.gross,
                notes=tuple(notes),
            ),
        )


def collect(lines: Iterable[str]) -> Collected:
    """Take in lines until they end, or the device is lost (`error`). Never raises for a device."""
    found = Collected()
    try:
        for line in lines:
            _take(found, line)
    except EdgeBudgetError as e:
        found.error = found.error or e
    if not found.ended and found.error is None:
        found.error = TargetError(
            "EB643", "the device was lost before it had told everything", hint="try again"
        )
    return found


def _take(found: Collected, line: str) -> None:
    try:
        said = json.loads(line)
    except (ValueError, RecursionError):
        return  # something else that the machine printed, such as a greeting
    if not isinstance(said, dict) or not isinstance(said.get("kind"), str):
        return
    try:
        _take_in(found, said["kind"], said)
    except (KeyError, TypeError, ValueError, AttributeError, EdgeBudgetError) as e:
        raise TargetError(
            "EB644",
            f"the device told something unreadable: {said['kind']!r}, {type(e).__name__} {e}",
            hint="use the same version of edgebudget on both sides",
        ) from e


def _take_in(found: Collected, kind: str, said: Mapping[str, Any]) -> None:
    if kind == "device":
        found.device = codec.decode(Device, said["device"])
    elif kind == "warm":
        found.warm[said["path"]] = int(said["runs"])
    elif kind == "times":
        for into, new in ((found.paths, said["paths"]), (found.segments, said["segments"])):
            for id, ms in new.items():
                into.setdefault(str(id), []).extend(float(x) for x in ms)
    elif kind == "state":
        found.conditions |= {k: _figure(f) for k, f in said["figures"].items()}
    elif kind == "memory":
        found.memory = _figure(said["figure"])
    elif kind == "layers":
        found.kernels[said["segment"]] = [codec.decode(Kernel, k) for k in said["kernels"]]
    elif kind == "idle":
        found.idle_w = _figure(said["figure"])
    elif kind == "energy":
        found.net[said["path"]] = _figure(said["net"])
        found.gross[said["path"]] = _figure(said["gross"])
    elif kind == "note":
        found.notes.append(str(said["text"]))
    elif kind == "error":
        code = str(said["code"])
        raise_as = _ERRORS.get(code[:3], TargetError)
        found.error = raise_as(code, str(said["what"]), hint=str(said["hint"]))
    elif kind == "end":
        found.ended = True


def _figure(plain: Any) -> Figure:
    figure: Figure = codec.decode(Figure, plain)
    return figure
