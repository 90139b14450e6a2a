"""Half precision keeps the numbers and the interface, or the file stays in single precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgebudget import graph, target_registry
from edgebudget.program import Program
from edgebudget_targets._half_precision import (
    is_half,
    rounded,
    to_half,
    to_single,
    why_not_half,
)
from edgebudget_targets.onnxruntime_webgpu import WebGpuTarget
from tests.targets.conftest import conv_net, pictures

Array = np.ndarray[Any, Any]


def _target(name: str = "gpu") -> WebGpuTarget:
    target = target_registry.get(name)
    assert isinstance(target, WebGpuTarget)
    return target


def _scaled(model: onnx.ModelProto, name: str, factor: float) -> onnx.ModelProto:
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    graph.set_initializer(changed, name, graph.initializers(model)[name] * np.float32(factor))
    return changed


def _stored(values: list[float], name: str) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(values, np.float32), name)


def _mixed_net() -> onnx.ModelProto:
    """Constants, a resize, a cumulative sum (single precision only), and a value given twice."""
    f, i = TensorProto.FLOAT, TensorProto.INT64
    nodes = [
        helper.make_node("Constant", [], ["half"], "k",
                         value=_stored([0.5], "v")),
        helper.make_node("Mul", ["x", "half"], ["m"], "mul"),
        helper.make_node("Resize", ["m", "", "scales"], ["r"], "resize", mode="linear"),
        helper.make_node("CumSum", ["r", "axis"], ["s"], "sum"),
        helper.make_node("Add", ["s", "b"], ["y"], "add"),
        helper.make_node("Relu", ["y"], ["z"], "relu"),
        helper.make_node("Shape", ["z"], ["n"], "shape"),
    ]  # fmt: skip
    weights = [
        _stored([1, 1, 2, 2], "scales"),
        numpy_helper.from_array(np.array(3), "axis"),
        _stored([0.25], "b"),
    ]
    made = helper.make_graph(
        nodes, "mixed",
        [helper.make_tensor_value_info("x", f, [1, 2, 4, 4])],
        [helper.make_tensor_value_info("y", f, [1, 2, 8, 8]),
         helper.make_tensor_value_info("z", f, [1, 2, 8, 8]),
         helper.make_tensor_value_info("n", i, [4])],
        weights,
    )  # fmt: skip
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    return model


@pytest.mark.parametrize("model", [conv_net(), conv_net("Erf"), _mixed_net()])
def test_numbers_and_interface_stay(model: onnx.ModelProto) -> None:
    half = to_half(model)
    onnx.checker.check_model(half, full_check=True)
    assert is_half(half)
    assert not is_half(model)
    for a, b in ((model.graph.input, half.graph.input), (model.graph.output, half.graph.output)):
        assert [(v.name, v.type) for v in a] == [(v.name, v.type) for v in b]
    assert to_half(model).SerializeToString(True) == half.SerializeToString(True)
    values = graph.probe(graph.specs(model))
    halves = (half, to_single(half), rounded(half))
    before, after, again, short = (graph.run(m, values) for m in (model, *halves))
    for name, expected in before.items():
        assert after[name].dtype == expected.dtype
        size = np.abs(expected).max()
        assert np.abs(after[name] - expected).max() <= 4e-3 * size
        assert np.abs(again[name] - expected).max() <= 4e-3 * size
        assert np.abs(short[name] - expected).max() <= 4e-3 * size
        assert name == "n" or np.any(short[name] != expected)


def test_weights_are_the_nearest_halves() -> None:
    model = conv_net()
    half, single = to_half(model), to_single(to_half(model))
    for name, value in graph.initializers(model).items():
        assert np.array_equal(graph.initializers(half)[name], value.astype(np.float16))
        assert graph.initializers(single)[name].dtype == np.float32
    assert not is_half(single)
    assert len(half.SerializeToString()) < 0.65 * len(model.SerializeToString())


def test_a_file_is_written_in_half_precision_with_what_was_seen(tmp_path: Path) -> None:
    lowered = _target().lower(graph.program(conv_net()), tmp_path, "main")
    assert is_half(onnx.load(lowered.file))
    assert lowered.notes[0].startswith("half precision: outputs on noise within")
    x = pictures(3)
    run = _target().open(lowered.file).run
    expected = np.concatenate([graph.run(conv_net(), {"x": p[None]})["y"] for p in x])
    assert np.abs(run({"x": x})["y"] - expected).max() <= 4e-3 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("weight", "factor", "why"),
    [("w1", 1e6, "weight 'w1' exceeds 65504"), ("w0", 2e4, "moves an output by inf")],
)
def test_what_half_precision_cannot_hold_stays_single(
    tmp_path: Path, weight: str, factor: float, why: str
) -> None:
    model = _scaled(conv_net(), weight, factor)
    if weight == "w0":
        model = _scaled(model, "w1", 8.0)
    lowered = _target().lower(graph.program(model), tmp_path, "main")
    assert not is_half(onnx.load(lowered.file))
    assert lowered.notes[0].startswith("single precision: ")
    assert why in lowered.notes[0]


def test_single_precision_can_be_asked_for(tmp_path: Path) -> None:
    lowered = _target("gpu:webgpu/fp32").lower(graph.program(conv_net()), tmp_path, "main")
    assert not is_half(onnx.load(lowered.file))
    assert lowered.notes == ()


def test_integer_graphs_are_left_as_they_are(qdq_file: Path, tmp_path: Path) -> None:
    model = onnx.load(qdq_file)
    assert "integers" in why_not_half(model)
    lowered = _target().lower(Program("graph", model, graph.specs(model), ("y",)), tmp_path, "q")
    expected = graph.run(model, {"x": pictures(1)})["y"]
    assert np.array_equal(_target().open(lowered.file).run({"x": pictures(1)})["y"], expected)
