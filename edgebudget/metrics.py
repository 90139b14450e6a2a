"""Metrics and their 95 % intervals. Arrays are float64 inside; higher is better for the first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from edgebudget.workload import Array

RESAMPLES = 1000
SLOW_RESAMPLES = 200  # for metrics that must be computed one resample at a time
SEED = 20240607  # of every bootstrap, so that one set of predictions has one interval
_Z = 1.959963984540054  # 97.5 % quantile of the normal distribution

Interval = tuple[float, float]


def wilson(hits: int, count: int) -> Interval:
    """95 % interval of a proportion.

    Method: "Probable Inference, the Law of Succession, and Statistical Inference", 1927.
    """
    share = hits / count
    scale = 1 + _Z**2 / count
    middle = (share + _Z**2 / (2 * count)) / scale
    half = _Z * np.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2)) / scale
    # Rounding may push an end past 0, 1 or the share when every answer is right or wrong.
    low, high = max(0.0, float(middle - half)), min(1.0, float(middle + half))
    return min(low, share), max(high, share)


def resamples(count: int, times: int = RESAMPLES) -> Array:
    """Bootstrap indices [times, count], the same at every call."""
    return np.random.default_rng(SEED).integers(0, count, size=(times, count))


def percentile_interval(values: Array, around: float) -> Interval:
    """95 % percentile interval of bootstrap values; it always holds the full-sample value."""
    finite = values[np.isfinite(values)]
    if len(finite) == 0:
        return around, around
    low, high = np.percentile(finite, [2.5, 97.5])
    return min(float(low), around), max(float(high), around)


def ranks(x: Array) -> Array:
    """Ranks along the last axis, ties sharing their mean rank."""
    from scipy.stats import rankdata

    found: Array = np.asarray(rankdata(x, axis=-1))
    return found


def pearson(x: Array, y: Array) -> Array:
    """Pearson correlation along the last axis; NaN where either side is constant."""
    x = x - x.mean(axis=-1, keepdims=True)
    y = y - y.mean(axis=-1, keepdims=True)
    # Scaling first keeps the squares of very small or large values from vanishing.
    with np.errstate(invalid="ignore", divide="ignore"):
        x = x / np.abs(x).max(axis=-1, keepdims=True)
        y = y / np.abs(y).max(axis=-1, keepdims=True)
        top = (x * y).sum(axis=-1)
        value = top / np.sqrt((x * x).sum(axis=-1) * (y * y).sum(axis=-1))
    clipped: Array = np.clip(value, -1.0, 1.0)
    return clipped


def spearman(x: Array, y: Array) -> Array:
    """Spearman rank correlation (SRCC) along the last axis, with mean ranks for ties."""
    return pearson(ranks(x), ranks(y))


def kendall(x: Array, y: Array) -> float:
    """Kendall rank correlation (KRCC), tau-b, which accounts for ties; NaN if one is constant."""
    from scipy.stats import kendalltau

    return float(kendalltau(x, y).statistic)


def sigmoid(x: Array, centre: Array | float, width: Array | float) -> Array:
    """The part of the 4-parameter logistic that is not a linear map."""
    from scipy.special import expit

    found: Array = expit((x - centre) / width)
    return found


def fit_logistic(x: Array, y: Array) -> tuple[float, float] | None:
    """Centre and width of the 4-parameter logistic that maps predictions to labels (VQEG, 2003).

    Its two other parameters are a linear map, which the least squares fit solves and PLCC does
    not see: so the least error is the greatest |PLCC|. None where a side is constant.
    """
    from scipy.optimize import minimize

    if len(x) < 5 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    middle, unit = float(x.mean()), float(x.std())

    def loss(shape: Array) -> float:
        with np.errstate(over="ignore"):
            value = abs(float(pearson(sigmoid(x, middle + unit * shape[0], unit * _e(shape)), y)))
        return -value if np.isfinite(value) else 0.0

    start = min(_GRID, key=loss)
    found = minimize(loss, start, method="Nelder-Mead", options={"maxiter": 200, "xatol": 1e-4})
    best = found.x if found.fun < loss(start) else start
    return middle + unit * float(best[0]), unit * _e(best)


# Centres in standard deviations, widths as powers of e of them: flat to steep curves.
_GRID = np.array([(c, w) for c in np.linspace(-2, 2, 5) for w in (-2.0, -1.0, 0.0, 1.0)])


def _e(shape: Array) -> float:
    return float(np.exp(np.clip(shape[1], -6, 6)))


def plcc_logistic(x: Array, y: Array, fitted: tuple[float, float]) -> Array:
    """PLCC along the last axis after the fitted logistic (which may fall)."""
    return np.abs(pearson(sigmoid(x, *fitted), y))


def refitted_plcc(x: Array, y: Array, draws: Array, fitted: tuple[float, float]) -> Array:
    """PLCC of each resample after a logistic of its own, chosen among a grid and `fitted`."""
    middle, unit = float(x.mean()), float(x.std())
    shapes = [fitted, *((middle + unit * g[0], unit * _e(g)) for g in _GRID)]
    each = [plcc_logistic(x[draws], y[draws], shape) for shape in shapes]
    best: Array = np.nanmax(np.stack([*each, np.zeros(len(draws))]), axis=0)
    return best


def log_probabilities(scores: Array) -> Array:
    """Log-softmax of [N, C]; rows that are probabilities already are only logged."""
    scores = scores.astype(np.float64)
    sums_to_one = np.abs(scores.sum(axis=1) - 1) < 1e-3
    if bool((sums_to_one & (scores >= 0).all(axis=1)).all()):
        logged: Array = np.log(np.clip(scores, 1e-12, None))
        return logged
    from scipy.special import log_softmax

    found: Array = np.asarray(log_softmax(scores, axis=1))
    return found


def hits_at(scores: Array, labels: Array, k: int) -> Array:
    """Whether each label is among the `k` best of its row [N, C]; ties favour low indices."""
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    found: Array = (best == labels[:, None]).any(axis=1)
    return found


def fidelity(ours: Array, theirs: Array) -> Array:
    """Per sample [N, ...]: 1 - noise power / signal power, 0 at worst, 1 when equal."""
    count = len(theirs)
    a = ours.reshape(count, -1).astype(np.float64)
    b = theirs.reshape(count, -1).astype(np.float64)
    noise, signal = ((a - b) ** 2).sum(axis=1), (b**2).sum(axis=1)
    safe = np.where(signal > 0, signal, 1.0)
    ratio = np.where(signal > 0, noise / safe, (noise > 0).astype(np.float64))
    found: Array = np.clip(1 - ratio, 0.0, 1.0)
    return found


def cosine(ours: Array, theirs: Array) -> Array:
    """Per sample [N, ...]: cosine of the angle between two outputs; 0 against a zero vector."""
    count = len(theirs)
    a = ours.reshape(count, -1).astype(np.float64)
    b = theirs.reshape(count, -1).astype(np.float64)
    size = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    found: Array = np.where(size > 0, (a * b).sum(axis=1) / np.where(size > 0, size, 1.0), 0.0)
    return found


def one_at_a_time(metric: Callable[..., float], *arrays: Array) -> Array:
    """`metric` on `SLOW_RESAMPLES` bootstrap resamples of `arrays`, all resampled alike."""
    draws = resamples(len(arrays[0]), SLOW_RESAMPLES)
    values: Any = [metric(*(a[i] for a in arrays)) for i in draws]
    return np.asarray(values, dtype=np.float64)
