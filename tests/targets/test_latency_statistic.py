"""Percentiles are proven by a bound that is rarely below the truth, in a process of its own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binom

from edgebudget import latency_statistic as ls
from edgebudget import target_registry
from edgebudget_runtime.budget import Limit, Statistic
from edgebudget_runtime.errors import TargetError
from edgebudget_targets import _timing

Array = np.ndarray[Any, Any]


@pytest.mark.parametrize("quantile", [0.9, 0.95, 0.99])
@pytest.mark.parametrize("count", [299, 300, 777, 3000])
def test_the_rank_is_the_smallest_with_enough_confidence(count: int, quantile: float) -> None:
    k = ls.rank(count, quantile)
    assert k == count or binom.cdf(k - 1, count, quantile) >= ls.CONFIDENCE
    assert binom.cdf(k - 2, count, quantile) < ls.CONFIDENCE


def test_the_bound_covers_the_true_percentile_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    truth = float(np.exp(2.3263478740408408))  # p99 of a log-normal latency
    held = [ls.value(rng.lognormal(size=400), "p99") >= truth for _ in range(2000)]
    assert 0.94 <= np.mean(held) <= 1.0
    plain = [np.percentile(rng.lognormal(size=400), 99) >= truth for _ in range(2000)]
    assert np.mean(plain) < 0.7  # what an unbounded percentile is worth


def test_fewest_runs() -> None:
    assert ls.least_runs("p99") == 299
    assert ls.least_runs("p90") == 29
    assert ls.least_runs("p50") == ls.least_runs("mean") == 1


def test_one_statistic_proves_every_limit() -> None:
    def limits(*statistics: Statistic) -> list[Limit]:
        return [Limit("latency_ms", 1.0, s) for s in statistics]

    assert ls.wanted([Limit("macs", 1.0)]) is None
    assert ls.wanted(limits("mean")) == "mean"
    assert ls.wanted(limits("p50", "p99", "p95")) == "p99"
    assert ls.wanted(limits("p99", "mean")) is None


def test_a_percentile_is_measured_in_two_processes(qdq_file: Path, batch: Array) -> None:
    cpu = target_registry.get("cpu")
    found = {s: cpu.latency(qdq_file, {"x": batch}, 5, statistic=s) for s in ("p50", "p99")}
    assert found["p99"].count >= 600
    assert "95% upper bound of p99" in found["p99"].how
    assert "2 processes" in found["p99"].how
    assert found["p50"].value is not None
    assert found["p99"].value is not None
    assert found["p99"].evidence == "measured"
    assert "1 thread" in found["p99"].how


def test_the_process_measures_the_file_it_is_given(tmp_path: Path, batch: Array) -> None:
    with pytest.raises(TargetError, match=r"EB650.*cannot load"):
        _timing.timed_apart(
            tmp_path / "none.onnx", {"x": batch}, threads=1, repeats=1, statistic="p50"
        )


def test_a_process_that_dies_is_named(
    qdq_file: Path, batch: Array, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = (sys.executable, "-c", "import os; os.kill(os.getpid(), 9)")
    monkeypatch.setattr(_timing, "COMMAND", killed)
    with pytest.raises(TargetError, match=r"EB650.*status -9"):
        _timing.timed_apart(qdq_file, {"x": batch}, threads=1, repeats=1, statistic="p50")
