"""The counters that zeus reaches: differences that can be trusted, and reasons where there are
none."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from edgebudget.energy import zeus_counter
from edgebudget.energy.zeus_counter import ZeusCounter


def test_millijoules_become_joules_and_steps_back_are_discarded() -> None:
    shown: Iterator[float] = iter([1000.0, 4000.0, 3999.0])
    now: Iterator[float] = iter([0.0, 1.0, 2.0])
    counter = ZeusCounter("card", lambda: next(shown), lambda: next(now))
    first, second, third = counter.read(), counter.read(), counter.read()
    assert first is not None
    assert second is not None
    assert third is not None
    assert counter.joules(first, second) == 3.0
    assert counter.joules(second, third) is None
    assert counter.read() is None  # the driver does not answer any more


def test_without_zeus_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zeus", None)
    monkeypatch.setitem(sys.modules, "zeus.device", None)
    counter, why = zeus_counter.find("gpu")
    assert counter is None
    assert "edgebudget[energy]" in why


@pytest.mark.parametrize("family", ["gpu", "cpu"])
def test_a_counter_of_this_machine_counts_or_says_why_not(family: str) -> None:
    pytest.importorskip("zeus")
    counter, why = zeus_counter.find(family)
    if counter is None:
        assert why.startswith("zeus") or "no energy counter" in why
        return
    before, after = counter.read(), counter.read()
    assert before is not None
    assert after is not None
    assert after.values >= before.values
