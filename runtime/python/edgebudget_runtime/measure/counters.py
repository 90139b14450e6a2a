"""Energy counters of a device, as differences that can be trusted or are thrown away."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

MOST_W = 2000.0  # more than one machine's processors or one card draw: a counter that jumped


@dataclass(frozen=True, slots=True)
class Reading:
    """What a counter's parts showed at one time in seconds, each in the counter's own unit."""

    at_s: float
    values: tuple[float, ...]


class Counter(Protocol):
    """Counts the joules of a part of the device; other work there is counted as well."""

    name: str  # for people: "RAPL package-0"

    def start(self) -> None:
        """Begin to count, where that takes anything."""
        ...

    def read(self) -> Reading | None:
        """What it shows now; None where it cannot be read just now."""
        ...

    def joules(self, before: Reading, after: Reading) -> float | None:
        """Energy between two readings, or None where that interval is to be discarded."""
        ...

    def stop(self) -> None:
        """End what `start` began."""
        ...


def difference(
    before: Reading, after: Reading, joules_per_unit: float, ranges: Sequence[float | None]
) -> float | None:
    """Joules between two readings of counters that only rise, and start anew at their range.

    None where no time went by, a counter without a known range went back, or the power would be
    beyond `MOST_W`: it was reset, or jumped. A wrap is told from a step back by the power that
    it would mean; an interval must be short enough for one wrap at most.
    """
    seconds = after.at_s - before.at_s
    if seconds <= 0 or len(before.values) != len(after.values):
        return None
    total = 0.0
    for old, new, span in zip(before.values, after.values, ranges, strict=True):
        moved = new - old
        if moved < 0:
            if span is None or old > span:
                return None
            moved += span + 1  # the range is the largest value shown
        if moved < 0 or moved * joules_per_unit > MOST_W * seconds:
            return None
        total += moved * joules_per_unit
    return total
