"""Which sub-networks of those that were built an artifact keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from edgebudget.elastic_times import keeping
from edgebudget.pareto import Front, Point, pareto

if TYPE_CHECKING:
    from edgebudget.elastic_compile import Branch
    from edgebudget.workload import Quality
    from edgebudget_runtime.budget import Budget


def chosen(
    branches: Sequence[Branch],
    qualities: Mapping[tuple[int, int], Quality],
    limit: int,
    budget: Budget,
) -> tuple[tuple[tuple[int, int], ...], list[str]]:
    """The Pareto set by MACs and quality, the best first; all, where quality is unknown.

    Of those that keep limits on latency and energy; where none does, the first exits stay, for the
    miss to be told.
    """
    keep = [keeping(b.costs, budget) for b in branches]
    if not any(keep):
        keep = [1] * len(branches)
    every = [(b, k) for b, count in enumerate(keep) for k in range(count)]
    late = [
        f"{branch.name(k)} left out: it breaks a limit on time or energy"
        for branch, count in zip(branches, keep, strict=True)
        for k in range(count, len(branch.ids))
    ]
    macs = {(b, k): branches[b].costs[k].macs.value or 0.0 for b, k in every}
    if not qualities:
        return tuple(sorted(every, key=lambda e: -macs[e])[:limit]), late
    points = []
    for b, k in every:
        quality = qualities[b, k]
        points.append(
            Point(
                branches[b].name(k),
                {"macs": macs[b, k]},
                quality.value,
                scores=_hits(branches[b], k, quality),
                error=(quality.high - quality.low) / 3.92,
            )
        )
    front: Front = pareto(points, limit)
    kept = [e for e, p in zip(every, points, strict=True) if p.id in front.kept]
    kept.sort(key=lambda e: (-qualities[e].value, macs[e]))
    dropped = [f"{name} left out: {why}" for name, why in front.dropped.items()]
    return tuple(kept), [*dropped, *late]


def _hits(branch: Branch, exit: int, quality: Quality) -> Any:
    """Per-sample scores where the metric is their mean; None elsewhere."""
    assert branch.evaluation is not None
    answers = branch.evaluation[exit]
    if quality.metric != "top1" or answers.labels is None:
        return None
    (scores,) = answers.outputs.values()
    labels = answers.labels.reshape(-1)
    return (scores.reshape(len(labels), -1).argmax(1) == labels).astype(np.float64)
