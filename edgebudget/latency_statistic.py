"""One statistic of a latency from a series of runs, on the safe side where it is a percentile.

A percentile of the runs that were seen is as often too low as too high. What is proven is an upper
confidence bound from order statistics: of n runs the k-th smallest lies above the true q-quantile
with probability P(Binomial(n, q) < k), whatever the distribution, as long as runs are alike and
independent ("Order Statistics", David and Nagaraja, 2003, section 7.1). The median is stated as it
is seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from edgebudget_runtime.cost import Figure
from edgebudget_runtime.errors import UsageError

if TYPE_CHECKING:
    from edgebudget.workload import Array
    from edgebudget_runtime.budget import Limit, Statistic

CONFIDENCE = 0.95
_QUANTILE: dict[Statistic, float] = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}


def wanted(limits: Sequence[Limit]) -> Statistic | None:
    """The one statistic of latency that proves every limit; None where no single one does.

    A larger percentile is never below a smaller one; a mean says nothing about either.
    """
    asked = {x.statistic for x in limits if x.resource == "latency_ms"}
    if len(asked) == 1:
        return asked.pop()
    if not asked or "mean" in asked or "max" in asked:
        return None
    return max(asked, key=lambda s: _QUANTILE.get(s, 1.0))


def least_runs(statistic: Statistic) -> int:
    """The fewest runs of which the slowest bounds the statistic (p99: 299); 1 for others."""
    if statistic not in _QUANTILE or statistic == "p50":
        return 1
    return math.ceil(math.log(1.0 - CONFIDENCE) / math.log(_QUANTILE[statistic]))


def enough_runs(repeats: int, statistic: Statistic) -> int:
    """`repeats`, or as many as the statistic needs.

    Raises:
        UsageError: EB144, no run is asked for.
    """
    if repeats < 1:
        raise UsageError("EB144", f"latency of {repeats} runs", hint="measure 1 run or more")
    return max(repeats, least_runs(statistic))


def rank(count: int, quantile: float) -> int:
    """The smallest k whose k-th smallest of `count` runs bounds the quantile with confidence.

    `count` is at least the least number of runs, or the slowest run is what there is.
    """
    total, log_q, log_p = 0.0, math.log(quantile), math.log1p(-quantile)
    for k in range(count):
        ways = math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1)
        total += math.exp(ways + k * log_q + (count - k) * log_p)  # P(Binomial(n, q) <= k)
        if total >= CONFIDENCE:
            return k + 1
    return count


def value(ms: Array, statistic: Statistic) -> float:
    """The statistic of one process's runs [count] in ms, percentiles above the median bounded."""
    if statistic == "mean":
        return float(np.mean(ms))
    if statistic == "p50":
        return float(np.median(ms))
    if statistic == "max":
        return float(np.max(ms))
    return float(np.sort(ms)[rank(len(ms), _QUANTILE[statistic]) - 1])


def figure(processes: Sequence[Array], statistic: Statistic, how: str, device: str) -> Figure:
    """The worst process's statistic as a figure; `how` names the engine and its threads."""
    counts = [len(ms) for ms in processes]
    words = {"p50": "median", "mean": "mean", "max": "slowest"}.get(
        statistic, f"{CONFIDENCE:.0%} upper bound of {statistic}, by order statistics,"
    )
    shown = f"{min(counts)} warm runs in a process of its own"
    if processes[1:]:
        shown = f"{min(counts)} warm runs in each of {len(processes)} processes, the worse one"
    every = np.concatenate(list(processes))
    return Figure(
        value=max(value(ms, statistic) for ms in processes),
        evidence="measured",
        how=f"{words} of {shown}, {how}",
        device=device,
        count=len(every),
        spread=float(np.subtract(*np.percentile(every, [75, 25])) / 2),
    )
