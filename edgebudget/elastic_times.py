"""Latency and energy of the sub-networks of a chain of segments, where limits ask for them.

A sub-network that breaks such a limit is left out, however good it is: the artifact holds what
keeps them. Where a target can run segments in turn, a sub-network's runs are the sums of its
segments' in each turn, so that any statistic can be told; elsewhere segments are asked one by one,
whose medians and means add up and whose percentiles do not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, get_args

import numpy as np

from edgebudget.energy_estimate import energy_of
from edgebudget.latency_statistic import enough_runs, value, wanted
from edgebudget.target import TimesChains
from edgebudget_runtime.cost import UNKNOWN, Evidence, Figure, Resource

if TYPE_CHECKING:
    from pathlib import Path

    from edgebudget.target import Target
    from edgebudget.workload import Array
    from edgebudget_runtime.budget import Budget, Statistic
    from edgebudget_runtime.cost import Cost

_RUNS = 200
_DEAR: tuple[Resource, ...] = ("latency_ms", "energy_mj")


def timed(
    costs: Sequence[Cost], files: Sequence[Path], target: Target, budget: Budget
) -> tuple[Cost, ...]:
    """`costs` of leaving at each exit, with the latency and energy that `budget` limits."""
    statistic, found = wanted(budget.limits), tuple(costs)
    if statistic is None and budget.limit("energy_mj") is None:
        return found
    noise = [_noise(f) for f in files]
    if statistic is not None:
        each = _latencies(files, noise, target, statistic)
        found = tuple(replace(c, latency_ms=f) for c, f in zip(found, each, strict=True))
    if budget.limit("energy_mj") is not None:
        parts = [energy_of(target, f, x) for f, x in zip(files, noise, strict=True)]
        sums = [_sum(parts[: k + 1]) for k in range(len(parts))]
        found = tuple(replace(c, energy_mj=f) for c, f in zip(found, sums, strict=True))
    return found


def keeping(costs: Sequence[Cost], budget: Budget) -> int:
    """How many exits, from the first on, keep the limits on latency and energy."""
    for count, cost in enumerate(costs):
        for resource in _DEAR:
            bound, figure = budget.limit(resource), cost.get(resource)
            if bound is not None and (figure.value is None or figure.value > bound):
                return count
    return len(costs)


def _noise(file: Path) -> Mapping[str, Array]:
    from edgebudget.graph import probe, specs
    from edgebudget.segment_graph import read_graph

    return probe(specs(read_graph(file)))


def _latencies(
    files: Sequence[Path],
    noise: Sequence[Mapping[str, Array]],
    target: Target,
    statistic: Statistic,
) -> list[Figure]:
    if not isinstance(target, TimesChains):
        each = [
            target.latency(f, x, _RUNS, statistic=statistic)
            for f, x in zip(files, noise, strict=True)
        ]
        whole = statistic in ("p50", "mean")
        return [each[0], *(_sum(each[: k + 1], whole=whole) for k in range(1, len(each)))]
    ms = np.cumsum(target.chain_times(files, noise, enough_runs(_RUNS, statistic)), axis=0)
    return [
        Figure(
            value=value(runs, statistic),
            evidence="measured",
            how=f"{statistic} of {len(runs)} warm runs of {k + 1} segments in turn, "
            f"{target.spec.engine}; percentiles are upper bounds",
            device=target.spec.device,
            count=len(runs),
            spread=float(np.subtract(*np.percentile(runs, [75, 25])) / 2),
        )
        for k, runs in enumerate(ms)
    ]


def _sum(parts: Sequence[Figure], *, whole: bool = True) -> Figure:
    if not whole:
        return replace(UNKNOWN, how="percentiles of segments do not add up to that of their chain")
    if any(p.value is None for p in parts):
        return next(p for p in parts if p.value is None)
    if not parts[1:]:
        return parts[0]
    order = get_args(Evidence)
    return Figure(
        value=sum(p.value or 0.0 for p in parts),
        evidence=max((p.evidence for p in parts), key=order.index),
        how=f"sum of {len(parts)} segments, the first of them: {parts[0].how}",
        device=parts[0].device,
        count=min(p.count for p in parts),
    )
