"""Which signal tells best, for the exits of one artifact, whether to go on.

Signals are compared by the quality they give over every share of samples that leave early, as
what matters is not whether a signal finds wrong answers but whether it finds those that the
whole would have got right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edgebudget.workload import Array
from edgebudget_runtime.confidence import signal
from edgebudget_runtime.elastic import Signal

SIGNALS: tuple[Signal, ...] = ("max_softmax", "energy")  # those a runtime knows


@dataclass(frozen=True, slots=True)
class Choice:
    """The signal to use, and the area of each one that was looked at (higher is better)."""

    signal: Signal
    areas: Mapping[str, float]


def margin(scores: Array, temperature: float) -> Array:
    """Largest minus second largest probability of each row [N, classes], float64 [N]."""
    rows = scores.astype(np.float64) / temperature
    odds = np.exp(rows - rows.max(axis=1, keepdims=True))
    best = np.partition(odds, -2, axis=1)
    found: Array = (best[:, -1] - best[:, -2]) / odds.sum(axis=1)
    return found


def area(sure: Array, here: Array, whole: Array) -> float:
    """Mean quality over all shares of samples [N] that leave early, the surest first.

    `here` and `whole` are each sample's score at the exit and at the end. Samples that are
    equally sure leave together; between such groups the curve is straight.
    """
    count = len(sure)
    order = np.argsort(-sure, kind="stable")
    gain = np.concatenate([[0.0], np.cumsum((here - whole)[order].astype(np.float64))])
    ends = np.flatnonzero(np.diff(sure[order]) != 0) + 1
    at = np.concatenate([[0], ends, [count]])
    under = (np.diff(at) * (gain[at][1:] + gain[at][:-1])).sum() / 2
    return float(whole.mean() + under / count**2)


def choose_signal(scores: Sequence[Array], temperatures: Sequence[float], correct: Array) -> Choice:
    """Compare signals on the exits before the last.

    Args:
        scores: Class scores [N, classes] of each of K exits.
        temperatures: One for each.
        correct: Each exit's score of each sample, [K, N].

    Returns:
        The best of `SIGNALS`. The margin's area is told beside theirs.
    """
    early = range(len(scores) - 1)
    readings = {name: [signal(scores[k], name, temperatures[k]) for k in early] for name in SIGNALS}
    found: dict[str, float] = {name: _mean_area(each, correct) for name, each in readings.items()}
    best: Signal = max(SIGNALS, key=lambda name: found[name])
    margins = [margin(scores[k], temperatures[k]) for k in early]
    return Choice(best, {**found, "margin": _mean_area(margins, correct)})


def _mean_area(sure: Sequence[Array], correct: Array) -> float:
    areas = [area(s, correct[k], correct[-1]) for k, s in enumerate(sure)]
    return float(np.mean(areas)) if areas else float(correct[-1].mean())
