"""How sure an answer is: one row alone, in a batch, and as arrays compute it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgebudget_runtime.confidence import row_signals, signal
from edgebudget_runtime.elastic import Signal

KINDS: tuple[Signal, ...] = ("max_softmax", "energy")
scores = st.lists(
    st.lists(st.floats(-80, 80, width=32), min_size=4, max_size=4), min_size=1, max_size=5
)


@given(scores, st.sampled_from(KINDS), st.floats(0.2, 5.0))
def test_rows_are_what_arrays_give(rows: list[list[float]], kind: Signal, heat: float) -> None:
    given = np.array(rows, np.float32)
    found = row_signals(given, kind, heat)
    np.testing.assert_allclose(found, signal(given, kind, heat), rtol=1e-12, atol=1e-12)
    assert found == [row_signals(given[i : i + 1], kind, heat)[0] for i in range(len(given))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_row_that_is_no_answer_is_never_sure(kind: Signal, bad: float, place: int) -> None:
    row = [1.0, 2.0, 3.0]
    row[place] = bad
    assert row_signals(np.array([row], np.float32), kind, 1.0) == [-math.inf]
    assert signal(np.array([row], np.float32), kind, 1.0).tolist() == [-math.inf]


@pytest.mark.parametrize("kind", KINDS)
def test_a_class_that_is_ruled_out_counts_for_nothing(kind: Signal) -> None:
    with_it = row_signals(np.array([[1.0, -math.inf, 3.0]], np.float32), kind, 1.0)
    assert with_it == row_signals(np.array([[1.0, 3.0]], np.float32), kind, 1.0)


def test_many_classes_go_through_arrays() -> None:
    given = np.random.default_rng(0).normal(size=(2, 1000)).astype(np.float32)
    assert row_signals(given, "max_softmax", 1.0) == signal(given, "max_softmax", 1.0).tolist()
