"""Short trainings: who gets one, and that they decide."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from edgebudget import target_registry
from edgebudget.cache import Cache
from edgebudget.candidates import NEAR, Candidate, best, probe
from edgebudget.events import Event, Said, ignore
from edgebudget.facts import FACTS
from edgebudget.pipeline import Built, Setting
from edgebudget.plan import Step
from edgebudget.planner import original_answers, propose
from edgebudget.program import Program, TensorSpec
from edgebudget.recovery import recovery_step, rivals, settled
from edgebudget.registry import get
from edgebudget.static_cost import static_cost
from edgebudget.tasks import make
from edgebudget.workload import Data, Quality, Sample, Workload
from edgebudget_runtime.budget import Budget

_KINDS = ("scale_resolution", "prune_channels")


def _candidate(label: str, kind: str, distance: float, quality: float | None = None) -> Candidate:
    scored = None if quality is None else Quality("top1", quality, quality, quality, 100, {})
    return Candidate(label, (Step(kind, None),), 50.0, 1.0, distance=distance, quality=scored)


_drawn = st.lists(
    st.tuples(st.sampled_from(_KINDS), st.floats(0.0, 2.0), st.floats(0.1, 1.0)),
    max_size=5,
)


@given(drawn=_drawn, cap=st.sampled_from([40.0, 60.0]))
def test_rivals_are_of_different_kinds_and_of_about_the_same_quality(
    drawn: list[tuple[str, float, float]], cap: float
) -> None:
    candidates = [_candidate(f"c{i}", *row) for i, row in enumerate(drawn)]
    found = rivals(candidates, cap)
    if cap < 50.0 or any(c.distance is not None and c.distance <= NEAR for c in candidates):
        assert found == []
    assert len({c.steps[0].name for c in found}) == len(found) != 1
    values = [c.quality.value for c in found if c.quality is not None]
    assert all(v >= 0.9 * max(values) for v in values)


def test_what_is_clearly_worse_gets_no_training() -> None:
    a = _candidate("a", "prune_channels", 0.2, 0.83)
    b = _candidate("b", "scale_resolution", 0.6, 0.65)
    assert rivals([a, b], 60.0) == []
    assert rivals([a, _candidate("b", "scale_resolution", 1.3, 0.79)], 60.0) != []


def test_without_labels_the_output_error_tells_who_is_close() -> None:
    a = _candidate("a", "prune_channels", 0.2)
    assert rivals([a, _candidate("b", "scale_resolution", 0.5)], 60.0) == []
    assert len(rivals([a, _candidate("b", "scale_resolution", 0.35)], 60.0)) == 2


@dataclass(frozen=True)
class _Stripes:
    """Pictures whose class is the quarter that is bright."""

    count: int
    first: int = 0
    name: str = "stripes"

    def __len__(self) -> int:
        return self.count

    def sample(self, index: int) -> Sample:
        draw = np.random.default_rng(self.first + index)
        picture = 0.5 * draw.standard_normal((1, 16, 16)).astype(np.float32)
        label = index % 4
        picture[0, label * 4 : (label + 1) * 4] += 1.0
        return Sample({"x": picture}, np.asarray(label))

    def digest(self) -> str:
        return repr(self)


def _learned() -> nn.Module:
    torch.manual_seed(0)
    body = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d((4, 1)),
        nn.Flatten(),
        nn.Linear(128, 4),
    )
    data = _Stripes(128)
    samples = [data.sample(i) for i in range(len(data))]
    x = torch.stack([torch.from_numpy(s.inputs["x"]) for s in samples])
    y = torch.tensor([int(s.target) for s in samples if s.target is not None])
    optimizer = torch.optim.Adam(body.parameters(), 3e-3)
    for _ in range(30):
        optimizer.zero_grad()
        torch.autograd.backward(nn.functional.cross_entropy(body(x), y))
        optimizer.step()
    return body.eval()


@pytest.fixture(scope="module")
def original() -> nn.Module:
    return _learned()


def _setting(body: nn.Module, folder: Path, emit: Any, **more: Any) -> tuple[Setting, Built]:
    program = Program("module", body, (TensorSpec("x", (1, 1, 16, 16)),), ("y",))
    data = Data(calibration=_Stripes(64, 1000), train=_Stripes(128))
    workload = Workload("stripes", program, make("classification"), data, {}, "0" * 64)
    made = Setting(
        workload=workload,
        target=target_registry.get("cpu").spec,
        budget=Budget.parse(macs="400K"),
        facts=FACTS,
        cost=static_cost,
        seed=0,
        cache=Cache(folder / "cache"),
        emit=emit,
        key="k",
        **more,
    )
    return made, Built(program, (), "k")


def _pair(setting: Setting, start: Built) -> tuple[list[Candidate], Any]:
    reference = original_answers(setting, start, 1e6)
    resize, prune = get("scale_resolution"), get("prune_channels")
    steps = {
        "scale": Step(resize.name, resize.config(scale=0.5)),
        "prune": Step(prune.name, prune.config(macs=300_000, candidates=2)),
    }
    return [probe(setting, start, n, (s,), reference) for n, s in steps.items()], reference


def test_candidates_that_nothing_tells_apart_are_trained_and_the_nearest_then_wins(
    original: nn.Module, tmp_path: Path
) -> None:
    heard: list[Event] = []
    setting, start = _setting(original, tmp_path, heard.append)
    (scale, prune), reference = _pair(setting, start)
    assert scale.distance is not None
    assert prune.distance is not None
    alike = Quality("top1", 0.9, 0.9, 0.9, 64, {})
    both = [
        replace(scale, distance=0.5, quality=alike),
        replace(prune, distance=0.4, quality=alike),
    ]
    assert best(both, 1e9) is both[1]
    tried = settled(setting, start, both, 1e9, reference)
    errors = {c.label: c.tried for c in tried}
    assert all(e is not None and e < 2.0 for e in errors.values())
    winner = best(tried, 1e9)
    assert winner is not None
    assert winner.tried == min(e for e in errors.values() if e is not None)
    said = [e.text for e in heard if isinstance(e, Said)]
    assert sum("steps of training, to compare" in t for t in said) == 2
    again = settled(setting, start, both, 1e9, reference)
    assert {c.label: c.tried for c in again} == errors


def test_after_the_time_limit_nobody_is_trained(original: nn.Module, tmp_path: Path) -> None:
    heard: list[Event] = []
    setting, start = _setting(original, tmp_path, heard.append, deadline=0.0)
    both = [
        _candidate("a", "prune_channels", 0.4, 0.9),
        _candidate("b", "scale_resolution", 0.5, 0.9),
    ]
    reference = original_answers(setting, start, 1e6)
    assert settled(setting, start, both, 60.0, reference) == both
    assert any(isinstance(e, Said) and "time limit" in e.text for e in heard)


def test_a_rough_proposal_searches_little_and_trains_nobody(
    original: nn.Module, tmp_path: Path
) -> None:
    setting, start = _setting(original, tmp_path, ignore)
    found = propose(setting, start, rough=True)
    prunes = [s for c in found.candidates for s in c.steps if s.name == "prune_channels"]
    assert prunes
    assert all(s.config.search_macs == 3e11 and s.config.candidates == 3 for s in prunes)
    assert all(c.tried is None for c in found.candidates)
    whole = propose(setting, start, found=found.reach)
    assert recovery_step(setting, whole.candidates[0]) is not None
    assert all(
        s.config.search_macs > 3e11
        for c in whole.candidates
        for s in c.steps
        if s.name == "prune_channels"
    )
