"""An allowance is never overdrawn by asking first, and no clock can cheat it."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgebudget_runtime.errors import UsageError
from edgebudget_runtime.token_bucket import TokenBucket

STEPS = st.lists(st.tuples(st.floats(-5, 20), st.floats(0, 30)), max_size=60)


@given(STEPS, st.floats(0, 10), st.floats(1, 50))
def test_what_is_taken_was_earned(
    steps: list[tuple[float, float]], rate: float, capacity: float
) -> None:
    bucket = TokenBucket(rate, capacity, now_s=0.0)
    now = earned = taken = 0.0
    jumps = 0
    for gap, amount in steps:
        jumps += now + gap < now
        now += gap
        earned += max(gap, 0.0) * rate
        taken += amount if bucket.take(amount, now) else 0.0
        assert 0.0 <= bucket.level(now) <= capacity
        assert taken <= capacity + earned + 1e-6
    assert bucket.jumps == jumps


def test_a_clock_that_jumps() -> None:
    bucket = TokenBucket(1.0, 10.0, level=0.0, now_s=1000.0)
    assert bucket.level(5.0) == 0.0  # back: nothing earned, and time goes on from here
    assert bucket.level(7.0) == 2.0
    assert bucket.level(math.nan) == 2.0
    assert bucket.level(1e12) == 10.0  # ahead: no more than it holds
    assert bucket.jumps == 2


def test_the_reserve_is_kept_and_debts_are_earned_back() -> None:
    bucket = TokenBucket(2.0, 10.0, reserve=4.0)
    assert bucket.allowance(0.0) == 6.0
    assert bucket.fill(0.0) == 1.0
    assert not bucket.take(6.5, 0.0)
    assert bucket.take(6.0, 0.0)
    assert bucket.fill(0.0) == 0.0
    bucket.spend(8.0, 0.0)
    assert bucket.level(0.0) == -4.0
    assert bucket.allowance(3.0) == 0.0
    assert bucket.allowance(5.0) == 2.0


@pytest.mark.parametrize("amount", [-1.0, math.nan, math.inf])
def test_no_amount_that_is_none_is_taken(amount: float) -> None:
    bucket = TokenBucket(1.0, 10.0)
    assert not bucket.take(amount, 0.0)
    assert bucket.level(0.0) == 10.0


@pytest.mark.parametrize(
    ("rate", "capacity", "level", "reserve"),
    [(-1, 1, None, 0), (1, 0, None, 0), (1, 1, 2, 0), (1, 1, None, 1), (math.nan, 1, None, 0)],
)
def test_settings_out_of_range(
    rate: float, capacity: float, level: float | None, reserve: float
) -> None:
    with pytest.raises(UsageError, match="EB182"):
        TokenBucket(rate, capacity, level=level, reserve=reserve)
