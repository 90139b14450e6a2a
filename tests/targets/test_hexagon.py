"""The NPU target through the vendor's emulator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from edgebudget import target_registry
from edgebudget.program import Program
from edgebudget_runtime.errors import (
    ArtifactError,
    TargetError,
    UnsupportedError,
    UsageError,
)
from edgebudget_targets._qnn_emulator import Limits
from edgebudget_targets.onnxruntime_qnn import HexagonTarget

Array = np.ndarray[Any, Any]

pytest.importorskip(
    "onnxruntime_qnn", reason='needs the NPU emulator: pip install "edgebudget[qnn]"'
)


def _hexagon(device: str = "snapdragon-8-gen3", limits: Limits | None = None) -> HexagonTarget:
    return HexagonTarget(target_registry.get(f"npu:hexagon/{device}").spec, limits)


def _output_step(file: Path) -> float:
    graph = onnx.load(file).graph
    last = next(n for n in graph.node if "y" in n.output)
    scale = next(w for w in graph.initializer if w.name == last.input[1])
    return float(numpy_helper.to_array(scale))


def test_a_conv_net_is_wholly_on_the_npu(qdq_file: Path) -> None:
    placement = _hexagon().placement(qdq_file)
    nodes = onnx.load(qdq_file).graph.node
    assert [(n.name, n.op) for n in placement.nodes] == [(n.name, n.op_type) for n in nodes]
    assert placement.fallback == ()
    assert placement.nodes[0].processor == "npu"


def test_a_refused_operator_is_listed_with_its_neighbours_and_the_reason(erf_file: Path) -> None:
    fallback = _hexagon().placement(erf_file).fallback
    assert [n.op for n in fallback] == ["DequantizeLinear", "Erf", "QuantizeLinear"]
    assert fallback[1].name == "extra"
    assert all("`Erf` are not supported" in n.why and "`extra`" in n.why for n in fallback)
    assert "Gelu" in fallback[1].why  # what to use instead


def test_emulator_agrees_with_the_cpu_within_one_output_step(qdq_file: Path, batch: Array) -> None:
    target = _hexagon()
    fast = target.open(qdq_file).run({"x": batch})["y"]
    exact = target.open(qdq_file, exact=True).run({"x": batch})["y"]
    assert exact.shape == (3, 10)
    step = _output_step(qdq_file)
    assert np.abs(exact - fast).max() <= 1.001 * step
    assert np.abs(exact).max() > 10 * step  # not trivially equal


def test_processes_share_the_inputs_in_order(qdq_file: Path, batch: Array) -> None:
    one = _hexagon().open(qdq_file, exact=True).run({"x": batch})["y"]
    two = _hexagon(limits=Limits(workers=2)).open(qdq_file, exact=True).run({"x": batch})["y"]
    np.testing.assert_array_equal(one, two)


def test_the_compiled_context_loads_and_computes_the_same(
    qdq_file: Path, tmp_path: Path, batch: Array
) -> None:
    target, program = _hexagon(), Program("graph", onnx.load(qdq_file), (), ())
    one = target.lower(program, tmp_path / "a", "main")
    two = target.lower(program, tmp_path / "b", "main")
    (context,) = one.extra
    assert context.name == "main_ctx.onnx"
    assert "SM8650" in one.notes[0]
    assert [n.op_type for n in onnx.load(context).graph.node] == ["EPContext"]
    assert context.read_bytes() == two.extra[0].read_bytes()
    assert sorted(p.name for p in context.parent.iterdir()) == ["main.onnx", "main_ctx.onnx"]
    np.testing.assert_array_equal(
        target.open(context, exact=True).run({"x": batch[:1]})["y"],
        target.open(one.file, exact=True).run({"x": batch[:1]})["y"],
    )


def test_a_fatal_operator_is_an_error_that_names_it(prelu16_file: Path, tmp_path: Path) -> None:
    target = _hexagon()
    with pytest.raises(TargetError, match=r"EB612.*SM8650") as caught:  # the engine's own word
        target.placement(prelu16_file)
    assert "PRelu" in caught.value.hint
    with pytest.raises(UnsupportedError, match=r"EB248.*PRelu.*prelu") as known:
        target.lower(Program("graph", onnx.load(prelu16_file), (), ()), tmp_path, "main")
    assert "LeakyRelu" in known.value.hint
    assert list(tmp_path.iterdir()) == []


def test_latency_is_the_compilers_estimate_or_modelled(
    qdq_file: Path, erf_file: Path, batch: Array
) -> None:
    car = _hexagon("sa8255")
    figure = car.latency(qdq_file, {"x": batch}, 3)
    assert figure.evidence == "simulated"
    found = car.estimate(qdq_file)
    assert figure.value == found["us"] / 1e3
    assert found["us_low"] <= found["us"] <= found["us_high"]
    assert found["us"] <= car.emulator.estimate(qdq_file)["us"]  # never worse than the defaults
    assert found["dram_bytes"] >= batch[0].nbytes  # the float input is read from DRAM at least
    assert car.traffic(qdq_file).value == found["dram_bytes"]
    assert car.compare(qdq_file, qdq_file, {"x": batch}) == 1.0
    phone = _hexagon().latency(qdq_file, {"x": batch}, 3)
    assert phone.evidence == "modelled"
    assert "sa8255, of generation v73: this SoC is a v75" in phone.how
    assert _hexagon().estimate(qdq_file) == {}
    assert _hexagon().traffic(qdq_file).value is None
    old = _hexagon("snapdragon-888").latency(qdq_file, {"x": batch}, 3)
    assert (old.value, old.evidence) == (None, "unknown")
    for target in (car, _hexagon()):  # Erf is not on the NPU, and was never fitted
        mixed = target.latency(erf_file, {"x": batch}, 3)
        assert (mixed.value, mixed.evidence) == (None, "unknown")


def test_no_setting_of_the_compiler_is_ignored_in_silence(qdq_file: Path) -> None:
    emulator = _hexagon("sa8255").emulator
    for wrong in ({"vtcm_mb": 3}, {"vtcm": 4}):
        with pytest.raises(UsageError, match="EB145"):
            emulator.estimate(qdq_file, wrong)
    assert emulator.estimate(qdq_file, {"vtcm_mb": 1})["us"] > 0


def test_several_socs_share_one_file_and_each_is_checked(
    qdq_file: Path, erf_file: Path, tmp_path: Path, batch: Array
) -> None:
    target = target_registry.get("npu:hexagon/snapdragon-8-gen1+snapdragon-8-elite-gen5")
    lowered = target.lower(Program("graph", onnx.load(qdq_file), (), ()), tmp_path, "main")
    (context,) = lowered.extra
    (node,) = onnx.load(context).graph.node
    flags = {a.name: a.i for a in node.attribute}
    assert (node.op_type, flags["is_multi_soc_ep_context"]) == ("EPContext", 1)
    assert "SM8450" in lowered.notes[0]
    assert "cannot load a file of several SoCs" in lowered.notes[0]
    assert target.placement(qdq_file).fallback == ()
    refused = target.placement(erf_file).fallback
    assert [n.op for n in refused] == ["DequantizeLinear", "Erf", "QuantizeLinear"]
    assert "SM8850" in refused[1].why or "SM8450" in refused[1].why
    exact = target.open(lowered.file, exact=True).run({"x": batch[:1]})["y"]
    each = [_hexagon(d).open(lowered.file, exact=True).run({"x": batch[:1]})["y"]
            for d in ("snapdragon-8-gen1", "snapdragon-8-elite-gen5")]  # fmt: skip
    assert any(np.array_equal(exact, one) for one in each)
    # Unknown for one (no model for v69) is unknown for all.
    assert target.latency(qdq_file, {"x": batch}, 1).value is None


def test_wrong_inputs_are_named_before_anything_starts(qdq_file: Path) -> None:
    with pytest.raises(UsageError, match="EB142"):
        _hexagon().open(qdq_file, exact=True).run({"z": np.zeros((1, 3, 32, 32), np.float32)})


def test_a_broken_or_invalid_file_is_refused(qdq_file: Path, tmp_path: Path) -> None:
    broken, invalid = tmp_path / "broken.onnx", tmp_path / "invalid.onnx"
    broken.write_bytes(qdq_file.read_bytes()[:999])
    model = onnx.load(qdq_file)
    model.graph.node[-1].op_type = "NoSuchOperator"
    onnx.save(model, invalid)
    for file in (broken, invalid, tmp_path / "absent.onnx"):
        with pytest.raises(ArtifactError, match="EB510"):
            _hexagon().placement(file)
