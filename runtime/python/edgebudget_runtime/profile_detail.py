"""What `edgebudget profile` found besides the latencies of segments: for people and reports.

Runners carry it along and need none of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from edgebudget_runtime.cost import UNKNOWN, Figure

PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True, slots=True, kw_only=True)
class PathTimes:
    """How long one sub-network takes as a whole, in ms. None: too few runs to tell."""

    runs: int
    p50_ms: float
    p90_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    spread_ms: float  # half of the interquartile range

    def __post_init__(self) -> None:
        given = (self.p50_ms, self.p90_ms, self.p95_ms, self.p99_ms)
        if self.runs < 1 or not all(0 < x < math.inf for x in given if x is not None):
            raise ValueError("positive percentiles of at least one run")
        if not 0 <= self.spread_ms < math.inf:
            raise ValueError("a spread of 0 or more")

    @staticmethod
    def of(ms: Sequence[float]) -> PathTimes:
        """Percentiles of measured latencies, those that so many runs can tell.

        The q-th is the ceil(n q / 100)-th smallest, a run that happened. It is told where
        at least one run is expected to be slower: p99 takes 100 runs.
        """
        found = {
            q: percentile(ms, q) if len(ms) * (100 - q) >= 100 or q == 50 else None
            for q in PERCENTILES
        }
        low, high = percentile(ms, 25), percentile(ms, 75)
        return PathTimes(
            runs=len(ms),
            p50_ms=percentile(ms, 50),
            p90_ms=found[90],
            p95_ms=found[95],
            p99_ms=found[99],
            spread_ms=(high - low) / 2,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTime:
    """One node's time, from runs of their own under the engine's profiler."""

    segment: str
    name: str  # of the node in the segment's file; of the engine's own node where it added one
    op: str  # what the engine ran: several nodes of the file may be one there
    ms: float  # median of a run
    share: float  # of the segment's kernels together
    added: bool = False  # by the engine: a change of layout or type that the file does not have

    def __post_init__(self) -> None:
        if not (0 <= self.ms < math.inf and 0 <= self.share <= 1):
            raise ValueError("a time of 0 or more, and a share between 0 and 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Detail:
    """How one profile was measured, and all that it found besides."""

    where: str  # "local", "ssh://host"
    target: str
    runs_before: int  # of each path, not counted
    paths: Mapping[str, PathTimes]  # sub-network -> latencies of all of its segments and between
    layers: tuple[LayerTime, ...] = ()
    memory_bytes: Figure = UNKNOWN  # high-water of the process above what it held before loading
    conditions: Mapping[str, Figure] = field(default_factory=dict)  # temperature_before_c, ...
    idle_w: Figure = UNKNOWN
    gross_energy: Mapping[str, Figure] = field(default_factory=dict)  # mJ, idle power included
    notes: tuple[str, ...] = ()


def percentile(values: Sequence[float], q: float) -> float:
    """The ceil(n q / 100)-th smallest of n values."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * q / 100 - 1e-9) - 1)]
