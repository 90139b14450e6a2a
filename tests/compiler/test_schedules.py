from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgebudget import schedules
from edgebudget_runtime.errors import UsageError


@given(
    name=st.sampled_from(schedules.NAMES),
    steps=st.integers(2, 3000),
    share=st.floats(0.0, 0.5),
)
def test_factor_stays_in_the_unit_interval_falls_after_warm_up_and_ends_near_zero(
    name: str, steps: int, share: float
) -> None:
    warmup = int(share * steps)
    values = [schedules.factor(name, s, steps, warmup) for s in range(steps)]
    assert all(0.0 <= v <= 1.0 for v in values)
    after = values[warmup:]
    assert all(a >= b for a, b in pairwise(after))
    assert all(a < b for a, b in pairwise(values[:warmup]))
    assert after[0] == 1.0
    assert schedules.factor(name, steps, steps, warmup) == pytest.approx(0.0, abs=1e-12)


@given(st.floats(0.0, 1.0))
def test_rex_lies_above_linear_and_wsd_is_flat_first(x: float) -> None:
    assert schedules.rex(x) >= schedules.linear(x) - 1e-12
    assert schedules.wsd(x) == 1.0 or x > 0.79


def test_unknown_schedule_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="EB154"):
        schedules.factor("rexx", 0, 10)
