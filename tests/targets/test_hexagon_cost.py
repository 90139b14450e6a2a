"""The fitted NPU cost model, and the limits known before lowering; needs no engine."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from edgebudget import target_registry
from edgebudget_runtime.errors import TargetError, UnsupportedError
from edgebudget_targets import _hexagon_limits, onnxruntime_qnn
from edgebudget_targets._hexagon_cost import FILE, CostModel, fit, predict_us
from edgebudget_targets._hexagon_kernels import features, kernels
from edgebudget_targets._hexagon_micro import SUITE, Micro, networks
from edgebudget_targets.onnxruntime_qnn import HexagonTarget


def _stored_version() -> str:
    return str(json.loads(FILE.read_text())["version"])


def _network(width: int, size: int) -> onnx.ModelProto:
    net = Micro((3, size, size)).conv(width, 3, 2)
    for _ in range(4):
        net.conv(width).conv(2 * width, 1).conv(0, 3, depthwise=True).conv(width, 1)
    return net.pool("GlobalAveragePool").linear(10).model()


@pytest.mark.parametrize("soc", ["sa8255", "sa8797", "sar2230p"])
def test_resolution_helps_where_width_below_32_does_not(soc: str) -> None:
    fitted = CostModel.load(_stored_version()).fits[soc]
    whole = predict_us(fitted, _network(32, 96))
    narrow, small = predict_us(fitted, _network(16, 96)), predict_us(fitted, _network(32, 48))
    # Half the width has about a quarter of the MACs, half the size has exactly that.
    assert small < 0.75 * whole
    assert small < narrow
    assert fitted.median_error < 0.15
    assert fitted.p90_error < 0.4
    assert fitted.rank > 0.9


def test_a_fit_recovers_what_its_data_was_made_of() -> None:
    rows = [features(net.model()) for name, net in networks() if name.startswith("mixed")][:60]
    true = {"graph": 5.0, "edge": 3e-4, "conv_work": 0.02, "conv1_work": 0.02}
    found = fit(rows, [sum(true.get(k, 0.0) * v for k, v in row.items()) for row in rows])
    assert found.median_error < 0.01
    assert found.weights["conv_work"] == pytest.approx(0.02, rel=0.2)
    assert all(w > 0 for w in found.weights.values())


def test_float_and_integer_forms_have_the_same_kernels(qdq_file: Path) -> None:
    plain = onnx.load(qdq_file.with_name("float.onnx"))
    both = [[(k.kind, dict(k.features)) for k in kernels(m)] for m in (plain, onnx.load(qdq_file))]
    assert both[0] == both[1]
    assert [k for k, _ in both[0]] == ["stem", "conv", "mean", "linear"]


def test_a_kernel_that_was_never_fitted_makes_latency_unknown() -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 8])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 8])
    graph = helper.make_graph([helper.make_node("Softmax", ["x"], ["y"], "s")], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    fitted = CostModel.load(_stored_version()).fits["sa8255"]
    with pytest.raises(UnsupportedError, match=r"EB247.*Softmax"):
        predict_us(fitted, model)


def test_a_model_of_another_engine_version_is_refused(
    monkeypatch: pytest.MonkeyPatch, qdq_file: Path
) -> None:
    monkeypatch.setattr(onnxruntime_qnn, "_version", lambda: "9.9.9")
    target = HexagonTarget(target_registry.get("npu").spec)
    with pytest.raises(TargetError, match=r"EB620.*9\.9\.9") as caught:
        target.latency(qdq_file, {}, 1)
    assert "benchmarks.hexagon_cost" in caught.value.hint


@pytest.mark.parametrize("text", ["", "[]", '{"version": "1", "suite": 1, "fits": {"a": {}}}'])
def test_a_damaged_model_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "cost.json"
    file.write_text(text)
    with pytest.raises(TargetError, match=r"EB620.*cannot be read"):
        CostModel.load("1", file)


def test_models_are_kept_whole(tmp_path: Path) -> None:
    model = CostModel.load(_stored_version())
    model.save(tmp_path / "cost.json")
    assert CostModel.load(model.version, tmp_path / "cost.json") == model
    assert (tmp_path / "cost.json").read_bytes() == FILE.read_bytes()


def test_no_operator_of_an_old_generation_is_handed_to_its_compiler() -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 8])
    i = helper.make_tensor_value_info("i", TensorProto.INT64, [2])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 8])
    graph = helper.make_graph([helper.make_node("Gather", ["x", "i"], ["y"], "pick")], "g",
                              [x, i], [y])  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    old = target_registry.get("npu:hexagon/snapdragon-888").spec
    with pytest.raises(UnsupportedError, match=r"EB248.*SM8350.*Gather.*pick") as caught:
        _hexagon_limits.check(model, old)
    assert "Slice" in caught.value.hint
    _hexagon_limits.check(model, target_registry.get("npu").spec)
    model.opset_import[0].version = 12
    with pytest.raises(UnsupportedError, match=r"EB248.*operator set 12"):
        _hexagon_limits.check(model, target_registry.get("npu").spec)


def test_every_limit_of_the_table_has_advice() -> None:
    for arch in ("68", "69", "73", "75", "79", "81"):
        limits = _hexagon_limits.generation(arch)
        for op in (*limits.refuses, *limits.refuses_uint16, *limits.on_cpu, *limits.on_cpu_uint16):
            assert _hexagon_limits.instead(op)
    assert SUITE == json.loads(FILE.read_text())["suite"]
