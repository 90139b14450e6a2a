"""Thresholds on the exits of one chain, solved for a mean cost.

The quantile rule and descent (see `threshold_search`) compete on samples that neither saw.
Descent does so twice: on right and wrong as they were seen, and on each exit's chance of being
right, fitted to all signals, which varies less on few samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edgebudget.metrics import ranks
from edgebudget.threshold_search import (
    PRICES,
    Ladder,
    descend,
    descent,
    grid,
    places,
    quantile_rule,
    thresholds_of,
)
from edgebudget.workload import Array
from edgebudget_runtime.errors import InfeasibleError

__all__ = [
    "GRID",
    "METHODS",
    "Ladder",
    "Solved",
    "budget_grid",
    "held_out",
    "solve",
    "useful_exits",
]
GRID = 10  # mean budgets of an artifact
_FOLDS = 5
_NEWTON = 15
_COARSE = 16  # quantiles of a signal where exits are compared
_COMPARED = 5  # mean budgets at which methods are compared


@dataclass(frozen=True, slots=True)
class Solved:
    """Thresholds [K - 1] for one mean budget, with cost and score on the samples solved on.

    A threshold of -inf lets every sample leave, one of inf none.
    """

    budget: float
    thresholds: Array
    cost: float
    score: float
    method: str


Solve = Callable[[Ladder, Sequence[float]], list[Array]]


def budget_grid(costs: Array, count: int = GRID) -> tuple[float, ...]:
    """Mean budgets evenly spread between the first exit and the whole, both left out."""
    return tuple(float(b) for b in np.linspace(costs[0], costs[-1], count + 2)[1:-1])


def solve(ladder: Ladder, budgets: Sequence[float]) -> tuple[Solved, ...]:
    """The best thresholds for each mean budget, by the method that does best on held-out folds.

    Raises:
        InfeasibleError: EB401, a budget is below what the first exit costs.
    """
    if min(budgets) < ladder.costs[0]:
        raise InfeasibleError(
            "EB401",
            f"a mean of {min(budgets):.6g} is below the first exit's {ladder.costs[0]:.6g}",
            hint="ask for more, or add an earlier exit",
        )
    method = _choose(ladder, budgets[:: max(1, len(budgets) // _COMPARED)])
    found = []
    for budget, thresholds in zip(budgets, METHODS[method](ladder, budgets), strict=True):
        cost, score = ladder.outcome(thresholds)
        found.append(Solved(budget, thresholds, cost, score, method))
    return tuple(found)


def held_out(ladder: Ladder, budgets: Sequence[float], method: str) -> tuple[Array, Array]:
    """Mean cost and score per budget [B], on folds that `method` did not solve on."""
    count = ladder.correct.shape[1]
    folds = min(_FOLDS, count)
    fold = np.arange(count) % folds
    total = np.zeros((2, len(budgets)))
    for k in range(folds):
        test = ladder.part(fold == k)
        solved = METHODS[method](ladder.part(fold != k), budgets)
        weight = test.correct.shape[1] / count
        total += weight * np.array([test.outcome(t) for t in solved]).T
    return total[0], total[1]


def _choose(ladder: Ladder, budgets: Sequence[float]) -> str:
    """The method of best held-out score, where cost beyond a budget is paid at the going price."""
    if ladder.correct.shape[1] < 2:
        return next(iter(METHODS))
    slopes = _slopes(ladder, budgets)

    def value(method: str) -> float:
        cost, score = held_out(ladder, budgets, method)
        return float((score - slopes * (cost - budgets)).mean())

    return max(METHODS, key=value)


def _slopes(ladder: Ladder, budgets: Sequence[float]) -> Array:
    """What one more unit of mean cost buys in score, around each budget."""
    points = np.array([ladder.outcome(t) for t in descent(ladder, budgets)])
    cost, score = points[:, 0], np.maximum.accumulate(points[:, 1])
    ends = [(float(c), float(s.mean())) for c, s in zip(ladder.costs, ladder.correct, strict=True)]
    cost = np.concatenate([[ends[0][0]], cost, [ends[-1][0]]])
    score = np.concatenate([[ends[0][1]], score, [max(ends[-1][1], score[-1])]])
    order = np.argsort(cost, kind="stable")
    near = 0.05 * (ends[-1][0] - ends[0][0])
    rise = [np.interp(np.asarray(budgets) + d, cost[order], score[order]) for d in (-near, near)]
    found: Array = (rise[1] - rise[0]) / (2 * near)
    return found


def fitted_descent(ladder: Ladder, budgets: Sequence[float]) -> list[Array]:
    """`descent` on chances of being right instead of right and wrong."""
    return descent(Ladder(_chances(ladder), ladder.sure, ladder.costs), budgets)


METHODS: Mapping[str, Solve] = {
    "quantile rule": quantile_rule,
    "descent": descent,
    "descent on fitted chances": fitted_descent,
}


def _chances(ladder: Ladder) -> Array:
    """Each exit's chance of being right [K, N]: logistic in the ranks of all signals."""
    share = (ranks(ladder.sure) - 0.5) / ladder.sure.shape[1]
    spread = np.log(share / (1.0 - share))
    features = np.vstack([np.ones((1, share.shape[1])), spread, spread**2])
    return np.stack([_logistic(features, c) for c in ladder.correct])


def _logistic(features: Array, wanted: Array) -> Array:
    """Fitted chances [N] by Newton's method; features [F, N], the first one constant."""
    penalty = np.concatenate([[1e-6], np.full(len(features) - 1, 1.0)])
    weights = np.zeros(len(features))
    for _ in range(_NEWTON):
        chance = _sigmoid(weights @ features)
        slope = features @ (chance - wanted) + penalty * weights
        bend = (features * (chance * (1.0 - chance))) @ features.T + np.diag(penalty)
        weights = weights - np.linalg.solve(bend, slope)
    return _sigmoid(weights @ features)


def _sigmoid(x: Array) -> Array:
    found: Array = 1.0 / (1.0 + np.exp(-np.clip(x, -30.0, 30.0)))
    return found


def useful_exits(
    ladder: Ladder, heads: Array | None = None
) -> tuple[tuple[int, ...], tuple[tuple[int, str], ...]]:
    """Which exits to keep, and why each other one goes. The whole is always kept.

    An exit goes when an earlier one is as good, or when the chain without it (and without
    `heads[k]`, what its head costs the samples that pass it) does better on held-out folds.
    """
    heads = np.zeros(len(ladder.costs)) if heads is None else heads
    quality = ladder.correct.mean(axis=1)
    last = len(quality) - 1
    kept, dropped = list(range(last + 1)), []
    for k in range(1, last):
        better = max((j for j in kept if j < k), key=lambda j: quality[j])
        if quality[k] <= quality[better]:
            kept.remove(k)
            dropped.append((k, f"exit {better + 1} costs less and is as good on held-back data"))
    have = _held_out_loss(ladder, kept, heads)
    while len(kept) > 2:
        without = {k: _held_out_loss(ladder, [j for j in kept if j != k], heads) for k in kept[:-1]}
        least = min(without, key=lambda k: without[k])
        if without[least] >= have:
            break
        kept.remove(least)
        have = without[least]
        dropped.append((least, "the chain is better without it on held-out folds"))
    return tuple(kept), tuple(dropped)


def _held_out_loss(ladder: Ladder, kept: Sequence[int], heads: Array) -> float:
    """Mean of error + price * cost over prices, on folds the thresholds were not solved on."""
    gone = np.array([0.0 if k in kept else h for k, h in enumerate(heads)])
    costs = ladder.costs - np.concatenate([[0.0], np.cumsum(gone)[:-1]])
    span = float(ladder.costs[-1] - ladder.costs[0]) or 1.0
    rows = list(kept)
    part = Ladder(ladder.correct[rows], ladder.sure[rows[:-1]], costs[rows])
    count = part.correct.shape[1]
    fold, total = np.arange(count) % min(_FOLDS, count), 0.0
    for k in range(min(_FOLDS, count)):
        fit, test = part.part(fold != k), part.part(fold == k)
        grids = tuple(grid(s, _COARSE) for s in fit.sure)
        reached = places(fit, grids)
        never = np.array([len(g) - 1 for g in grids], np.int64)
        for price in PRICES[8::6]:
            loss = 1.0 - fit.correct + price / span * fit.costs[:, None]
            cuts = descend(loss, reached, never)[1]
            cost, score = test.outcome(thresholds_of(grids, cuts))
            total += (1.0 - score + price / span * cost) * len(test.correct[0])
    return total
