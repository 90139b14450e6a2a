"""Bounds hold with the stated frequency, follow slowdowns, and cost constant memory."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgebudget_runtime.latency_bound import Latencies, LatencyBound

PATHS = (("a",), ("a", "b"), ("c",))
USUAL = {"a": [1.0] * 220, "b": [2.0] * 220, "c": [5.0] * 220}


def test_no_history_bounds_nothing() -> None:
    assert LatencyBound().value == math.inf
    found = Latencies(PATHS, {"a": [1.0]})
    assert found.whole_ms[0] < math.inf
    assert found.whole_ms[1] == found.rest_ms(1, 1) == math.inf
    assert found.segment_ms("b") is None


@given(st.lists(st.floats(0.01, 1e4), min_size=1, max_size=120), st.integers(1, 40))
def test_the_ring_holds_the_last_ones_and_their_order_statistic(
    values: list[float], size: int
) -> None:
    bound = LatencyBound(size=size, target=0.1)
    for value in values:
        bound.add(value)
    last = values[-size:]
    assert bound.history() == tuple(last)
    assert bound.median() == sorted(last)[len(last) // 2]
    assert bound.value in [*last, max(last) * 1.25]
    if len(last) < 9:  # ceil(10 x 0.9) = 9 is the first rank that exists
        assert bound.value == max(last) * 1.25


def test_the_rank_is_the_conformal_one() -> None:
    bound = LatencyBound(size=1000, target=0.01)
    for value in range(1, 99):
        bound.add(float(value))
    assert bound.value == 98 * 1.25  # ceil(99 x 0.99) = 99 values are needed
    bound.add(99.0)
    assert bound.value == 99.0
    bound.add(100.0)
    assert bound.value == 125.0  # it was above its bound: alpha went down, to be safer
    for _ in range(1000):
        bound.add(50.0)
    assert bound.value == 50.0


@pytest.mark.parametrize("sigma", [0.05, 0.4])
def test_misses_come_with_the_target_frequency(sigma: float) -> None:
    rng = np.random.default_rng(0)
    bound = LatencyBound(target=0.01)
    missed = 0
    for value in rng.lognormal(0.0, sigma, 20_000):
        missed += float(value) > bound.value
        bound.add(float(value))
    assert 0.004 <= missed / 20_000 <= 0.013


def test_misses_stay_rare_when_the_device_slows_down_in_bursts() -> None:
    rng = np.random.default_rng(1)
    found = Latencies(PATHS, USUAL)
    missed = 0
    for i in range(20_000):
        slow = 2.5 if i % 500 > 350 else 1.0
        ms = float(slow * rng.lognormal(0.0, 0.1))
        missed += ms > found.whole_ms[0] * found.slowdown
        found.observe("a", ms)
    assert missed / 20_000 <= 0.015


def test_a_burst_raises_every_bound_and_passes() -> None:
    found = Latencies(PATHS, USUAL)
    before = found.whole_ms[2] * found.slowdown
    for _ in range(3):
        found.observe("a", 3.0)
    during = found.whole_ms[2] * found.slowdown
    assert during > 2 * before
    for _ in range(60):
        found.observe("a", 1.0)
    assert found.whole_ms[2] * found.slowdown < 1.3 * before
    assert found.drifts == 0


@pytest.mark.parametrize("factor", [2.0, 0.5])
def test_a_slowdown_that_stays_becomes_the_usual_speed(factor: float) -> None:
    heard: list[float] = []
    found = Latencies(PATHS, USUAL, on_drift=heard.append)
    for _ in range(700):
        found.observe("a", factor)
        found.observe("b", 2 * factor)
    assert found.drifts == 1
    assert heard == [pytest.approx(factor, rel=0.1)]
    assert found.slowdown == pytest.approx(1.0, abs=0.1)
    assert found.segment_ms("b") == pytest.approx(2 * factor, rel=0.1)
    assert found.whole_ms[1] * found.slowdown == pytest.approx(3 * factor, rel=0.3)


def test_impossible_durations_are_counted_and_change_nothing() -> None:
    found = Latencies(PATHS, USUAL)
    before = (list(found.whole_ms), found.slowdown, found.history())
    for ms in (-1.0, 0.0, math.nan, math.inf, -math.inf, 3_600_000.0, 5_000.0):
        found.observe("a", ms)
    found.observe_path(("a", "b"), -5.0, 1.0)
    assert found.discarded == 8
    assert (list(found.whole_ms), found.slowdown, found.history()) == before


def test_a_path_is_bounded_by_its_parts_until_it_has_a_history_of_its_own() -> None:
    found = Latencies(PATHS, USUAL)
    assert found.whole_ms[1] == pytest.approx(found.whole_ms[0] + found.rest_ms(1, 1))
    for _ in range(220):
        found.observe_path(("a", "b"), 2.6, 1.0)
    assert found.whole_ms[1] == 2.6
    assert found.rest_ms(1, 0) == 2.6


def test_parts_that_are_late_independently_add_in_squares() -> None:
    rng = np.random.default_rng(5)
    drawn = {s: [float(x) for x in rng.lognormal(0.0, 0.1, 250)] for s in "ab"}
    found = Latencies((("a",), ("b",), ("a", "b")), drawn)
    excess = [found.whole_ms[i] - np.median(drawn[s]) for i, s in enumerate("ab")]
    assert found.whole_ms[2] == pytest.approx(2.0 + math.hypot(*map(float, excess)), rel=0.03)


def test_what_is_kept_begins_the_next_time_as_it_was() -> None:
    rng = np.random.default_rng(6)
    first = Latencies(PATHS, USUAL)
    for _ in range(2000):
        first.observe("a", float(rng.lognormal(0.0, 0.2)))
    kept = first.history()
    second = Latencies(PATHS, kept)
    assert second.segment_ms("a") == pytest.approx(1.0)
    assert second.whole_ms[0] == pytest.approx(first.whole_ms[0] * first.slowdown, rel=0.3)
    for segment, samples in Latencies(PATHS, second.history()).history().items():
        assert samples == pytest.approx(kept[segment])


def test_the_reach_is_the_least_bound_of_what_is_as_good() -> None:
    rng = np.random.default_rng(2)
    found = Latencies(PATHS, USUAL)
    for _ in range(300):
        segment = "abc"[rng.integers(3)]
        found.observe(segment, USUAL[segment][0] * float(rng.lognormal(0, 0.5)))
        assert found.reach_ms == [min(found.whole_ms[i:]) for i in range(3)]


def test_a_segment_without_calibration_learns_what_is_usual() -> None:
    found = Latencies(PATHS)
    for _ in range(16):
        found.observe("a", 4.0)
    assert found.segment_ms("a") == 4.0
    assert found.slowdown == 1.0


def test_equal_observations_give_equal_bounds() -> None:
    def run() -> tuple[list[float], float]:
        rng = np.random.default_rng(3)
        found = Latencies(PATHS, USUAL)
        for _ in range(500):
            found.observe("b", float(2 * rng.lognormal(0, 0.3)))
            found.observe_path(("a", "b"), float(3 * rng.lognormal(0, 0.3)), found.slowdown)
        return list(found.whole_ms), found.slowdown

    assert run() == run()


def test_memory_does_not_grow_with_history() -> None:
    found = Latencies(PATHS, USUAL)

    def serve(count: int) -> None:
        for i in range(count):
            found.observe("a", 1.0 + (i % 7) / 10)
            found.observe_path(("a",), 1.0 + (i % 5) / 10, 1.0)

    serve(2000)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        serve(1000)
        middle = tracemalloc.get_traced_memory()[0]
        serve(4000)
        after = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert middle - before < 40_000  # the rings' own numbers are replaced once
    assert abs(after - middle) < 2_000


def test_what_is_seen_while_the_device_is_busy_forbids_nothing_in_calm() -> None:
    found = Latencies(PATHS, USUAL)
    calm = found.whole_ms[1]
    for _ in range(100):
        found.observe("a", 9.0)
        found.observe_path(("a",), 9.0, found.slowdown, found.busy)
    assert found.busy
    assert found.whole_ms[1] * found.slowdown > 3 * calm
    for _ in range(600):
        found.observe("a", 1.0)
    assert not found.busy
    assert found.whole_ms[1] == pytest.approx(calm)


def test_what_was_too_slow_once_and_has_not_run_since_is_forgotten() -> None:
    found = Latencies(PATHS, USUAL)
    before = found.whole_ms[1]
    found.observe("b", 40.0)  # a stall
    for _ in range(200):
        found.observe("a", 1.0)
    found.observe("b", 40.0)
    for _ in range(200):
        found.observe("a", 1.0)
    assert found.whole_ms[1] > 10 * before
    for _ in range(1100):
        found.observe("a", 1.0)
        found.observe_path(("a",), 1.0, found.slowdown, found.busy)
    assert found.whole_ms[1] < 2 * before
