"""How sure an answer is, read from its class scores.

Sources: "A Baseline for Detecting Misclassified and Out-of-Distribution Examples" (2017) for the
largest probability; "Energy-based Out-of-distribution Detection" (2020) for the energy score;
"On Calibration of Modern Neural Networks" (2017) for the temperature.
"""

from __future__ import annotations

import numpy as np

from edgebudget_runtime.elastic import Signal
from edgebudget_runtime.inputs import Array


def signal(scores: Array, kind: Signal, temperature: float) -> Array:
    """How sure each row of `scores` [N, classes] is, as float64 [N]; larger is surer.

    max_softmax is the largest probability of `scores / temperature`; energy is `temperature`
    times the log of the sum of exponentials of it. A row with NaN or infinity gives -inf, so
    that it reaches no threshold.
    """
    rows = scores.reshape(len(scores), -1).astype(np.float64)
    usable = np.isfinite(rows).all(axis=1)
    rows[~usable] = 0.0
    rows /= temperature
    top = rows.max(axis=1)
    rows -= top[:, None]  # the exponentials cannot overflow
    total = np.exp(rows, out=rows).sum(axis=1)
    sure: Array = 1.0 / total if kind == "max_softmax" else temperature * (top + np.log(total))
    sure[~usable] = -np.inf
    return sure
