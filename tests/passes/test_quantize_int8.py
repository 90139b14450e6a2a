"""Quantized graphs: accuracy, form, and what goes wrong with bad input."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from edgebudget import graph as graphs
from edgebudget import ranges
from edgebudget.events import ignore
from edgebudget.program import PassResult
from edgebudget_passes import _label_bias, _sensitivity, equalize, quantize_int8
from edgebudget_passes.quantize_int8 import Config
from edgebudget_runtime.errors import EdgeBudgetError
from tests.passes.quant_nets import CPU, NPU, Net, Noise, context, program, residual, sqnr

IMAGE = (1, 3, 16, 16)


def quantize(
    model: onnx.ModelProto, target: Any = CPU, data: Noise | None = None, **settings: Any
) -> PassResult:
    data = data or Noise(tuple(graphs.specs(model)[0].shape[1:]))
    return quantize_int8.run(program(model), Config(**settings), context(data, target))


def fused(model: onnx.ModelProto, folder: Path) -> Counter[str]:
    """Operators that ONNX Runtime really runs."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(folder / "fused.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Counter(n.op_type for n in onnx.load(folder / "fused.onnx").graph.node)


def weights_of(model: onnx.ModelProto) -> dict[str, tuple[np.ndarray[Any, Any], ...]]:
    """Name of each int8 weight -> (integers, steps)."""
    stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    found: dict[str, tuple[np.ndarray[Any, Any], ...]] = {}
    for name, value in stored.items():
        if name.endswith(".int8.q"):
            found[name.removesuffix(".int8.q")] = (value, stored[name[:-2] + ".scale"])
    return found


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    widths=st.lists(st.sampled_from([1, 3, 4, 8]), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
    relu=st.booleans(),
)
def test_random_convolutions_stay_close_and_weights_are_within_half_a_step(
    widths: list[int], seed: int, relu: bool
) -> None:
    net = Net(IMAGE, seed)
    x, channels = "x", 3
    for width in widths:
        x, channels = net.conv(x, channels, width), width
        x = net.add("Relu", x) if relu else x
    model = net.model(x)
    done = quantize(model).program.body
    assert sqnr(model, done, IMAGE) > 25.0
    for name, (whole, step) in weights_of(done).items():
        value, steps = net.stored[name], step.reshape(-1, 1, 1, 1)
        clipped = np.abs(whole.astype(int)) == 127
        error = np.abs(value - whole * steps)
        assert (error[~clipped] <= 0.5001 * np.broadcast_to(steps, value.shape)[~clipped]).all()
        assert (
            np.abs(value[clipped]) >= (126.49 * np.broadcast_to(steps, value.shape))[clipped]
        ).all()


def test_the_engine_runs_every_layer_in_integers(tmp_path: Path) -> None:
    model = residual()
    done = quantize(model).program.body
    ops = fused(done, tmp_path)
    assert (ops["QLinearConv"], ops["QLinearAdd"], ops["QGemm"]) == (5, 1, 1)
    assert ops["QLinearGlobalAveragePool"] == ops["MaxPool"] + ops["NhwcMaxPool"] == 1
    assert not {"Conv", "FusedConv", "Gemm", "FusedGemm", "Add", "Relu"} & set(ops)
    assert ops["QuantizeLinear"] == 1  # the input's
    assert sqnr(model, done, IMAGE) > 25.0


def test_a_last_sum_of_integers_is_an_integer_sum(tmp_path: Path) -> None:
    """In float the engine would convert, and lay out anew, each of the values it joins."""
    net = Net(IMAGE)
    x = net.add("Relu", net.conv("x", 3, 8))
    x = net.add("Relu", net.add("Add", net.conv(x, 8, 8), x))
    model = net.model(net.add("ReduceMean", x, net.store(np.array([2, 3])), out="y"), opset=18)
    done = quantize(model).program.body
    ops = fused(done, tmp_path)
    assert (ops["QLinearConv"], ops["QLinearAdd"], ops["DequantizeLinear"]) == (2, 1, 1)
    assert not {"Add", "Relu"} & set(ops)
    assert sqnr(model, done, IMAGE) > 25.0


@pytest.mark.parametrize("opset", [13, 17, 18, 21, 22, 23])
@pytest.mark.parametrize("target", [CPU, NPU], ids=["cpu", "npu"])
def test_operator_sets(opset: int, target: Any) -> None:
    model = residual(opset)
    done = quantize(model, target, range_method="minmax", bias_correct=False).program.body
    onnx.checker.check_model(done)
    assert sqnr(model, done, IMAGE) > 25.0


@pytest.mark.parametrize("settings", [{}, {"bits": 16}], ids=["8 bit", "16 bit"])
def test_an_npu_graph_leaves_nothing_in_float(settings: dict[str, Any]) -> None:
    net = Net(IMAGE)
    x = net.add("HardSwish", net.conv("x", 3, 8))
    x = net.add("Mul", x, net.add("Sigmoid", net.conv(x, 8, 8)))
    x = net.add(
        "Transpose", net.add("Reshape", x, net.store(np.array([1, 8, 256]))), perm=[0, 2, 1]
    )
    x = net.add("LayerNormalization", x, net.weight(8), net.weight(8), axis=-1)
    x = net.add("Add", net.add("MatMul", x, net.weight(8, 4)), net.weight(4))
    model = net.model(net.add("Softmax", x, axis=-1, out="y"), opset=17)
    done = quantize(model, NPU, range_method="minmax", **settings).program.body
    maker = {o: n.op_type for n in done.graph.node for o in n.output}
    integer = {"QuantizeLinear", "DequantizeLinear"}
    shapes = {t.name for t in done.graph.initializer if t.data_type == onnx.TensorProto.INT64}
    for node in done.graph.node:
        if node.op_type not in integer:
            assert all(maker.get(i) == "DequantizeLinear" for i in node.input if i not in shapes)
            readers = [n.op_type for n in done.graph.node if node.output[0] in n.input]
            assert readers == ["QuantizeLinear"], node.name
    assert done.graph.output[0].name == "y"
    assert maker["y"] == "DequantizeLinear"
    assert all(v is not None for v in [graphs.shapes(done).get(o) for o in maker])
    assert sqnr(model, done, IMAGE) > (40.0 if settings else 15.0)  # the weights are 8-bit


def test_dead_channels_and_constant_activations_are_harmless() -> None:
    net = Net(IMAGE)
    x = net.conv("x", 3, 4)
    net.stored["w0"][1] = 0.0
    net.stored["w1"][:] = [0.5, 1e4, -1.0, 0.1]
    dead = net.add("Relu", net.conv(x, 4, 4))
    net.stored["w2"][:], net.stored["w3"][:] = 0.0, -1.0
    model = net.model(net.add("Add", net.conv(dead, 4, 2), net.conv(x, 4, 2), out="y"))
    for target in (CPU, NPU):
        done = quantize(model, target, mixed="off").program.body
        found = graphs.run(done, {"x": Noise().sample(0).inputs["x"][None]})
        assert np.isfinite(found["y"]).all()
        assert all((step > 0).all() for _, step in weights_of(done).values())


def test_shared_weights_and_an_output_that_is_also_read_inside() -> None:
    net = Net(IMAGE)
    shared = net.weight(3, 3, 3, 3)
    a = net.add("Conv", "x", shared, pads=[1] * 4)
    b = net.add("Conv", net.add("Relu", a, out="mid"), shared, pads=[1] * 4, out="y")
    model = net.model("mid", b)
    done = quantize(model).program.body
    assert [o.name for o in done.graph.output] == ["mid", "y"]
    assert len(weights_of(done)) == 1
    assert sqnr(model, done, IMAGE) > 25.0


def test_matrix_products_and_a_transposed_convolution(tmp_path: Path) -> None:
    net = Net(IMAGE)
    x = net.add("Relu", net.conv("x", 3, 6))
    x = net.add("ConvTranspose", x, net.weight(6, 4, 2, 2), strides=[2, 2], out="up")
    x = net.add("Reshape", net.conv(x, 4, 2), net.store(np.array([1, 2, 1024])))
    x = net.add("MatMul", x, net.weight(1024, 7))
    model = net.model(net.add("Flatten", x, out="y"))
    result = quantize(model)
    assert [(d.where, d.what) for d in result.declined] == [("up", "stays float")]
    assert fused(result.program.body, tmp_path)["ConvTranspose"] == 1
    assert sqnr(model, result.program.body, IMAGE) > 25.0
    assert not quantize(model, NPU).declined


def test_a_graph_without_layers_is_declined() -> None:
    net = Net(IMAGE)
    before = program(net.model(net.add("Relu", "x", out="y")))
    result = quantize_int8.run(before, Config(), context(Noise()))
    assert result.program is before
    assert not result.did
    assert "no node with stored weights" in result.declined[0].why


def test_old_graphs_with_weights_among_the_inputs_are_raised() -> None:
    net = Net(IMAGE)
    x = net.conv("x", 3, 4)
    model = net.model(net.add("Relu", x, out="y"), opset=9)
    for tensor in model.graph.initializer:
        model.graph.input.append(
            onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
        )
    for target in (CPU, NPU):
        done = quantize(model, target).program.body
        assert [i.name for i in done.graph.input] == ["x"]
        assert sqnr(model, done, IMAGE) > 25.0


def broken(code: str) -> tuple[onnx.ModelProto, Noise | None, Any, dict[str, Any]]:
    model, data, target, settings = residual(), Noise(), CPU, dict[str, Any]()
    if code == "EB521":
        value = graphs.initializers(model)["w2"].copy()
        value.reshape(-1)[3] = np.inf
        graphs.set_initializer(model, "w2", value)
    elif code == "EB520":
        data.broken = 5
    elif code == "EB131":
        settings["range_method"] = "entropy"
    elif code == "EB132":
        settings["keep_float"] = ("no such*",)
    elif code == "EB133":
        settings["bits"] = 16
    elif code == "EB231":
        model = quantize(model, range_method="minmax").program.body
    return model, None if code == "EB130" else data, target, settings


@pytest.mark.parametrize("code", ["EB130", "EB131", "EB132", "EB133", "EB231", "EB520", "EB521"])
def test_faults(code: str) -> None:
    model, data, target, settings = broken(code)
    with pytest.raises(EdgeBudgetError) as caught:
        quantize_int8.run(program(model), Config(**settings), context(data, target))
    assert caught.value.code == code
    wanted = {"EB520": "sample 5", "EB521": "'w2' holds 1", "EB132": "'no such*'"}
    assert wanted.get(code, "") in caught.value.what


def test_an_activation_that_overflows_is_named() -> None:
    net = Net(IMAGE)
    huge = net.add("Mul", "x", net.store(np.float32(1e38)))
    model = net.model(net.conv(net.add("Mul", huge, huge, out="boom"), 3, 2))
    with pytest.raises(EdgeBudgetError, match="'boom' is NaN or infinite") as caught:
        quantize(model)
    assert caught.value.code == "EB520"


def test_named_layers_stay_float_or_get_16_bits(tmp_path: Path) -> None:
    model = residual()
    first = model.graph.node[0].name
    done = quantize(model, keep_float=(first,)).program.body
    assert fused(done, tmp_path)["QLinearConv"] == 4
    wide = quantize(model, NPU, sixteen_bit=(first,), mixed="off").program.body
    kinds = Counter(t.data_type for t in wide.graph.initializer)
    assert kinds[onnx.TensorProto.UINT16] > 0
    assert sqnr(model, wide, IMAGE) > 25.0


def test_after_the_last_average_an_npu_computes_in_16_bits_and_answers_in_8() -> None:
    net = Net(IMAGE)
    squeezed = net.add("GlobalAveragePool", net.add("Relu", net.conv("x", 3, 64)))
    gate = net.add("Sigmoid", net.conv(squeezed, 64, 64, k=1))
    x = net.conv(net.add("Mul", net.nodes[1].output[0], gate), 64, 32)  # so the gate is no tail
    pooled = net.add("Flatten", net.add("GlobalAveragePool", x, out="mean"))
    model = net.model(net.add("Gemm", pooled, net.weight(5, 32), transB=1, out="y"))
    done = quantize(model, NPU, mixed="off").program.body
    types = {t.name: t.data_type for t in done.graph.initializer}
    rounded = {
        n.input[0]: types[n.input[2]] for n in done.graph.node if n.op_type == "QuantizeLinear"
    }
    eight, sixteen = onnx.TensorProto.UINT8, onnx.TensorProto.UINT16
    assert rounded["mean.raw"] == rounded["y.raw"] == sixteen
    assert rounded[f"{squeezed}.raw"] == rounded[f"{gate}.raw"] == eight
    (last,) = (n for n in done.graph.node if "y" in n.output)
    assert types[last.input[2]] == eight
    asked = quantize(model, NPU, bits=16).program.body  # what was asked for is not narrowed
    types = {t.name: t.data_type for t in asked.graph.initializer}
    (last,) = (n for n in asked.graph.node if "y" in n.output)
    assert types[last.input[2]] == sixteen


@pytest.mark.parametrize("target", [CPU, NPU], ids=["cpu", "npu"])
def test_mixed_precision_reaches_what_plain_int8_misses(target: Any) -> None:
    model = residual()
    plain = quantize(model, target, mixed="off")
    result = quantize(model, target, max_output_error=0.003)
    before, after = (sqnr(model, r.program.body, IMAGE) for r in (plain, result))
    # On the NPU weights stay int8, and their rounding is most of what is left.
    assert after > before + (8.0 if target is CPU else 3.0)
    kind = "float" if target is CPU else "16-bit activations"
    assert any(d.what == kind for d in result.declined)
    assert any(d.where == "precision" for d in result.did)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    noise=st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=7),
    allowed=st.floats(1e-6, 2.0),
    data=st.data(),
)
def test_the_cheapest_set_of_layers_is_chosen(
    noise: list[float], allowed: float, data: st.DataObject
) -> None:
    macs = data.draw(st.lists(st.integers(1, 50), min_size=len(noise), max_size=len(noise)))
    found = {
        str(i): _sensitivity.Group(frozenset({str(i)}), m, n)
        for i, (m, n) in enumerate(zip(macs, noise, strict=True))
    }
    chosen = _sensitivity.choose(found, allowed)
    slack = allowed + 1e-6 * sum(noise)
    assert sum(g.noise for k, g in found.items() if k not in chosen) <= slack
    every = (s for r in range(len(found) + 1) for s in itertools.combinations(found, r))
    fits = [s for s in every if sum(g.noise for k, g in found.items() if k not in s) <= allowed]
    cost = [sum(found[k].macs + 1 for k in s) for s in (*fits, chosen)]
    assert cost[-1] <= min(cost[:-1])


def test_the_same_seed_gives_the_same_bytes() -> None:
    first, second = (quantize(residual()).program.body for _ in range(2))
    assert graphs.canonical_bytes(first) == graphs.canonical_bytes(second)


def test_statistics_are_those_of_the_float_model() -> None:
    model, data = residual(), Noise()
    values = ["x", model.graph.node[1].output[0]]
    found = ranges.collect(model, data, range(6), values, emit=ignore)
    seen = np.stack([data.sample(i).inputs["x"] for i in range(6)])
    assert (found["x"].low, found["x"].high) == (seen.min(), seen.max())
    assert found[values[1]].low == 0.0
    np.testing.assert_array_equal(np.sort(found["x"].values), np.sort(seen, axis=None))
    low, high = ranges.percentile(found["x"], 99.0)
    assert np.mean((seen >= low) & (seen <= high)) == pytest.approx(0.99, abs=0.001)


def test_class_biases_follow_labels_only_on_clear_evidence() -> None:
    rng = np.random.default_rng(0)
    wanted = rng.integers(0, 5, 600)
    scores = rng.standard_normal((600, 5)) + 2.0 * np.eye(5)[wanted]
    for offset, expected in ((np.array([3.0, 0, 0, 0, 0]), True), (np.zeros(5), False)):
        helps, note = _label_bias.judge(scores + offset, wanted)
        assert helps is expected, note
    model = residual()
    labelled = Noise(count=300, labels=np.zeros(300, np.int64))
    result = quantize(model, data=labelled, range_method="minmax")
    found = graphs.run(result.program.body, {"x": labelled.sample(0).inputs["x"][None]})
    assert any(d.what == "fitted to labels" for d in result.did)
    assert found["y"].argmax() == 0
    left = quantize(model, data=labelled, range_method="minmax", label_bias="off")
    assert not any(d.where == "class biases" for d in left.did)


def test_equalization_changes_nothing_in_float_and_helps_int8() -> None:
    net = Net(IMAGE)
    x = net.conv("x", 3, 8)
    net.stored["w0"] *= np.geomspace(0.01, 30, 8, dtype=np.float32).reshape(8, 1, 1, 1)
    x = net.add("Relu", net.conv(net.add("Relu", x), 8, 8, group=8))
    net.conv(x, 8, 4)
    net.stored["w4"] /= np.geomspace(0.01, 30, 8, dtype=np.float32).reshape(1, 8, 1, 1)
    before = net.model(net.nodes[-1].name)
    result = equalize.run(program(before), equalize.Config(), context(Noise()))
    after = result.program.body
    assert result.did[0].what == "2 pairs of layers"
    assert graphs.compare(before, after) < graphs.REORDERED
    plain = [quantize(m, mixed="off").program.body for m in (before, after)]
    gained = sqnr(before, plain[1], IMAGE) - sqnr(before, plain[0], IMAGE)
    assert gained > 3.0


def test_equalization_leaves_bounded_activations_alone() -> None:
    net = Net(IMAGE)
    six = net.add("Clip", net.conv("x", 3, 4), net.store(np.float32(0)), net.store(np.float32(6)))
    before = program(net.model(net.conv(six, 4, 2)))
    result = equalize.run(before, equalize.Config(), context(Noise()))
    assert result.program is before
    assert result.declined
