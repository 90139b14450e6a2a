"""Metrics against scipy and scikit-learn, and what their intervals promise."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats
from scipy.optimize import curve_fit
from sklearn.metrics import log_loss, top_k_accuracy_score

from edgebudget import metrics
from edgebudget.workload import Array

FEW = settings(max_examples=40, deadline=None)
_VALUES = st.integers(-20, 20).map(float)  # a small range makes ties


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Array, Array]:
    """Two vectors, neither constant, with ties."""
    count = draw(st.integers(4, 40))
    x, y = (draw(hnp.arrays(np.float64, count, elements=_VALUES)) for _ in range(2))
    x[0], x[1], y[0], y[1] = 21.0, 22.0, -21.0, 23.0
    return x, y


@FEW
@given(pairs())
def test_correlations_are_scipys(pair: tuple[Array, Array]) -> None:
    x, y = pair
    assert metrics.spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
    assert metrics.pearson(x, y) == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-12)
    assert metrics.kendall(x, y) == pytest.approx(stats.kendalltau(x, y).statistic, abs=1e-12)


@FEW
@given(pairs())
def test_monotone_maps_leave_rank_correlations(pair: tuple[Array, Array]) -> None:
    x, y = pair
    mapped = np.exp(x / 7)
    assert metrics.spearman(mapped, y) == metrics.spearman(x, y)
    assert metrics.kendall(mapped, y) == metrics.kendall(x, y)
    assert metrics.spearman(-x, y) == pytest.approx(-metrics.spearman(x, y))


@FEW
@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_scipys_and_holds_the_share(case: tuple[int, int]) -> None:
    hits, count = case
    low, high = metrics.wilson(hits, count)
    expected = stats.binomtest(hits, count).proportion_ci(0.95, method="wilson")
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert 0 <= low <= hits / count <= high <= 1


@pytest.mark.parametrize("direction", [1, -1])
def test_the_fitted_logistic_straightens_a_sigmoid(direction: int) -> None:
    x = np.linspace(-4, 4, 60)
    y = direction * metrics.sigmoid(x, 0.5, 0.4)
    fitted = metrics.fit_logistic(x, y)
    assert fitted is not None
    assert fitted == pytest.approx((0.5, 0.4), rel=1e-2)
    assert metrics.plcc_logistic(x, y, fitted) > 0.9999 > abs(float(metrics.pearson(x, y)))


def test_the_fit_reaches_the_least_squares_error() -> None:
    def four(x: Array, a: float, b: float, c: float, w: float) -> Array:
        return a + b * metrics.sigmoid(x, c, w)

    rng = np.random.default_rng(5)
    x = rng.normal(size=200)
    y = four(x, 0.2, 0.7, -0.3, 0.5) + 0.05 * rng.normal(size=200)
    expected, _ = curve_fit(four, x, y, p0=(0.2, 0.7, -0.3, 0.5))
    fitted = metrics.fit_logistic(x, y)
    assert fitted is not None
    best = stats.pearsonr(four(x, *expected), y).statistic
    assert metrics.plcc_logistic(x, y, fitted) == pytest.approx(best, abs=1e-5)
    assert metrics.fit_logistic(np.zeros(9), y[:9]) is None


@FEW
@given(hnp.arrays(np.float32, (12, 7), elements=st.floats(-5, 5, width=32, allow_subnormal=False)))
def test_classification_metrics_are_scikit_learns(scores: Array) -> None:
    scores = scores + np.arange(7, dtype=np.float32) * np.float32(1e-3)  # no ties
    labels = np.arange(12) % 7
    for k in (1, 5):
        expected = top_k_accuracy_score(labels, scores, k=k)
        assert metrics.hits_at(scores, labels, k).mean() == pytest.approx(expected)
    probabilities = np.exp(metrics.log_probabilities(scores))
    ours = -metrics.log_probabilities(scores)[np.arange(12), labels].mean()
    assert ours == pytest.approx(log_loss(labels, probabilities, labels=range(7)), rel=1e-6)
    again = metrics.log_probabilities(probabilities.astype(np.float32))  # already probabilities
    assert again == pytest.approx(np.log(probabilities), rel=1e-4, abs=1e-4)


def test_fidelity_is_one_when_equal_and_falls_with_noise() -> None:
    signal = np.random.default_rng(0).normal(size=(5, 3, 4))
    assert metrics.fidelity(signal, signal) == pytest.approx(np.ones(5))
    assert metrics.fidelity(signal * 1.1, signal) == pytest.approx(np.full(5, 0.99))  # 20 dB
    assert metrics.fidelity(-signal, signal) == pytest.approx(np.zeros(5))
    assert metrics.fidelity(np.zeros((2, 3)), np.zeros((2, 3))) == pytest.approx(np.ones(2))
    assert metrics.cosine(signal * 2, signal) == pytest.approx(np.ones(5))


@FEW
@given(hnp.arrays(np.float64, 50, elements=st.floats(-10, 10)), st.floats(-20, 20))
def test_an_interval_holds_its_value(values: Array, around: float) -> None:
    low, high = metrics.percentile_interval(values, around)
    assert low <= around <= high


def test_resamples_are_the_same_at_every_call() -> None:
    assert np.array_equal(metrics.resamples(9), metrics.resamples(9))
