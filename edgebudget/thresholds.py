"""Thresholds on the exits of one chain, solved for a mean cost.

Two solvers, and the data decides between them on samples that neither saw. The quantile rule
lets shares p^k leave at exit k and looks for p ("Multi-Scale Dense Networks for Resource
Efficient Image Classification", 2018). Descent minimises error + price * cost over quantile
grids, one exit at a time given the others, for a path of prices, and goes between neighbours of
that path to where the mean cost is the wanted one. A coarse grid is what keeps it from fitting
noise; how coarse is part of the choice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from edgebudget.workload import Array
from edgebudget_runtime.errors import InfeasibleError

GRID = 10  # mean budgets of an artifact
_FOLDS = 5
_PRICES = np.geomspace(1e-4, 10.0, 40)  # of score for the span from the first exit to the whole
_STEPS = 32  # between two neighbours of the path of prices
_SWEEPS = 20


@dataclass(frozen=True, slots=True)
class Ladder:
    """K exits of one chain on N samples, the whole last.

    `correct` [K, N] is each exit's score of each sample in [0, 1], `sure` [K - 1, N] what the
    exits before the last compare with their thresholds, `costs` [K] what ending there costs.
    """

    correct: Array
    sure: Array
    costs: Array

    def part(self, samples: Array) -> Ladder:
        """Some of the samples, by index or mask."""
        return Ladder(self.correct[:, samples], self.sure[:, samples], self.costs)

    def leaves(self, thresholds: Array) -> Array:
        """Where each sample ends, int64 [N]: the first exit whose threshold is reached."""
        reached = self.sure >= thresholds[:, None]
        last = np.ones((1, self.correct.shape[1]), bool)
        found: Array = np.concatenate([reached, last]).argmax(axis=0)
        return found

    def outcome(self, thresholds: Array) -> tuple[float, float]:
        """Mean cost and mean score with these thresholds [K - 1]."""
        ends = self.leaves(thresholds)
        score = np.take_along_axis(self.correct, ends[None], axis=0).mean()
        return float(self.costs[ends].mean()), float(score)


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
    method = _choose(ladder, budgets)
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
    points = np.array([ladder.outcome(t) for t in _descent(64)(ladder, budgets)])
    cost, score = points[:, 0], np.maximum.accumulate(points[:, 1])
    ends = [(float(c), float(s.mean())) for c, s in zip(ladder.costs, ladder.correct, strict=True)]
    cost = np.concatenate([[ends[0][0]], cost, [ends[-1][0]]])
    score = np.concatenate([[ends[0][1]], score, [max(ends[-1][1], score[-1])]])
    order = np.argsort(cost, kind="stable")
    near = 0.05 * (ends[-1][0] - ends[0][0])
    rise = [np.interp(np.asarray(budgets) + d, cost[order], score[order]) for d in (-near, near)]
    found: Array = (rise[1] - rise[0]) / (2 * near)
    return found


def quantile_rule(ladder: Ladder, budgets: Sequence[float]) -> list[Array]:
    """Shares p^k leave at exit k; p is bisected so that the mean cost meets each budget."""
    orders = np.argsort(-ladder.sure, axis=1, kind="stable")
    found = []
    for budget in budgets:
        low, high = -12.0, 12.0  # logarithm of p: all leave at the first exit, none before the end
        best = np.full(len(ladder.sure), -np.inf)
        best[1:] = np.inf
        for _ in range(40):
            middle = (low + high) / 2
            thresholds = _by_shares(ladder, orders, _shares(middle, len(ladder.costs)))
            if ladder.outcome(thresholds)[0] <= budget:
                low, best = middle, thresholds
            else:
                high = middle
        found.append(best)
    return found


def _shares(log_p: float, exits: int) -> Array:
    powers = log_p * np.arange(exits)
    weights = np.exp(powers - powers.max())
    found: Array = weights / weights.sum()
    return found


def _by_shares(ladder: Ladder, orders: Array, shares: Array) -> Array:
    """Thresholds under which about these shares [K] leave, the surest first."""
    staying = np.ones(ladder.correct.shape[1], bool)
    thresholds = np.full(len(ladder.sure), np.inf)
    for k, order in enumerate(orders):
        here = order[staying[order]]
        wanted = round(float(shares[k]) * len(staying))
        if wanted >= len(here):
            thresholds[k] = -np.inf
        elif wanted > 0:
            thresholds[k] = _below(ladder.sure[k], ladder.sure[k, here[wanted - 1]])
        staying &= ladder.sure[k] < thresholds[k]
    return thresholds


def _below(sure: Array, value: float) -> float:
    """Midway from `value` to the next lower one: rounding elsewhere moves nobody across."""
    lower = sure[sure < value]
    return float((value + lower.max()) / 2) if len(lower) else -np.inf


def _descent(levels: int) -> Solve:
    def solve(ladder: Ladder, budgets: Sequence[float]) -> list[Array]:
        path = _Path.of(ladder, levels)
        return [path.at(ladder, budget) for budget in budgets]

    return solve


METHODS: Mapping[str, Solve] = {
    "quantile rule": quantile_rule,
    "descent, 16 levels": _descent(16),
    "descent, 64 levels": _descent(64),
}


@dataclass(frozen=True, slots=True)
class _Path:
    """Solutions for falling prices: cuts [K - 1] as places in each exit's grid, by mean cost."""

    grids: tuple[Array, ...]
    cuts: tuple[Array, ...]
    outcomes: tuple[tuple[float, float], ...] = ()

    @staticmethod
    def of(ladder: Ladder, levels: int) -> _Path:
        grids = tuple(_grid(sure, levels) for sure in ladder.sure)
        places = _places(ladder, grids)
        ends = np.array([len(g) - 1 for g in grids], np.int64)
        first = np.concatenate([[0], ends[1:]]).astype(np.int64)
        span = float(ladder.costs[-1] - ladder.costs[0]) or 1.0
        cuts, last = [first], first
        for price in _PRICES[::-1]:
            loss = 1.0 - ladder.correct + price / span * ladder.costs[:, None]
            tried = [_descend(loss, places, start) for start in (last, ends, first)]
            last = min(tried, key=lambda t: t[0])[1]
            cuts.append(last)
        cuts.append(ends)
        path = _Path(grids, ())
        unique = {tuple(c): c for c in cuts}.values()
        kept = sorted(((ladder.outcome(path.thresholds(c)), c) for c in unique), key=_by_outcome)
        return _Path(grids, tuple(c for _, c in kept), tuple(o for o, _ in kept))

    def thresholds(self, cuts: Array) -> Array:
        return np.array([g[c] for g, c in zip(self.grids, cuts, strict=True)])

    def at(self, ladder: Ladder, budget: float) -> Array:
        """The best found on the path, or between two neighbours of it, within the budget."""
        tried = [
            (score, self.thresholds(cuts))
            for cuts, (cost, score) in zip(self.cuts, self.outcomes, strict=True)
            if cost <= budget
        ]
        for (left, right), ((low, _), (high, _)) in zip(
            pairwise(self.cuts), pairwise(self.outcomes), strict=True
        ):
            if not low <= budget < high:
                continue
            for t in np.linspace(0, 1, _STEPS + 1)[1:-1]:
                between = self.thresholds(np.round(left + t * (right - left)).astype(np.int64))
                cost, score = ladder.outcome(between)
                if cost <= budget:
                    tried.append((score, between))
        return max(tried, key=lambda t: t[0])[1]


def _by_outcome(item: tuple[tuple[float, float], Array]) -> tuple[float, float]:
    return item[0]


def _grid(sure: Array, levels: int) -> Array:
    """Thresholds worth trying: -inf, between quantiles of the signal, inf."""
    values = np.unique(sure)
    at = np.unique(np.quantile(sure, np.arange(1, levels) / levels, method="lower"))
    place = np.searchsorted(values, at)
    place = place[place > 0]
    between = (values[place] + values[place - 1]) / 2
    return np.concatenate([[-np.inf], between, [np.inf]])


def _places(ladder: Ladder, grids: Sequence[Array]) -> Array:
    """How many thresholds of its grid each signal reaches, [K - 1, N]."""
    each = [np.searchsorted(g, s, side="right") for g, s in zip(grids, ladder.sure, strict=True)]
    return np.stack(each) if each else np.zeros((0, ladder.correct.shape[1]), np.int64)


def _descend(loss: Array, places: Array, start: Array) -> tuple[float, Array]:
    """Coordinate descent from `start`: each exit's best cut given the others, until none moves.

    A cut's effect is the sum over who reaches the exit of what leaving saves against staying,
    so one cumulative sum tries the whole grid.
    """
    cuts = start.copy()
    for _ in range(_SWEEPS):
        before = cuts.copy()
        later = loss[-1]
        for k in reversed(range(len(places))):
            here = (places[:k] <= cuts[:k, None]).all(axis=0)
            change = np.bincount(places[k][here], weights=(loss[k] - later)[here])
            leaving = np.concatenate([np.cumsum(change[::-1])[::-1], [0.0]])[1:]
            cuts[k] = int(np.argmin(leaving)) if len(leaving) else cuts[k]
            later = np.where(places[k] > cuts[k], loss[k], later)
        if (cuts == before).all():
            break
    return float(later.mean()), cuts


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
        grids = tuple(_grid(s, 16) for s in fit.sure)
        places, path = _places(fit, grids), _Path(grids, ())
        never = np.array([len(g) - 1 for g in grids], np.int64)
        for price in _PRICES[8::6]:
            loss = 1.0 - fit.correct + price / span * fit.costs[:, None]
            cost, score = test.outcome(path.thresholds(_descend(loss, places, never)[1]))
            total += (1.0 - score + price / span * cost) * len(test.correct[0])
    return total
