"""Quantized graphs rebuilt in torch keep their steps, and answer as ONNX Runtime does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgebudget import graph as graphs
from edgebudget.verify import output_steps
from edgebudget.workload import Array
from edgebudget_passes import quantize_int8
from tests.passes.quant_nets import CPU, NPU, Net, Noise, context, program, residual

torch = pytest.importorskip("torch")

from edgebudget.import_onnx import ImportedGraph, import_graph  # noqa: E402


def _answer(module: ImportedGraph, inputs: Mapping[str, Array]) -> Array:
    with torch.no_grad():
        found: Array = module(*(torch.from_numpy(x) for x in inputs.values()))[0].numpy()
    return found


def _quantized(model: onnx.ModelProto, target: Any, **options: Any) -> onnx.ModelProto:
    noise = Noise(tuple(graphs.specs(model)[0].shape[1:]))
    config = quantize_int8.Config(label_bias="off", **options)
    body: onnx.ModelProto = quantize_int8.run(
        program(model), config, context(noise, target)
    ).program.body
    assert any(n.op_type == "QuantizeLinear" for n in body.graph.node)
    return body


def _attention() -> onnx.ModelProto:
    """Tokens, one head of attention, a normalisation and a gated MLP."""
    net = Net((1, 6, 8))
    a = net.add("LayerNormalization", "x", net.weight(8), net.store(net.rng.normal(0, 0.1, 8)))
    q, k, v = (net.add("MatMul", a, net.weight(8, 8)) for _ in range(3))
    scores = net.add("MatMul", q, net.add("Transpose", k, perm=[0, 2, 1]))
    mixed = net.add("MatMul", net.add("Softmax", net.add("Mul", scores, net.store(0.35))), v)
    b = net.add("Add", net.add("MatMul", mixed, net.weight(8, 8)), "x")
    c = net.add("Gelu", net.add("Add", net.add("MatMul", b, net.weight(8, 16)), net.weight(16)))
    d = net.add("Add", net.add("MatMul", c, net.weight(16, 8)), b)
    pooled = net.add("ReduceMean", d, net.store(np.asarray([1])), keepdims=0)
    return net.model(net.add("Gemm", pooled, net.weight(8, 5), out="y"))


def _uneven() -> onnx.ModelProto:
    """Pads on one side, steps through pixels, channels joined: what breaks up integer groups."""
    net = Net()
    w = net.weight(8, 3, 3, 3)
    a = net.add("Relu", net.add("Conv", "x", w, pads=[0, 0, 1, 1], strides=[2, 2]))
    cuts = [net.store(np.asarray(v)) for v in ([0, 0], [8, 8], [2, 3], [2, 2])]
    b = net.add("Slice", a, *cuts)
    c = net.add("MaxPool", a, kernel_shape=[2, 2], strides=[2, 2], pads=[0, 0, 0, 0])
    d = net.add("Concat", b, c, axis=1)
    e = net.add("Pad", d, net.store(np.asarray([0, 1, 0, 0, 0, 1, 0, 0])))
    f = net.add("HardSwish", net.conv(e, 18, 8))
    g = net.add("ConvTranspose", f, net.weight(8, 4, 2, 2), strides=[2, 2])
    h = net.add("ReduceMean", g, net.store(np.asarray([2, 3])), keepdims=0)
    return net.model(net.add("Gemm", h, net.weight(5, 4), transB=1, out="y"))


_NETS: Mapping[str, Callable[[], onnx.ModelProto]] = {
    "residual": residual,
    "attention": _attention,
    "uneven": _uneven,
}


@pytest.mark.parametrize("name", _NETS)
@pytest.mark.parametrize("target", [CPU, NPU], ids=["cpu", "npu"])
def test_quantized_graph_is_within_one_step(name: str, target: Any, tmp_path: Path) -> None:
    model = _quantized(_NETS[name](), target)
    inputs = graphs.probe(graphs.specs(model))
    want = graphs.run(model, inputs)["y"]
    got = _answer(import_graph(model), inputs)
    (tmp_path / "m.onnx").write_bytes(graphs.canonical_bytes(model))
    step = output_steps(tmp_path / "m.onnx").get("y", float(np.abs(want).max()) * 1e-2)
    assert np.abs(got - want).max() <= step * 1.001


@pytest.mark.parametrize("name", _NETS)
def test_signed_integers_are_the_same_numbers(name: str) -> None:
    model = _quantized(_NETS[name](), NPU, bits=16)
    inputs = graphs.probe(graphs.specs(model))
    signed, plain = (import_graph(model, signed=s) for s in (True, False))
    assert np.array_equal(_answer(signed, inputs), _answer(plain, inputs))
    kinds = {v.dtype for v in signed.buffers()}
    assert not kinds & {torch.uint8, torch.uint16}


def test_weights_rounded_in_the_graph_are_stored_as_integers() -> None:
    """The form in which networks come that were trained in 8 bits; no zero point is given."""
    rng = np.random.default_rng(0)
    stored = {
        "w": rng.standard_normal((4, 3, 3, 3)).astype(np.float32),
        "s": (0.02 + 0.01 * rng.random(4)).astype(np.float32),
        "t": np.float32(0.05),
    }
    kind: dict[str, Any] = {"output_dtype": TensorProto.INT8}
    axis: dict[str, Any] = {"axis": 0}
    nodes = [
        helper.make_node("QuantizeLinear", ["w", "s"], ["wq"], **kind, **axis),
        helper.make_node("DequantizeLinear", ["wq", "s"], ["wd"], **axis),
        helper.make_node("QuantizeLinear", ["x", "t"], ["xq"], **kind),
        helper.make_node("DequantizeLinear", ["xq", "t"], ["xd"]),
        helper.make_node("Conv", ["xd", "wd"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 6, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4, 4, 4])],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in stored.items()],
    )
    opset = [helper.make_opsetid("", 21)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=10)
    before = graphs.fingerprint(model)
    inputs = graphs.probe(graphs.specs(model))
    module = import_graph(model)
    np.testing.assert_allclose(
        _answer(module, inputs), graphs.run(model, inputs)["y"], rtol=1e-4, atol=1e-4
    )
    assert [b.dtype for b in module.buffers() if b.numel() == 108] == [torch.int8]
    assert graphs.fingerprint(model) == before  # the caller's model is left alone


def test_inputs_and_outputs_keep_their_types() -> None:
    stored = {
        "s": np.float32(0.1), "z": np.uint8(100), "t": np.float32(0.2),
        "w": np.ones((4, 3, 1, 1), np.float32),
    }  # fmt: skip
    nodes = [
        helper.make_node("DequantizeLinear", ["x", "s", "z"], ["a"]),
        helper.make_node("Conv", ["a", "w"], ["b"]),
        helper.make_node("QuantizeLinear", ["b", "t", "z"], ["c"]),
        helper.make_node("Transpose", ["c"], ["y"], perm=[0, 2, 3, 1]),
    ]
    kind = TensorProto.UINT8
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", kind, [1, 3, 4, 4])],
        [helper.make_tensor_value_info("y", kind, [1, 4, 4, 4])],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in stored.items()],
    )
    opset = [helper.make_opsetid("", 20)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=10)
    rng = np.random.default_rng(1)
    inputs = {"x": rng.integers(0, 256, (1, 3, 4, 4)).astype(np.uint8)}
    want = graphs.run(model, inputs)["y"]
    got = _answer(import_graph(model), inputs)
    assert got.dtype == want.dtype == np.uint8
    assert np.abs(got.astype(int) - want.astype(int)).max() <= 1
