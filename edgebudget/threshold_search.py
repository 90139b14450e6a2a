"""How thresholds for a mean cost are found on given samples.

The quantile rule lets shares p^k leave at exit k and looks for p ("Multi-Scale Dense Networks for
Resource Efficient Image Classification", 2018). Descent minimises error + price * cost over
quantile grids, one exit at a time given the others, for a path of prices. That reaches only what
some price makes optimal; between two neighbours of the path, it starts from what lies between
them or from the quantile rule, whichever is better, and trades one threshold against another
within the budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, permutations

import numpy as np

from edgebudget.workload import Array

PRICES = np.geomspace(1e-4, 10.0, 40)  # of score for the span from the first exit to the whole
_LEVELS = 64  # quantiles of a signal that are tried as thresholds
_STEPS = 32  # between two neighbours of the path of prices
_SWEEPS = 20
_TRADES = 4  # sweeps over pairs of thresholds
_MOVES = (-16, -4, -1, 1, 4, 16)
_HALVINGS = 25  # of the range of log p
_WIDEST = 12.0  # log p: all leave at the first exit, or none before the end


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


def quantile_rule(ladder: Ladder, budgets: Sequence[float]) -> list[Array]:
    """Shares p^k leave at exit k; p is bisected so that the mean cost meets each budget."""
    orders = np.argsort(-ladder.sure, axis=1, kind="stable")
    found = []
    for budget in budgets:
        low, high = -_WIDEST, _WIDEST
        best = np.full(len(ladder.sure), -np.inf)
        best[1:] = np.inf
        for _ in range(_HALVINGS):
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


def descent(ladder: Ladder, budgets: Sequence[float]) -> list[Array]:
    """Thresholds of least error for each mean budget, as far as descent finds them."""
    path = _Path.of(ladder)
    rule = quantile_rule(ladder, budgets)
    return [path.at(ladder, budget, start) for budget, start in zip(budgets, rule, strict=True)]


@dataclass(frozen=True, slots=True)
class _Path:
    """Solutions for falling prices: cuts [K - 1] as places in each exit's grid, by mean cost."""

    grids: tuple[Array, ...]
    reached: Array
    cuts: tuple[Array, ...]
    costs: tuple[float, ...]

    @staticmethod
    def of(ladder: Ladder) -> _Path:
        grids = tuple(grid(sure) for sure in ladder.sure)
        reached = places(ladder, grids)
        ends = np.array([len(g) - 1 for g in grids], np.int64)
        first = np.concatenate([[0], ends[1:]]).astype(np.int64)
        span = float(ladder.costs[-1] - ladder.costs[0]) or 1.0
        cuts, last = [ends], ends
        for price in PRICES:
            loss = 1.0 - ladder.correct + price / span * ladder.costs[:, None]
            tried = [descend(loss, reached, start) for start in (last, ends, first)]
            last = min(tried, key=lambda t: t[0])[1]
            cuts.append(last)
        # Where all leave at the first exit, the other cuts are free: as in the neighbour.
        cuts.append(np.concatenate([[0], last[1:]]))
        unique = {tuple(c): c for c in cuts}.values()
        by_cost = sorted((ladder.outcome(thresholds_of(grids, c))[0], tuple(c)) for c in unique)
        found = tuple(np.array(c, np.int64) for _, c in by_cost)
        return _Path(grids, reached, found, tuple(cost for cost, _ in by_cost))

    def at(self, ladder: Ladder, budget: float, rule: Array) -> Array:
        """The best found within the budget; `rule` is where the quantile rule would cut."""
        tried = [c for c, cost in zip(self.cuts, self.costs, strict=True) if cost <= budget]
        for (left, right), (low, high) in zip(
            pairwise(self.cuts), pairwise(self.costs), strict=True
        ):
            if low <= budget < high:
                steps = np.linspace(0, 1, _STEPS + 1)[1:-1]
                tried += [np.round(left + t * (right - left)).astype(np.int64) for t in steps]
        near = [int(np.searchsorted(g, t)) for g, t in zip(self.grids, rule, strict=True)]
        tried.append(np.array(near, np.int64))
        best, start = -1.0, tried[0]
        for cuts in tried:
            cost, score = ladder.outcome(thresholds_of(self.grids, cuts))
            if cost <= budget and score > best:
                best, start = score, cuts
        return thresholds_of(self.grids, _traded(ladder, self.reached, start, budget))


def thresholds_of(grids: Sequence[Array], cuts: Array) -> Array:
    """The thresholds [K - 1] at these places of each exit's grid."""
    return np.array([g[c] for g, c in zip(grids, cuts, strict=True)])


def grid(sure: Array, levels: int = _LEVELS) -> Array:
    """Thresholds worth trying: -inf, between quantiles of the signal, inf."""
    values = np.unique(sure)
    at = np.unique(np.quantile(sure, np.arange(1, levels) / levels, method="lower"))
    place = np.searchsorted(values, at)
    place = place[place > 0]
    between = (values[place] + values[place - 1]) / 2
    return np.concatenate([[-np.inf], between, [np.inf]])


def places(ladder: Ladder, grids: Sequence[Array]) -> Array:
    """How many thresholds of its grid each signal reaches, [K - 1, N]."""
    each = [np.searchsorted(g, s, side="right") for g, s in zip(grids, ladder.sure, strict=True)]
    return np.stack(each) if each else np.zeros((0, ladder.correct.shape[1]), np.int64)


def descend(loss: Array, reached: Array, start: Array) -> tuple[float, Array]:
    """Coordinate descent from `start`: each exit's best cut given the others, until none moves.

    Args:
        loss: Of each sample where it ends at each exit, [K, N].
        reached: As `places` gives it.
        start: Cuts [K - 1].

    Returns:
        The mean loss and the cuts.
    """
    cuts = start.copy()
    for _ in range(_SWEEPS):
        before = cuts.copy()
        later = loss[-1]
        for k in reversed(range(len(reached))):
            here = (reached[:k] <= cuts[:k, None]).all(axis=0)
            leaving = _leaving((loss[k] - later)[here], reached[k][here])
            cuts[k] = int(np.argmin(leaving)) if len(leaving) else cuts[k]
            later = np.where(reached[k] > cuts[k], loss[k], later)
        if (cuts == before).all():
            break
    return float(later.mean()), cuts


def _leaving(change: Array, reached: Array) -> Array:
    """What each cut of one exit changes in all: the sum over those who then leave there."""
    by_place = np.bincount(reached, weights=change)
    found: Array = np.concatenate([np.cumsum(by_place[::-1])[::-1], [0.0]])[1:]
    return found


def _traded(ladder: Ladder, reached: Array, cuts: Array, budget: float) -> Array:
    """Move one cut and set another one anew within the budget, as long as that lowers the error.

    One cut alone cannot move where the budget is spent: it has to be paid for by another.
    """
    count = len(reached)
    pairs = list(permutations(range(count), 2)) if count > 1 else [(0, 0)]
    tops = reached.max(axis=1)
    best, cuts = np.inf, cuts.copy()
    for _ in range(_TRADES):
        before = best
        for k, j in pairs:
            for move in (0, *_MOVES) if count > 1 else (0,):
                trial = cuts.copy()
                trial[k] = min(max(trial[k] + move, 0), tops[k])
                error, trial[j] = _best_cut(ladder, reached, trial, j, budget)
                if error < best - 1e-12:
                    best, cuts = error, trial
        if best == before:
            break
    return cuts


def _best_cut(
    ladder: Ladder, reached: Array, cuts: Array, j: int, budget: float
) -> tuple[float, int]:
    """The cut of exit j of least error within the budget, given the others; else infinite."""
    count = reached.shape[1]
    leaves = reached > cuts[:, None]
    here = ~leaves[:j].any(axis=0)
    before = np.concatenate([leaves[:j], np.ones((1, count), bool)]).argmax(axis=0)
    after = np.concatenate([leaves[j + 1 :], np.ones((1, count), bool)]).argmax(axis=0) + j + 1
    ends = np.where(here, after, before)
    rows = np.flatnonzero(here)
    right = np.take_along_axis(ladder.correct, ends[None], axis=0)[0]
    spent = ladder.costs[ends]
    gained = _leaving(ladder.correct[j, rows] - right[rows], reached[j, rows])
    paid = _leaving(ladder.costs[j] - spent[rows], reached[j, rows])
    within = (spent.sum() + paid) / count <= budget * (1 + 1e-12)
    if not within.any():
        return np.inf, int(cuts[j])
    errors = np.where(within, count - right.sum() - gained, np.inf)
    cut = int(np.argmin(errors))
    return float(errors[cut]), cut
