"""Thresholds whose loss of quality is bounded: at most so much, at this confidence.

Learn-then-test with fixed-sequence testing ("Learn then Test: Calibrating Predictive Algorithms
to Achieve Risk Control", 2021): settings stand in an order that is fixed before these samples are
looked at, each is tested at the full level, and the last one before the first failure is
certified. The test is on paired answers: how often leaving early spoils an answer that the
reference has right, less how often it repairs a wrong one. Its p-value is exact for the counts;
the share of samples that change at all, which it also depends on, is bounded from the same
samples at a small part of the level ("P Values Maximized Over a Confidence Set for the Nuisance
Parameter", 1994).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgebudget.workload import Array
from edgebudget_runtime.elastic import Certificate
from edgebudget_runtime.errors import InfeasibleError, UsageError

_PART = 0.05  # of the level: spent once on the share that changes, once on the reference's quality
_POINTS = 24  # shares that change at which the p-value is maximised


@dataclass(frozen=True, slots=True)
class Certified:
    """The last setting that passed its test, and the p-value of each one tested."""

    index: int
    certificate: Certificate
    p_values: tuple[float, ...]


def split(count: int, share: float, seed: int) -> tuple[Array, Array]:
    """Two disjoint sets of indices below `count`, in order: to solve on, and to certify on.

    `share` is the certificate's part.
    """
    order = np.random.default_rng(seed).permutation(count)
    cut = count - round(share * count)
    return np.sort(order[:cut]), np.sort(order[cut:])


def certify(
    early: Sequence[Array], reference: Array, *, max_drop: float, confidence: float, against: str
) -> Certified:
    """The most aggressive of an ordered family of settings whose relative drop is bounded.

    Args:
        early: For each setting, safest first, whether each of N samples is right; the order and
            the settings must not depend on these samples.
        reference: Whether the reference is right on the same samples, [N].
        max_drop: Share of the reference's quality that may be lost.
        confidence: Probability that the bound holds, over draws of such samples.
        against: What the reference is, in words.

    Raises:
        UsageError: EB194 a bound or confidence is not between 0 and 1, EB195 too few samples to
            show it even if no answer changed.
        InfeasibleError: EB402, not even the safest setting passes.
    """
    _check(max_drop, confidence)
    delta = 1.0 - confidence
    count, right = len(reference), int(reference.sum())
    allowed = max_drop * _lower(right, count, _PART * delta)
    if _p_value(0, 0, count, allowed, delta) > delta:
        raise UsageError(
            "EB195",
            f"{count} samples cannot show a drop of at most {max_drop:.3g} at {confidence:.3g}, "
            "even if no answer changed",
            hint=_advice(right / max(count, 1), max_drop, delta),
        )
    p_values: list[float] = []
    for answers in early:
        p_values.append(_p_value(*_changed(answers, reference), count, allowed, delta))
        if p_values[-1] > delta:
            break
    passed = sum(p <= delta for p in p_values)
    if passed == 0:
        harm, gain = _changed(early[0], reference)
        raise InfeasibleError(
            "EB402",
            f"no thresholds lose at most {max_drop:.3g} at confidence {confidence:.3g}: the "
            f"safest spoils {harm} and repairs {gain} of {count} answers",
            hint="allow a larger drop, or give more held-back samples",
        )
    harm, gain = _changed(early[passed - 1], reference)
    how = (
        f"against {against}: {harm} answers spoilt and {gain} repaired of {count} held-back "
        f"samples that solved nothing; test {passed} of {len(early)} in a fixed order, exact "
        f"p-value {p_values[passed - 1]:.3g}"
    )
    certificate = Certificate(max_drop, confidence, count, how)
    return Certified(passed - 1, certificate, tuple(p_values))


def _check(max_drop: float, confidence: float) -> None:
    for name, value in (("--max-drop", max_drop), ("--confidence", confidence)):
        if not 0.0 < value < 1.0:
            raise UsageError(
                "EB194", f"{name} {value:g} is not between 0 and 1", hint="such as 1% and 95%"
            )


def _advice(quality: float, max_drop: float, delta: float) -> str:
    if quality == 0.0:
        return "the reference itself has none right: check the labels"
    needed = _needed(quality, max_drop, delta)
    return f"give at least {needed} held-back samples (twice that leaves room for changes)"


def _needed(quality: float, max_drop: float, delta: float) -> int:
    """Fewest samples that pass when no answer changes, by bisection."""

    def passes(count: int) -> bool:
        allowed = max_drop * _lower(math.floor(quality * count), count, _PART * delta)
        return _p_value(0, 0, count, allowed, delta) <= delta

    high = 16
    while not passes(high):
        high *= 2
    low = high // 2
    while high - low > max(1, low // 100):
        middle = (low + high) // 2
        low, high = (low, middle) if passes(middle) else (middle, high)
    return high


def _changed(early: Array, reference: Array) -> tuple[int, int]:
    """How many answers leaving early spoils, and how many it repairs."""
    early, reference = early.astype(bool), reference.astype(bool)
    return int((reference & ~early).sum()), int((early & ~reference).sum())


def _p_value(harm: int, gain: int, count: int, allowed: float, delta: float) -> float:
    """Of the hypothesis that spoilt less repaired is more than `allowed` of all samples.

    Given the share q that changes, the count of spoilt answers is binomial among those that
    change, and they are binomial among all.
    """
    from scipy.stats import binom

    spent = 2 * _PART * delta
    largest = _upper(harm + gain, count, _PART * delta)
    if allowed <= 0.0 or largest <= allowed:  # fewer change at all than may be spoilt
        return spent if allowed > 0.0 else 1.0
    worst = 0.0
    for q in np.geomspace(allowed, largest, _POINTS):
        low, high = (float(binom.ppf(x, count, q)) for x in (1e-12, 1 - 1e-12))
        m = np.arange(low, high + 1)
        spoilt = np.floor((harm - gain + m) / 2)
        chance = binom.pmf(m, count, q) * binom.cdf(spoilt, m, min(1.0, (q + allowed) / (2 * q)))
        worst = max(worst, float(chance.sum()))
    return min(1.0, worst + spent)


def _lower(hits: int, count: int, level: float) -> float:
    """Exact lower confidence bound of a proportion (Clopper and Pearson, 1934)."""
    from scipy.stats import beta

    return 0.0 if hits == 0 else float(beta.ppf(level, hits, count - hits + 1))


def _upper(hits: int, count: int, level: float) -> float:
    """Exact upper confidence bound of a proportion."""
    from scipy.stats import beta

    return 1.0 if hits == count else float(beta.ppf(1 - level, hits + 1, count - hits))
