"""Temperatures: what they recover, and when they keep out of the way."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgebudget.temperature import ece, fit_temperature, nll
from edgebudget.workload import Array


def drawn(count: int, scale: float, seed: int) -> tuple[Array, Array]:
    """Scores that are `scale` times too sure, and labels drawn from the true probabilities."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(count, 5)) * 2.0
    odds = np.exp(logits)
    chance = np.cumsum(odds / odds.sum(axis=1, keepdims=True), axis=1)
    return logits * scale, (rng.random((count, 1)) > chance).sum(axis=1)


@pytest.mark.parametrize("scale", [0.4, 1.0, 3.0])
def test_recovers_by_how_much_scores_are_too_sure(scale: float) -> None:
    scores, labels = drawn(4000, scale, 1)
    found = fit_temperature(scores.astype(np.float32), labels)
    assert found.temperature == pytest.approx(scale, rel=0.1)
    assert found.ece_after < 0.03
    if scale != 1.0:
        assert found.ece_before > 3 * found.ece_after
        assert found.nll_after < found.nll_before


@settings(max_examples=20, deadline=None)
@given(count=st.integers(1, 40), scale=st.floats(0.2, 5.0), seed=st.integers(0, 999))
def test_small_sets_never_lose_likelihood_on_themselves(
    count: int, scale: float, seed: int
) -> None:
    scores, labels = drawn(count, scale, seed)
    found = fit_temperature(scores, labels)
    assert np.isfinite(found.temperature)
    assert found.temperature > 0
    assert found.nll_after <= found.nll_before + 1e-9


def test_is_one_where_nothing_can_be_learnt() -> None:
    scores, labels = drawn(1, 3.0, 0)
    assert fit_temperature(scores, labels).temperature == 1.0


def test_small_sets_do_less_harm_to_others_than_plain_fitting() -> None:
    test = drawn(20000, 1.0, 99)
    lost = []
    for seed in range(20):
        scores, labels = drawn(25, 1.0, seed)
        lost.append(nll(*test, fit_temperature(scores, labels).temperature) - nll(*test))
        grid = np.exp(np.linspace(-2, 2, 81))
        plain = min(grid, key=lambda t: nll(scores, labels, float(t)))
        lost[-1] -= nll(*test, float(plain)) - nll(*test)
    assert np.mean(lost) < 0  # against the temperature of least loss on the small set


def test_calibration_error_of_a_known_case() -> None:
    # Always 0.75 sure of two classes, right half of the time.
    scores = np.tile(np.log([[3.0, 1.0]]), (8, 1))
    assert ece(scores, np.array([0, 1] * 4)) == pytest.approx(0.25)
