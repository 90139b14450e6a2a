"""Which sub-networks are worth shipping: better than all cheaper ones, and few.

Qualities of sub-networks are noisy, and of many that are equally good one always looks best.
A point therefore stays only if it is better than what costs less by more than the noise of their
difference, which is measured on the same samples where per-sample scores are there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edgebudget.workload import Array

SUBNETWORKS = 6
_Z = 1.0  # standard errors of a difference that count as noise
_DRAWS = 1 << 13  # points that stand for a volume


@dataclass(frozen=True, slots=True)
class Point:
    """A sub-network with its costs (each known, the same names for all) and its quality.

    `scores` [N] are its per-sample scores, whose mean is the quality, on samples that are the
    same for all points; None where a task has none. Then `error`, the quality's standard error,
    counts for both sides as if they were independent.
    """

    id: str
    costs: Mapping[str, float]
    quality: float
    scores: Array | None = None
    error: float = 0.0


@dataclass(frozen=True, slots=True)
class Front:
    """The points to keep by rising cost, and why each other one was left out."""

    kept: tuple[str, ...]
    dropped: Mapping[str, str]


def pareto(points: Sequence[Point], limit: int = SUBNETWORKS) -> Front:
    """The Pareto set of `points`, thinned to `limit`.

    Points beyond the limit go one by one, always the one that takes the least hypervolume with
    it. The cheapest (by the first cost) and the best of the Pareto set stay: with a limit of 1
    only the best.
    """
    first = next(iter(points[0].costs))
    order = sorted(points, key=lambda p: (p.costs[first], -p.quality, p.id))
    dropped: dict[str, str] = {}
    best = max(order, key=lambda p: (p.quality, -p.costs[first]))
    kept: list[Point] = []
    for point in order:
        beaten = next(
            (q for q in order if q is not point and _beats(q, point, point is best)), None
        )
        if beaten is None:
            kept.append(point)
        else:
            dropped[point.id] = f"{beaten.id} costs no more and is as good"
    while len(kept) > max(limit, 1):
        ends = {best.id} if limit == 1 else {best.id, kept[0].id}
        losses = _losses(kept)
        inner = [i for i, p in enumerate(kept) if p.id not in ends]
        least = min(inner, key=lambda i: (losses[i], -i))
        gone = kept.pop(least)
        dropped[gone.id] = f"beyond {limit} sub-networks, and nearest to its neighbours"
    return Front(tuple(p.id for p in kept), dropped)


def _beats(a: Point, b: Point, exactly: bool) -> bool:
    """Whether `a` costs no more than `b`, and `b` is not better by more than the noise."""
    if any(a.costs[k] > b.costs[k] for k in b.costs):
        return False
    cheaper = any(a.costs[k] < b.costs[k] for k in b.costs)
    noise = 0.0 if exactly or not cheaper else _Z * _error(a, b)
    gain = b.quality - a.quality
    if gain < 0 or (gain <= noise and cheaper):
        return True
    return gain == 0 and not cheaper and a.id < b.id


def _error(a: Point, b: Point) -> float:
    """Standard error of the difference of two qualities."""
    if a.scores is None or b.scores is None:
        return math.hypot(a.error, b.error)
    gap = np.asarray(a.scores, np.float64) - np.asarray(b.scores, np.float64)
    return float(gap.std(ddof=1) / math.sqrt(len(gap))) if len(gap) > 1 else 0.0


def _losses(points: Sequence[Point]) -> Array:
    """How much volume only each point dominates, in parts of the box they span.

    Costs are compared as ratios. The volume is that of low-discrepancy draws ("The Unreasonable
    Effectiveness of Quasirandom Sequences", 2018), the same at every call.
    """
    names = list(points[0].costs)
    costs = np.log([[max(p.costs[n], 1e-30) for n in names] for p in points])
    table = np.column_stack([costs, [-p.quality for p in points]])
    low, span = table.min(axis=0), np.ptp(table, axis=0)
    table = (table - low) / np.where(span > 0, span, 1.0)
    draws = 1.1 * _quasirandom(table.shape[1])  # beyond the worst corner: ends count as well
    covers = (table[:, None, :] <= draws[None, :, :]).all(axis=2)
    alone = covers & (covers.sum(axis=0) == 1)
    found: Array = alone.mean(axis=1)
    return found


def _quasirandom(dimensions: int) -> Array:
    root = 2.0
    for _ in range(40):  # the positive root of x^(d+1) = x + 1
        root = (1 + root) ** (1 / (dimensions + 1))
    steps = root ** -np.arange(1.0, dimensions + 1)
    found: Array = (0.5 + np.arange(1, _DRAWS + 1)[:, None] * steps) % 1.0
    return found
