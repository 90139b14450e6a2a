"""One temperature per exit, so that how sure it says it is agrees with how often it is right.

Source: "On Calibration of Modern Neural Networks" (2017). Here the temperature is drawn towards
1 as far as held-out folds ask for it, because small sets fit a temperature to their noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgebudget.workload import Array

_RANGE = (-3.0, 3.0)  # of the logarithm of a temperature
_SHRINKS = (0.0, 0.25, 0.5, 0.75, 1.0)  # parts of the fitted logarithm that may be kept
_FOLDS = 5
_BINS = 15  # of the expected calibration error


@dataclass(frozen=True, slots=True)
class Fitted:
    """A temperature and what it does to the samples it was fitted on.

    `nll` is the mean negative log-likelihood in nats, `ece` the expected calibration error.
    """

    temperature: float
    count: int
    nll_before: float
    nll_after: float
    ece_before: float
    ece_after: float


def fit_temperature(scores: Array, labels: Array) -> Fitted:
    """The temperature for class scores [N, classes] of integer labels [N].

    It is 1 where no temperature helps on samples that it was not fitted on.
    """
    scores = scores.astype(np.float64)
    found = float(np.exp(_shrink(scores, labels) * _log_best(scores, labels)))
    return Fitted(
        found,
        len(labels),
        nll(scores, labels),
        nll(scores, labels, found),
        ece(scores, labels),
        ece(scores, labels, found),
    )


def nll(scores: Array, labels: Array, temperature: float = 1.0) -> float:
    """Mean negative log-likelihood of the labels, in nats."""
    logged = _log_softmax(scores, temperature)
    return float(-logged[np.arange(len(labels)), labels].mean())


def ece(scores: Array, labels: Array, temperature: float = 1.0, bins: int = _BINS) -> float:
    """Expected calibration error: the gap between how sure and how often right, over equal bins."""
    sure = np.exp(_log_softmax(scores, temperature).max(axis=1))
    right = scores.argmax(axis=1) == labels
    place = np.minimum((sure * bins).astype(np.int64), bins - 1)
    gaps = np.bincount(place, weights=right - sure, minlength=bins)
    return float(np.abs(gaps).sum() / len(labels))


def _log_best(scores: Array, labels: Array) -> float:
    """Logarithm of the temperature of least NLL; the NLL is convex in 1 / temperature."""
    from scipy.optimize import minimize_scalar

    def loss(log: float) -> float:
        return nll(scores, labels, float(np.exp(log)))

    found = minimize_scalar(loss, bounds=_RANGE, method="bounded", options={"xatol": 1e-5})
    return float(found.x)


def _shrink(scores: Array, labels: Array) -> float:
    """How much of a fitted logarithm to keep: what is best on folds it was not fitted on."""
    folds = min(_FOLDS, len(labels))
    if folds < 2:
        return 0.0
    fold = np.arange(len(labels)) % folds
    losses = np.zeros(len(_SHRINKS))
    for k in range(folds):
        out = fold == k
        log = _log_best(scores[~out], labels[~out])
        losses += [
            nll(scores[out], labels[out], float(np.exp(s * log))) * out.sum() for s in _SHRINKS
        ]
    return _SHRINKS[int(np.argmin(losses))]


def _log_softmax(scores: Array, temperature: float) -> Array:
    rows = scores.astype(np.float64) / temperature
    rows -= rows.max(axis=1, keepdims=True)
    found: Array = rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))
    return found
