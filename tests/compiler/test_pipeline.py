"""The pipeline holds passes to their contracts, seeds by content, and resumes."""

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgebudget import registry
from edgebudget.cache import Cache
from edgebudget.events import Event, Said
from edgebudget.pipeline import Built, Setting, run_module_steps, run_steps
from edgebudget.plan import Step
from edgebudget.program import Context, Note, Pass, PassResult, Program, TensorSpec
from edgebudget.target import TargetSpec
from edgebudget.workload import Data, Workload
from edgebudget_runtime.budget import Budget
from edgebudget_runtime.cost import Cost, counted
from edgebudget_runtime.errors import PassError

SPEC = TargetSpec(
    name="cpu",
    family="cpu",
    engine="onnxruntime-cpu",
    device="test",
    channel_multiple=8,
    activation_dtypes=("uint8",),
    weight_dtypes=("int8",),
    float_fallback=True,
    max_fallback=None,
)


@dataclass(frozen=True, slots=True)
class Factor:
    factor: float = 0.5


def scale(program: Program, config: Factor, ctx: Context) -> PassResult:
    CALLS.append(ctx.seed)
    assert ctx.data.evaluation is None
    if config.factor == 0:
        raise ZeroDivisionError("a bug in a pass")
    weight = program.body.graph.initializer[0]
    value = numpy_helper.to_array(weight) * np.float32(config.factor)
    weight.CopyFrom(numpy_helper.from_array(value, weight.name))
    return PassResult(program, (Note("w", f"x{config.factor}"),))


CALLS: list[int] = []
SCALE = Pass("scale", scale, Factor, "graph", "a toy", requires=frozenset({"finite"}))


def finite(program: Program) -> str | None:
    value = numpy_helper.to_array(program.body.graph.initializer[0])
    return None if np.isfinite(value).all() else "w is not finite"


def toy(value: float = 2.0) -> Program:
    w = numpy_helper.from_array(np.full((4, 4), value, np.float32), "w")
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], [w])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return Program("graph", model, (TensorSpec("x", (1, 4)),), ("y",), frozenset({"finite"}))


class Silent:
    kind: Any = "custom"
    metric = "none"
    needs_reference = True

    def quality(self, outputs: Any, targets: Any) -> Any:
        raise AssertionError("the pipeline never scores")


@pytest.fixture
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setting:
    CALLS.clear()
    monkeypatch.setattr(registry, "get", lambda name: SCALE)
    events: list[Event] = []
    program = toy()
    return Setting(
        workload=Workload("toy", program, Silent(), Data(), {}, "0" * 64),
        target=SPEC,
        budget=Budget(),
        facts={"finite": finite},
        cost=lambda p: Cost(size_bytes=counted(p.body.ByteSize(), "test")),
        seed=0,
        cache=Cache(tmp_path / "cache", events.append),
        emit=events.append,
        key="start",
    )


def go(setting: Setting, program: Program, *factors: float) -> Built:
    steps = [Step("scale", Factor(f)) for f in factors]
    return run_steps(setting, Built(program, (), setting.key), steps)


def weight(built: Built) -> float:
    return float(numpy_helper.to_array(built.program.body.graph.initializer[0])[0, 0])


def test_steps_apply_in_order_and_are_recorded(setting: Setting) -> None:
    built = go(setting, toy(), 0.5, 8.0)
    assert weight(built) == 8.0
    assert [r.config["factor"] for r in built.records] == [0.5, 8.0]
    assert built.records[0].did[0].what == "x0.5"


def test_finished_steps_come_from_the_cache_with_equal_results(setting: Setting) -> None:
    first = go(setting, toy(), 0.5, 8.0)
    calls = len(CALLS)
    again = go(setting, toy(), 0.5, 8.0, 3.0)
    assert len(CALLS) == calls + 1  # only the new step ran
    assert weight(again) == 24.0
    assert [replace(r, seconds=0.0) for r in again.records[:2]] == [
        replace(r, seconds=0.0) for r in first.records
    ]


def test_what_a_probe_has_built_is_not_built_again_and_stays_as_it_was(setting: Setting) -> None:
    begun = Built(toy(), (), setting.key)
    steps = [Step("scale", Factor(f)) for f in (0.5, 8.0)]
    probed = run_module_steps(setting, begun, steps)
    scale(probed.program, Factor(0.1), SimpleNamespace(seed=0, data=Data()))  # type: ignore[arg-type]
    calls = len(CALLS)
    again = run_module_steps(setting, Built(toy(), (), setting.key), [*steps, steps[0]])
    assert len(CALLS) == calls + 1  # only the new step ran
    assert weight(again) == 2.0 * 0.5 * 8.0 * 0.5
    assert again.records[:2] == probed.records


def test_a_damaged_entry_is_done_again_and_said(setting: Setting, tmp_path: Path) -> None:
    go(setting, toy(), 0.5)
    for file in (tmp_path / "cache").rglob("model.onnx"):
        file.write_bytes(file.read_bytes()[:20])
    heard: list[Event] = []
    loud = replace(setting, emit=heard.append, cache=Cache(tmp_path / "cache", heard.append))
    assert weight(go(loud, toy(), 0.5)) == 1.0
    assert any(isinstance(e, Said) and "damaged" in e.text for e in heard)


def test_inserting_a_step_leaves_the_draws_of_others_alone(setting: Setting) -> None:
    alone = go(setting, toy(), 0.5).records[0].seed
    other = go(replace(setting, key="x"), toy(), 2.0, 0.5).records[1].seed
    twice = go(replace(setting, key="y"), toy(), 0.5, 0.5).records
    assert alone == other == twice[0].seed != twice[1].seed


def test_precondition_names_the_offender(setting: Setting) -> None:
    with pytest.raises(PassError, match=r"EB301.*finite.*w is not finite"):
        go(setting, toy(float("inf")), 0.5)


def test_silent_damage_is_caught_at_the_pass_that_did_it(setting: Setting) -> None:
    with pytest.raises(PassError, match=r"EB302.*must leave true 'finite'"):
        go(setting, toy(), float("inf"))


def test_a_crash_names_the_pass_and_what_came_before(setting: Setting) -> None:
    with pytest.raises(PassError, match=r"EB303.*crashed after scale: ZeroDivisionError"):
        go(setting, toy(), 0.5, 0.0)


def test_cached_model_is_a_valid_onnx_file(setting: Setting, tmp_path: Path) -> None:
    go(setting, toy(), 0.5)
    (file,) = (tmp_path / "cache").rglob("model.onnx")
    onnx.checker.check_model(onnx.load_model(str(file)), full_check=True)
