"""Thresholds under a mean budget: budgets kept, optima found, noise not fitted."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgebudget.thresholds import METHODS, Ladder, budget_grid, solve, useful_exits
from edgebudget.workload import Array
from edgebudget_runtime.errors import InfeasibleError

COSTS = np.array([10.0, 30.0, 60.0, 100.0])


def ladder(count: int, seed: int, exits: int = 4, first: float = 0.5) -> Ladder:
    """Deeper exits are right more often; a signal is noisy word of whether its exit is right.

    `first` says how good the first exit is, as a logit.
    """
    rng = np.random.default_rng(seed)
    easy = rng.normal(size=count)
    chance = 1 / (1 + np.exp(-(2.5 * easy + np.linspace(first, 4.0, exits)[:, None])))
    correct = (rng.random((exits, count)) < chance).astype(np.float64)
    sure = chance[:-1] + 0.05 * rng.normal(size=(exits - 1, count))
    return Ladder(correct, sure, COSTS[:exits])


def brute(given: Ladder, budget: float) -> float:
    """Best score of one threshold within the budget."""
    each = [np.array([t]) for t in (-np.inf, *given.sure[0], np.inf)]
    outcomes = [given.outcome(t) for t in each]
    return max(score for cost, score in outcomes if cost <= budget + 1e-9)


@settings(max_examples=6, deadline=None)
@given(count=st.integers(1, 80), seed=st.integers(0, 999), exits=st.integers(2, 4))
def test_every_method_keeps_the_mean_budget(count: int, seed: int, exits: int) -> None:
    given_ = ladder(count, seed, exits)
    budgets = budget_grid(given_.costs, 2)
    for method in METHODS.values():
        for budget, thresholds in zip(budgets, method(given_, budgets), strict=True):
            assert given_.outcome(thresholds)[0] <= budget + 1e-9
    for found in solve(given_, budgets):
        assert (found.cost, found.score) == given_.outcome(found.thresholds)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 999), part=st.floats(0.0, 1.0))
def test_descent_finds_the_optimum_of_one_exit(seed: int, part: float) -> None:
    given_ = ladder(25, seed, exits=2)
    budget = float(10 + 20 * part)
    (thresholds,) = METHODS["descent"](given_, [budget])
    assert given_.outcome(thresholds)[1] == pytest.approx(brute(given_, budget))


@pytest.mark.parametrize(("first", "gain"), [(-3.0, 0.01), (0.5, -0.003)])
@pytest.mark.parametrize("count", [300, 2000])
def test_beats_the_quantile_rule_or_equals_it_on_other_samples(
    first: float, gain: float, count: int
) -> None:
    test, train = ladder(40000, 7, first=first), ladder(count, count, first=first)
    budgets = np.array(budget_grid(COSTS, 6))
    rule = np.array([test.outcome(t) for t in METHODS["quantile rule"](train, list(budgets))])
    solved = np.array([test.outcome(s.thresholds) for s in solve(train, list(budgets))])
    # What is spent less is worth what the rule would get for it.
    worth = np.interp(solved[:, 0], rule[:, 0], rule[:, 1])
    assert (solved[:, 1] - worth).mean() > gain
    assert (solved[:, 0] <= budgets * 1.1).all()


def test_samples_that_are_equally_sure_leave_together() -> None:
    sure = np.array([[0.9, 0.5, 0.5, 0.5, 0.1]])
    given_ = Ladder(np.array([[1.0, 1, 1, 1, 0], [1, 1, 1, 1, 1]]), sure, np.array([1.0, 2.0]))
    for method in METHODS.values():
        (thresholds,) = method(given_, [1.3])
        assert given_.leaves(thresholds).tolist() == [0, 0, 0, 0, 1]
        assert 0.1 < thresholds[0] < 0.5  # between two values: rounding moves nobody across


def test_thresholds_mean_the_first_exit_that_is_sure_enough() -> None:
    sure = np.array([[0.2, 0.8, 0.2], [0.9, 0.9, 0.1]])
    given_ = Ladder(np.zeros((3, 3)), sure, np.array([1.0, 2.0, 3.0]))
    assert given_.leaves(np.array([0.5, 0.5])).tolist() == [1, 0, 2]
    assert given_.leaves(np.array([np.inf, -np.inf])).tolist() == [1, 1, 1]


def test_a_budget_below_the_first_exit_is_refused() -> None:
    with pytest.raises(InfeasibleError, match="EB401"):
        solve(ladder(50, 0), [9.0])


def test_an_exit_that_is_no_better_than_an_earlier_one_goes() -> None:
    given_ = ladder(2000, 3)
    correct = given_.correct.copy()
    correct[2] = correct[1] * (np.arange(2000) % 10 > 0)
    kept, dropped = useful_exits(Ladder(correct, given_.sure, given_.costs))
    assert kept == (0, 1, 3)
    assert dropped[0][0] == 2
    assert "exit 2" in dropped[0][1]


def test_an_exit_whose_head_costs_more_than_it_saves_goes() -> None:
    given_ = ladder(2000, 4)
    heads = np.array([0.0, 0.0, 25.0, 0.0])
    kept, dropped = useful_exits(given_, heads)
    assert 2 not in kept
    assert "held-out" in dropped[0][1]
    assert useful_exits(given_)[0] == (0, 1, 2, 3)


def test_one_early_exit_and_the_whole_always_stay() -> None:
    rng = np.random.default_rng(0)
    same: Array = np.ones((3, 300))
    kept, _ = useful_exits(Ladder(same, rng.random((2, 300)), COSTS[:3]))
    assert kept == (0, 2)
