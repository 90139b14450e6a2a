"""What a reader of a profile must know before believing its times."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence

from edgebudget_runtime.cost import Figure

_ENOUGH = 30  # runs, to tell a trend from noise
_ROSE = 1.15  # times, from the first third to the last


def notes(
    paths: Mapping[str, Sequence[float]], conditions: Mapping[str, Figure], cores: int
) -> Iterator[str]:
    """Throttling, other work on the machine, and times that rose while they were measured.

    Args:
        paths: Milliseconds of every run, oldest first, by path.
        conditions: The device's state before and after.
        cores: Processors that the measurement could use.
    """
    before = _value(conditions, "throttle_events_before")
    after = _value(conditions, "throttle_events_after")
    if before is not None and after is not None and after > before:
        yield f"the processor throttled {after - before:.0f} times meanwhile: times are too long"
    busy = _value(conditions, "load_before")
    if busy is not None and busy > cores:
        yield f"other work was running (load {busy:.1f} on {cores} cores): times may be too long"
    for id, ms in paths.items():
        third = len(ms) // 3
        if len(ms) >= _ENOUGH:
            rose = statistics.median(ms[-third:]) / statistics.median(ms[:third])
            if rose > _ROSE:
                yield f"{id} became {rose - 1:.0%} slower meanwhile: heat, or other work"


def _value(conditions: Mapping[str, Figure], name: str) -> float | None:
    found = conditions.get(name)
    return None if found is None else found.value
