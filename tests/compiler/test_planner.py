"""What the planner considers, refuses and tightens; and steps that do not pay are taken back."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgebudget import drafts, harm, planner, target_registry
from edgebudget.cache import Cache
from edgebudget.candidates import Candidate, Reach, best, enumerate_points
from edgebudget.datasets import Arrays
from edgebudget.events import Event, Said
from edgebudget.facts import FACTS
from edgebudget.pipeline import Built, Setting, run_steps
from edgebudget.plan import Step
from edgebudget.program import PassRecord, Program, TensorSpec
from edgebudget.registry import get
from edgebudget.static_cost import static_cost
from edgebudget.target import Lowered
from edgebudget.tasks import make
from edgebudget.workload import Data, Workload
from edgebudget_runtime.budget import Budget
from edgebudget_runtime.cost import Cost, counted
from edgebudget_runtime.errors import InfeasibleError

reaches = st.builds(
    lambda macs, scales, pruned: Reach(macs, tuple(sorted(scales)), macs * pruned),
    st.floats(1e3, 1e12),
    st.lists(st.floats(0.05, 0.99), max_size=6, unique=True),
    st.floats(0.01, 1.0),
)


def cost_of(**values: float) -> Cost:
    return Cost(**{k: counted(v, "by hand") for k, v in values.items()})


@settings(deadline=None)
@given(found=reaches, room=st.floats(1.0, 100.0))
def test_an_original_that_fits_is_kept(found: Reach, room: float) -> None:
    assert enumerate_points(found, found.macs * room) == [("original", ())]


@settings(deadline=None)
@given(found=reaches, share=st.floats(0.0, 0.999))
def test_every_point_could_keep_the_bound_and_no_two_are_alike(found: Reach, share: float) -> None:
    cap = found.smallest + share * (found.macs - found.smallest)
    points = enumerate_points(found, cap)
    if found.macs <= cap:
        return
    assert points
    assert len({label for label, _ in points}) == len(points)
    for label, steps in points:
        names = [s.name for s in steps]
        assert names in (["scale_resolution"], ["prune_channels"],
                         ["scale_resolution", "prune_channels"])  # fmt: skip
        assert all(s.why for s in steps)
        chosen = {s.name: s.config for s in steps}
        scale = chosen["scale_resolution"].scale if "scale_resolution" in chosen else 1.0
        assert scale in (*found.scales, 1.0), label
        if "prune_channels" in chosen:
            assert chosen["prune_channels"].macs == math.floor(cap)
        else:
            assert scale**2 * found.macs <= cap * 1.02


@settings(deadline=None)
@given(found=reaches, share=st.floats(0.0, 0.999), weights=st.floats(0.0, 0.9))
def test_time_that_a_smaller_picture_does_not_save_is_pruned_too(
    found: Reach, share: float, weights: float
) -> None:
    """Weights take as long at every size: the square of the scale is too little."""
    whole, pruned = found.macs / 2, found.pruned / 2
    at = tuple(
        (x * (weights + (1 - weights) * s * s)) for s in found.scales for x in (whole, pruned)
    )
    scaled = tuple(zip(at[::2], at[1::2], strict=True))
    timed = replace(found, pruned=pruned, us=whole, scaled=scaled)
    cap = timed.smallest + share * (whole - timed.smallest)
    if whole <= cap:
        return
    for label, steps in enumerate_points(timed, cap):
        chosen = {s.name: s.config for s in steps}
        scale = chosen["scale_resolution"].scale if "scale_resolution" in chosen else 1.0
        have, least = timed.at(scale) if scale < 1.0 else (whole, pruned)
        if "prune_channels" in chosen:
            assert least <= cap * (1 + 1e-9), label
            assert chosen["prune_channels"].us == pytest.approx(cap, rel=1e-5)
        else:
            assert have <= cap * 1.02


def test_a_size_that_just_misses_is_also_pruned() -> None:
    found = Reach(300.0, (0.5,), 30.0)
    labels = [label for label, _ in enumerate_points(found, 75.0)]
    assert labels == ["scale 0.500", "prune", "scale 0.500 + prune"]


def test_the_best_candidate_is_the_nearest_that_keeps_the_bound() -> None:
    a = Candidate("a", (), 10.0, 1.0, distance=0.3)
    b = Candidate("b", (), 20.0, 1.0, distance=0.1)
    c = Candidate("c", (), 5.0, 1.0, distance=0.0, refused="no")
    for order in itertools.permutations([a, b, c]):
        assert best(list(order), 15.0) is a
        assert best(list(order), 25.0) is b
        assert best(list(order), 7.0) is None
    tried = replace(a, tried=0.2)
    assert best([tried, b], 25.0) is tried  # where some were trained, they are the ones in question


def setting(tmp_path: Path, target: str = "cpu", emit: Any = lambda _: None, **limits: Any) -> Any:
    spec = TensorSpec("x", (1, 3, 8, 8))
    x = np.random.default_rng(0).random((16, 3, 8, 8), dtype=np.float32)
    data = Data(calibration=Arrays("c", {"x": x}))
    workload = Workload(
        "tiny", Program("graph", None, (spec,), ("y",)), make("agreement"), data, {}, "0" * 64
    )
    return Setting(
        workload=workload,
        target=target_registry.get(target).spec,
        budget=Budget.parse(**limits),
        facts=FACTS,
        cost=static_cost,
        seed=0,
        cache=Cache(tmp_path / "cache"),
        emit=emit,
        key="k",
    )


@pytest.mark.parametrize(
    ("target", "limits", "code", "phrase"),
    [
        ("cpu", {"macs": 99}, "EB401", "smallest reachable point is 200 MACs"),
        ("cpu", {"params": 9}, "EB401", "smallest reachable point is 20 parameters"),
        ("cpu", {"size": "9B"}, "EB401", "smallest reachable point is 20 bytes"),
        ("cpu", {"energy": "1mJ"}, "EB403", "never satisfies a limit"),
        ("npu:hexagon/snapdragon-888", {"latency": "1ms"}, "EB403", "never satisfies a limit"),
        ("npu", {"energy": "1mJ"}, "EB403", "never satisfies a limit"),
    ],
)
def test_impossible_budgets_say_what_is_possible(
    tmp_path: Path, target: str, limits: dict[str, Any], code: str, phrase: str
) -> None:
    found = Reach(1000.0, (), 200.0, ("scale_resolution: the network takes no smaller input",))
    with pytest.raises(InfeasibleError, match=re.escape(phrase)) as e:
        planner.check_feasible(
            setting(tmp_path, target, **limits), found, cost_of(macs=1000, params=100)
        )
    assert e.value.code == code
    assert e.value.hint
    if "macs" in limits:
        assert "takes no smaller input" in e.value.what  # what binds


def test_a_budget_at_the_smallest_point_is_not_refused(tmp_path: Path) -> None:
    found = Reach(1000.0, (), 200.0)
    s = setting(tmp_path, macs=200, params=20, size="20B", latency="1ms")
    planner.check_feasible(s, found, cost_of(macs=1000, params=100))


@settings(deadline=None)
@given(floor=st.floats(1.0, 1e14))
def test_the_bound_that_a_refusal_names_is_never_too_low(floor: float) -> None:
    text = planner._rounded_up(floor)
    (limit,) = Budget.parse(macs=text).limits
    assert floor <= limit.bound * (1 + 1e-12)
    assert limit.bound <= floor * 1.001 + 1


@settings(deadline=None)
@given(floor=st.floats(0.0, 0.9), cap=st.floats(1e6, 1e12), goal=st.floats(0.05, 0.95))
def test_drafts_close_in_on_a_limit_whatever_part_of_a_cost_is_fixed(
    floor: float, cap: float, goal: float
) -> None:
    def cost(macs: float) -> float:  # of the original: 1
        return floor + (1.0 - floor) * macs / cap

    bound = floor + (1.0 - floor) * goal
    points = [(cap, cost(cap) / bound)]
    for _ in range(6):
        if points[-1][1] <= 1.0:
            break
        lower = drafts._lower(points)
        assert lower < points[-1][0]
        points.append((lower, cost(lower) / bound))
    assert points[-1][1] <= 1.0
    assert points[-1][0] >= 0.5 * goal * cap  # not far below what would have fitted


@dataclass
class Slow:
    """A target whose measurements are what the test says."""

    ratio: float | None
    spec: Any = field(default_factory=lambda: target_registry.get("cpu").spec)
    compared: int = 0

    def lower(self, program: Program, folder: Path, name: str) -> Lowered:
        file = folder / f"{name}.onnx"
        file.write_bytes(program.body.SerializeToString())
        return Lowered(file)

    def compare(self, file: Path, other: Path, inputs: object) -> float | None:
        assert file != other
        self.compared += 1
        return self.ratio


@pytest.fixture
def quantized(tiny: Path, tmp_path: Path) -> tuple[Setting, Built, Built, tuple[Step, ...]]:
    from edgebudget import graph

    s = setting(tmp_path)
    program = graph.program(onnx.load_model(str(tiny / "model.onnx")))
    s = replace(s, workload=replace(s.workload, program=program))
    steps = tuple(Step(n, get(n).config()) for n in ("clean_graph", "quantize_int8"))
    start = Built(program, (), "start")
    return s, start, run_steps(s, start, steps), steps


def undo(
    target: Slow, made: tuple[Setting, Built, Built, tuple[Step, ...]], **changes: Any
) -> tuple[Built, tuple[PassRecord, ...]]:
    s, start, built, steps = made
    return harm.undo_harm(replace(s, **changes), target, start, built, steps)  # type: ignore[arg-type]


def test_a_lossy_step_that_is_no_faster_is_taken_back(
    quantized: tuple[Setting, Built, Built, tuple[Step, ...]],
) -> None:
    heard: list[Event] = []
    built, undone = undo(Slow(1.1), quantized, emit=heard.append)
    assert [r.name for r in undone] == ["quantize_int8"]
    assert "no faster" in undone[0].undone
    assert [r.name for r in built.records] == ["clean_graph"]
    assert not any(n.op_type == "QuantizeLinear" for n in built.program.body.graph.node)
    assert any(isinstance(e, Said) and "quantize_int8 undone" in e.text for e in heard)


@pytest.mark.parametrize("ratio", [0.6, None])
def test_a_step_that_is_faster_or_cannot_be_measured_stays(
    quantized: tuple[Setting, Built, Built, tuple[Step, ...]], ratio: float | None
) -> None:
    target = Slow(ratio)
    built, undone = undo(target, quantized)
    assert built is quantized[2]
    assert undone == ()
    assert target.compared == 1  # the exact step before it was not put in question


def test_a_target_of_integers_keeps_quantization_whatever_it_costs(
    quantized: tuple[Setting, Built, Built, tuple[Step, ...]],
) -> None:
    target = Slow(2.0)
    target.spec = replace(target.spec, float_fallback=False)
    assert undo(target, quantized) == (quantized[2], ())
    assert target.compared == 0


def test_nothing_is_measured_after_the_time_limit_or_for_a_result_cut_short(
    quantized: tuple[Setting, Built, Built, tuple[Step, ...]],
) -> None:
    target = Slow(2.0)
    s, start, built, steps = quantized
    assert undo(target, quantized, deadline=0.0) == (built, ())
    assert undo(target, (s, start, replace(built, cut=True), steps))[1] == ()
    assert target.compared == 0
