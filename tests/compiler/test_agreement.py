"""Two engines' answers to the same samples: rounding is reported, another function is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgebudget.evaluate import Predictions
from edgebudget.verify import Agreement, agree
from edgebudget.workload import Array
from edgebudget_runtime.errors import TargetError

_STEP = 0.05
_SAMPLES = [0, 7, 19]


def _answers(seed: int = 0) -> Array:
    values = np.random.default_rng(seed).standard_normal((20, 6)) * 2
    return np.asarray(np.rint(values / _STEP) * _STEP, np.float32)


def _agreement(exact: Array, whole: Array) -> Agreement:
    labels = np.zeros(len(whole), np.int64)
    return agree(
        Predictions({"y": exact}, labels[_SAMPLES]),
        Predictions({"y": whole}, labels),
        _SAMPLES,
        {"y": _STEP},
    )


@given(steps=st.integers(0, 4))
def test_rounding_is_counted_in_steps(steps: int) -> None:
    whole = _answers()
    exact = whole[_SAMPLES].copy()
    exact[1, 3] += steps * _STEP
    found = _agreement(exact, whole)
    assert found.worst_steps == pytest.approx(steps, abs=0.01)


def test_another_function_is_refused() -> None:
    whole = _answers()
    exact = _answers(seed=1)[_SAMPLES]
    with pytest.raises(TargetError, match="'y' is") as caught:
        _agreement(exact, whole)
    assert caught.value.code == "EB631"


def test_answers_that_hardly_differ_may_be_a_few_steps_apart() -> None:
    whole = np.zeros((20, 2), np.float32)
    exact = whole[_SAMPLES] + 3 * _STEP
    found = _agreement(exact, whole)
    assert found.worst_steps == pytest.approx(3, abs=0.01)
