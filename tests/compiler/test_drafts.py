"""The search for a bound whose draft keeps a limit that is not on MACs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgebudget import drafts
from edgebudget.candidates import Reach
from edgebudget.events import ignore
from edgebudget.plan import Plan, Step
from edgebudget_runtime.budget import Budget
from edgebudget_runtime.cost import Cost, Figure
from edgebudget_runtime.errors import InfeasibleError

_ROOM = 0.97  # of a limit on time that a draft may use


@dataclass(frozen=True)
class _Proposal:
    plan: Plan
    reach: Reach


def _plan(amount: float, *more: str) -> Plan:
    config: Any = amount
    return Plan((Step("prune", config), *(Step(name, config) for name in more)))


def _latency(ms: float) -> Cost:
    unknown = Figure(value=None, evidence="unknown", how="", device="")
    known = Figure(value=ms, evidence="simulated", how="", device="")
    names = Cost.__dataclass_fields__
    return Cost(**{n: known if n == "latency_ms" else unknown for n in names})


class _Bench:
    """A model whose candidates have the given amounts, and a device that takes `floor` + amount."""

    def __init__(self, amounts: list[float], floor: float, limit: float) -> None:
        self.amounts, self.floor, self.limit = sorted(amounts), floor, limit
        self.tried: list[float] = []
        self.rough: list[bool] = []
        self.reach = Reach(macs=self.amounts[-1], scales=(), pruned=self.amounts[0] / 8)
        budget = Budget.parse(latency=f"{limit}ms")
        setting = SimpleNamespace(budget=budget, late=False, emit=ignore)
        self.job: Any = SimpleNamespace(setting=setting)

    def ms(self, amount: float) -> float:
        return self.floor + amount

    def propose(self, cap: float) -> Any:
        fits = [a for a in self.amounts if a <= cap]
        if not fits:
            raise InfeasibleError("EB402", f"no candidate keeps {cap}", hint="")
        return _Proposal(_plan(fits[-1]), self.reach)

    def noted(self, job: Any, cap: float, known: Any) -> Any:
        self.rough.append(known.rough)
        return self.propose(cap)

    def cost(self, plan: Plan) -> tuple[Cost, Plan]:
        amount: Any = plan.steps[0].config
        self.tried.append(amount)
        return _latency(self.ms(amount)), plan

    def run(self, monkeypatch: pytest.MonkeyPatch) -> float:
        monkeypatch.setattr(drafts, "_draft_cost", lambda job, plan, known, share: self.cost(plan))
        monkeypatch.setattr(drafts, "_propose", self.noted)
        first: Any = self.propose(math.inf)
        found: Any = drafts.fitted(self.job, first).plan.steps[0].config
        return float(found)


@given(
    steps=st.lists(st.floats(1.1, 3.0), min_size=0, max_size=12),
    floor=st.floats(0.0, 20.0),
    limit=st.floats(0.5, 60.0),
)
def test_what_fits_is_found_or_there_is_nothing(
    steps: list[float], floor: float, limit: float
) -> None:
    amounts = [1.0]
    for step in steps:
        amounts.append(amounts[-1] * step)
    bench = _Bench(amounts, floor, limit)
    with pytest.MonkeyPatch.context() as patch:
        try:
            found = bench.run(patch)
        except InfeasibleError:
            found = None
    if found is None:
        assert bench.ms(amounts[0]) > limit * _ROOM
        return
    assert len(bench.tried) <= 8
    assert bench.ms(found) <= limit * _ROOM or len(bench.tried) == 8


def test_a_bound_between_is_tried_before_refusing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A floor of time makes the line point below everything that can be built."""
    bench = _Bench([40.0, 100.0], floor=50.0, limit=95.0)
    assert bench.run(monkeypatch) == 40.0


def test_the_refusal_names_what_was_built(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = _Bench([40.0, 100.0], floor=50.0, limit=60.0)
    with pytest.raises(InfeasibleError, match="latency_ms 90 ") as caught:
        bench.run(monkeypatch)
    assert caught.value.code == "EB404"
    assert "smallest reachable" not in str(caught.value)


def test_a_draft_that_leaves_room_is_followed_by_a_larger(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time that falls faster than the bound makes the first step too long."""
    bench = _Bench([10.0, 50.0, 60.0, 70.0, 100.0], floor=0.0, limit=68.0)
    monkeypatch.setattr(bench, "ms", lambda a: a if a < 100 else 400.0)
    assert bench.run(monkeypatch) == 60.0


def test_a_dear_model_is_searched_whole_once_the_bound_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = _Bench([2e7, 4e7, 6e7, 8e7, 1e8], floor=1e7, limit=5e7)
    assert bench.run(monkeypatch) == 2e7
    assert bench.rough[-1] is False
    assert bench.rough.count(False) == 1
    bench = _Bench([2e6, 4e6, 6e6, 8e6, 1e7], floor=1e6, limit=5e6)
    bench.run(monkeypatch)
    assert not any(bench.rough)


@pytest.mark.parametrize(
    ("family", "integers_ms", "float_ms", "predicted_ms", "tried", "quantized"),
    [
        ("cpu", 9.0, 20.0, None, ["int8"], True),  # keeps the limit: float is not looked at
        ("cpu", 12.0, 8.0, None, ["int8", "float"], False),
        ("cpu", 12.0, 11.0, (3.0, 3.0), ["int8", "float"], False),  # nearer, if not near enough
        ("cpu", 12.0, 14.0, None, ["int8", "float"], True),
        ("cpu", 12.0, 8.0, (3.0, 6.0), ["int8"], True),  # the predictor knows better
        ("npu", 12.0, 8.0, None, ["int8"], True),
    ],
)
def test_a_draft_too_slow_in_8_bits_is_measured_in_float(
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    integers_ms: float,
    float_ms: float,
    predicted_ms: tuple[float, float] | None,
    tried: list[str],
    quantized: bool,
) -> None:
    seen = []

    def form(steps: Sequence[Step]) -> str:
        return "int8" if any(s.name == "quantize_int8" for s in steps) else "float"

    def timed(job: Any, steps: Sequence[Step], *_: Any) -> tuple[Cost, float | None]:
        assert all(s.name != "recover" for s in steps)
        seen.append(kind := form(steps))
        ms = {"int8": integers_ms, "float": float_ms}[kind]
        return _latency(ms), predicted_ms and predicted_ms[0]

    monkeypatch.setattr(drafts, "_timed_draft", timed)
    monkeypatch.setattr(drafts, "_lowered", lambda job, steps, folder: (None, Path(form(steps))))
    told = dict(zip(("int8", "float"), predicted_ms or (None, None), strict=True))
    monkeypatch.setattr(drafts, "_predicted", lambda job, file: told[file.name])
    budget = Budget.parse(latency="10ms")
    target = SimpleNamespace(family=family)
    setting = SimpleNamespace(budget=budget, emit=ignore, target=target)
    job: Any = SimpleNamespace(setting=setting)
    known = drafts._Known(Reach(macs=1.0, scales=(), pruned=1.0), rough=False)
    plan = _plan(1.0, "recover", "quantize_int8")
    cost, found = drafts._draft_cost(job, plan, known, 1.0)
    assert seen == tried
    assert ("quantize_int8" in [s.name for s in found.steps]) is quantized
    assert "recover" in [s.name for s in found.steps]
    assert bool(found.reasons) is not quantized
    assert cost.latency_ms.value == (integers_ms if quantized else float_ms)
