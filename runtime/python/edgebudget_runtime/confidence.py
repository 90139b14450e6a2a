"""How sure an answer is, read from its class scores.

Sources: "A Baseline for Detecting Misclassified and Out-of-Distribution Examples" (2017) for the
largest probability; "Energy-based Out-of-distribution Detection" (2020) for the energy score;
"On Calibration of Modern Neural Networks" (2017) for the temperature.
"""

from __future__ import annotations

import math

import numpy as np

from edgebudget_runtime.elastic import Signal
from edgebudget_runtime.inputs import Array

_FEW = 64  # classes up to which plain floats are faster than arrays


def signal(scores: Array, kind: Signal, temperature: float) -> Array:
    """How sure each row of `scores` [N, classes] is, as float64 [N]; larger is surer.

    max_softmax is the largest probability of `scores / temperature`; energy is `temperature`
    times the log of the sum of exponentials of it. A row with NaN or infinity gives -inf, so
    that it reaches no threshold; -inf in a row is a class that was ruled out.
    """
    rows = np.divide(scores.reshape(len(scores), -1), temperature, dtype=np.float64)
    top = rows.max(axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):  # infinity less infinity: NaN, found below
        rows -= top  # the exponentials cannot overflow
    total = np.exp(rows, out=rows).sum(axis=1)
    sure: Array = (
        1.0 / total if kind == "max_softmax" else temperature * (top[:, 0] + np.log(total))
    )
    sure[~np.isfinite(sure)] = -np.inf
    return sure


def row_signals(scores: Array, kind: Signal, temperature: float) -> list[float]:
    """`signal` row by row, the same for one row and for many; it may differ in the last bit."""
    if scores.ndim == 2 and scores.shape[1] <= _FEW:
        return [_one(row, kind, temperature) for row in scores.tolist()]
    found: list[float] = signal(scores, kind, temperature).tolist()
    return found


def _one(row: list[float], kind: Signal, temperature: float) -> float:
    """`signal` of one row, without arrays."""
    values = [v / temperature for v in row]
    top = max(values)
    total = math.nan
    if -math.inf < top < math.inf:
        total = sum([math.exp(v - top) for v in values])
    if math.isnan(total):  # NaN in the row, or infinity
        return -math.inf
    return 1.0 / total if kind == "max_softmax" else temperature * (top + math.log(total))
