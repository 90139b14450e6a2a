"""Graphs rebuilt in torch answer as ONNX Runtime does, float and quantized."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edgebudget import graph as graphs
from edgebudget.events import ignore
from edgebudget.job import prepare
from edgebudget.workload import Array
from edgebudget_runtime.budget import Budget
from edgebudget_runtime.errors import UnsupportedError

torch = pytest.importorskip("torch")

from edgebudget.import_onnx import ImportedGraph, import_graph  # noqa: E402

_LARGE = (
    "cifar10-resnet56",
    "mobilenet-v2",
    "cifar10-vit",
    "uhd-iqa",
    "cifar10-resnet56-elastic",
    "cifar10-mobilenet-elastic",
)
_TIGHT = 2e-5  # regrouped float32 sums, relative to the largest output


def _model(
    nodes: Sequence[onnx.NodeProto],
    shapes: Mapping[str, Sequence[int]],
    stored: Mapping[str, Any] | None = None,
    *,
    outputs: Sequence[str] = ("y",),
    opset: int = 20,
    dtype: int = TensorProto.FLOAT,
) -> onnx.ModelProto:
    tensors = [numpy_helper.from_array(np.asarray(v), k) for k, v in (stored or {}).items()]
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info(k, dtype, list(v)) for k, v in shapes.items()],
        [onnx.ValueInfoProto(name=o) for o in outputs],
        tensors,
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)],
        ir_version=10,
    )
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    types = {v.name: v for v in (*inferred.graph.value_info, *inferred.graph.output)}
    for i, name in enumerate(outputs):
        if types[name].type.tensor_type.elem_type:
            model.graph.output[i].CopyFrom(types[name])
        else:  # operators of ONNX Runtime's own
            model.graph.output[i].CopyFrom(
                helper.make_tensor_value_info(name, dtype, list(next(iter(shapes.values()))))
            )
    return model


def _answers(module: ImportedGraph, inputs: Mapping[str, Array]) -> list[Array]:
    with torch.no_grad():
        return [v.numpy() for v in module(*(torch.from_numpy(x) for x in inputs.values()))]


def _same(model: onnx.ModelProto, tolerance: float = _TIGHT) -> ImportedGraph:
    inputs = graphs.probe(graphs.specs(model))
    want = graphs.run(model, inputs)
    module = import_graph(model)
    got = _answers(module, inputs)
    assert [g.dtype for g in got] == [w.dtype for w in want.values()]
    assert graphs.difference(list(want.values()), got) <= tolerance
    return module


def _rng() -> np.random.Generator:
    return np.random.default_rng(0)


def _one(
    op: str,
    shape: Sequence[int] = (2, 4, 6, 6),
    stored: Sequence[Any] = (),
    count: int = 1,
    opset: int = 20,
    domain: str = "",
    **attributes: Any,
) -> onnx.ModelProto:
    """A single operator on an input, stored tensors (None: absent) and `count` outputs."""
    names = ["" if v is None else f"s{i}" for i, v in enumerate(stored)]
    values = {n: v for n, v in zip(names, stored, strict=True) if n}
    outputs = ["y", *(f"y{i}" for i in range(1, count))]
    node = helper.make_node(op, ["x", *names], outputs, name="node", domain=domain, **attributes)
    return _model([node], {"x": shape}, values, outputs=outputs, opset=opset)


def _f(*shape: int) -> Array:
    return np.asarray(_rng().standard_normal(shape, dtype=np.float32))


def _i(*values: int) -> Array:
    return np.asarray(values, np.int64)


_CASES: Mapping[str, Callable[[], onnx.ModelProto]] = {
    **{
        op: lambda op=op: _one(op)  # type: ignore[misc]
        for op in (
            "Abs Ceil Cos Elu Erf Exp Floor Gelu GlobalAveragePool GlobalMaxPool HardSigmoid "
            "HardSwish Identity LeakyRelu Mish Neg Relu Round Selu Sigmoid Sign Sin Softplus "
            "Softsign Tanh ThresholdedRelu Celu Softmax LogSoftmax Dropout LpNormalization "
            "ReduceMean ReduceSum ReduceMax ReduceMin ReduceL1 ReduceL2 ReduceSumSquare "
            "ReduceLogSumExp"
        ).split()
    },
    "add": lambda: _one("Add", stored=[_f(4, 1, 1)]),
    "sub": lambda: _one("Sub", stored=[_f(6)]),
    "div": lambda: _one("Div", stored=[np.abs(_f(2, 4, 6, 6)) + 1]),
    "max of three": lambda: _one("Max", stored=[_f(6), _f(4, 1, 1)]),
    "pow": lambda: _one("Pow", stored=[np.float32(2)]),
    "where": lambda: _model(
        [
            helper.make_node("Greater", ["x", "zero"], ["c"]),
            helper.make_node("Where", ["c", "x", "low"], ["y"]),
        ],
        {"x": (2, 5)},
        {"zero": np.float32(0), "low": np.float32(-3)},
    ),
    "clip": lambda: _one("Clip", stored=[np.float32(-0.5), np.float32(0.7)]),
    "clip below": lambda: _one("Clip", stored=[np.float32(0)]),
    "clip above": lambda: _one("Clip", stored=[None, np.float32(0.2)]),
    "prelu per channel": lambda: _one("PRelu", stored=[_f(4, 1, 1)]),
    "prelu one": lambda: _one("PRelu", stored=[_f(1)]),
    "prelu elsewhere": lambda: _one("PRelu", stored=[_f(6)]),
    "hard sigmoid of six": lambda: _one("HardSigmoid", alpha=1 / 6),
    "gelu tanh": lambda: _one("Gelu", approximate="tanh"),
    "quick gelu": lambda: _one("QuickGelu", domain="com.microsoft"),
    "softmax axis 1": lambda: _one("Softmax", axis=1),
    "softmax old": lambda: _one("Softmax", opset=11, axis=1),
    "cast": lambda: _one("Cast", to=TensorProto.INT32),
    "mean, no axes kept": lambda: _one("ReduceMean", stored=[_i(2, 3)], keepdims=0),
    "mean, axes kept": lambda: _one("ReduceMean", stored=[_i(-1, -2)]),
    "mean of channels": lambda: _one("ReduceMean", stored=[_i(1)]),
    "argmax": lambda: _one("ArgMax", axis=1),
    "argmax last": lambda: _one("ArgMax", axis=1, keepdims=0, select_last_index=1),
    "top k": lambda: _one("TopK", stored=[_i(3)], count=2),
    "cumsum": lambda: _one("CumSum", stored=[np.int64(2)], exclusive=1, reverse=1),
    "matmul": lambda: _one("MatMul", (3, 5, 8), [_f(8, 6)]),
    "matmul of batches": lambda: _one("MatMul", (3, 5, 8), [_f(3, 8, 6)]),
    "matmul left": lambda: _model(
        [helper.make_node("MatMul", ["w", "x"], ["y"])], {"x": (5, 3)}, {"w": _f(2, 5)}
    ),
    "gemm": lambda: _one("Gemm", (3, 8), [_f(6, 8), _f(6)], transB=1),
    "gemm scaled": lambda: _one(
        "Gemm", (8, 3), [_f(8, 6), _f(3, 1)], transA=1, alpha=0.5, beta=2.0
    ),
    "gemm row bias": lambda: _one("Gemm", (3, 8), [_f(8, 6), _f(1, 6)]),
    "gemm scalar bias": lambda: _one("Gemm", (3, 8), [_f(8, 6), np.float32(2)]),
    "gemm without bias": lambda: _one("Gemm", (3, 8), [_f(8, 6)]),
    "einsum": lambda: _one("Einsum", (2, 3, 4), [_f(4, 5)], equation="bij,jk->bki"),
    "layer norm": lambda: _one("LayerNormalization", (2, 5, 8), [_f(8), _f(8)]),
    "layer norm two axes": lambda: _one("LayerNormalization", (2, 5, 8), [_f(5, 8)], axis=1),
    "rms norm": lambda: _one("SimplifiedLayerNormalization", (2, 5, 8), [_f(8)], axis=-1),
    "instance norm": lambda: _one("InstanceNormalization", stored=[_f(4), _f(4)]),
    "group norm": lambda: _one(
        "GroupNormalization", stored=[_f(4), _f(4)], num_groups=2, opset=21
    ),
    "batch norm": lambda: _one(
        "BatchNormalization", stored=[_f(4), _f(4), _f(4), np.abs(_f(4)) + 0.5]
    ),
    "lrn": lambda: _one("LRN", (2, 8, 6, 6), size=3),
    "reshape": lambda: _one("Reshape", stored=[_i(2, -1, 3)]),
    "flatten": lambda: _one("Flatten", axis=2),
    "transpose": lambda: _one("Transpose", perm=[0, 2, 3, 1]),
    "squeeze": lambda: _one("Squeeze", (2, 1, 3, 1), [_i(1)]),
    "unsqueeze": lambda: _one("Unsqueeze", (2, 3), [_i(0, 3)]),
    "squeeze old": lambda: _one("Squeeze", (2, 1, 3), opset=11, axes=[1]),
    "concat": lambda: _one("Concat", stored=[_f(2, 3, 6, 6)], axis=1),
    "split": lambda: _one("Split", stored=[_i(1, 3)], count=2, axis=1),
    "split even": lambda: _one("Split", count=2, axis=1, num_outputs=2),
    "slice": lambda: _one("Slice", stored=[_i(1, 0), _i(6, -1), _i(2, 3), _i(2, 1)]),
    "slice backwards": lambda: _one("Slice", stored=[_i(-1), _i(-100), _i(2), _i(-2)]),
    "pad": lambda: _one("Pad", stored=[_i(0, 1, 2, 0, 0, 0, 1, 3), np.float32(0.5)]),
    "pad channels by axes": lambda: _one("Pad", stored=[_i(1, 2), None, _i(1)]),
    "pad reflect": lambda: _one("Pad", stored=[_i(0, 0, 2, 1, 0, 0, 1, 3)], mode="reflect"),
    "pad edge": lambda: _one("Pad", stored=[_i(0, 0, 2, 1, 0, 0, 1, 3)], mode="edge"),
    "expand": lambda: _one("Expand", (2, 1, 3), [_i(4, 2, 5, 3)]),
    "tile": lambda: _one("Tile", (2, 3), [_i(2, 3)]),
    "gather": lambda: _one("Gather", (4, 5, 6), [np.asarray([[0, -1], [2, 3]])], axis=1),
    "gather one": lambda: _one("Gather", (4, 5, 6), [np.asarray(-1)], axis=1),
    "gather elements": lambda: _one(
        "GatherElements", (3, 3), [np.asarray([[0, -1, 2]])], axis=0
    ),
    "depth to space": lambda: _one("DepthToSpace", blocksize=2),
    "depth to space crd": lambda: _one("DepthToSpace", blocksize=2, mode="CRD"),
    "space to depth": lambda: _one("SpaceToDepth", blocksize=3),
    "trilu": lambda: _one("Trilu", (3, 4), [np.asarray(1)], upper=0),
    "shape arithmetic": lambda: _model(
        [
            helper.make_node("Shape", ["x"], ["s"]),
            helper.make_node("Gather", ["s", "zero"], ["n"]),
            helper.make_node("Concat", ["n", "rest"], ["to"], axis=0),
            helper.make_node("Reshape", ["x", "to"], ["y"]),
        ],
        {"x": (2, 4, 3)},
        {"zero": _i(0), "rest": _i(-1)},
    ),
    "resize nearest": lambda: _one(
        "Resize", stored=[None, np.asarray([1, 1, 2, 2], np.float32)], mode="nearest",
        coordinate_transformation_mode="asymmetric", nearest_mode="floor",
    ),
    "resize nearest half pixel": lambda: _one(
        "Resize", stored=[None, None, _i(2, 4, 9, 4)], mode="nearest"
    ),
    "resize linear": lambda: _one("Resize", stored=[None, None, _i(2, 4, 11, 4)], mode="linear"),
    "resize linear corners": lambda: _one(
        "Resize", stored=[None, None, _i(2, 4, 11, 4)], mode="linear",
        coordinate_transformation_mode="align_corners",
    ),
    "resize linear odd scale": lambda: _one(
        "Resize", stored=[None, np.asarray([1, 1, 1.4, 0.7], np.float32)], mode="linear"
    ),
    "resize cubic": lambda: _one("Resize", stored=[None, None, _i(2, 4, 12, 9)], mode="cubic"),
    "max pool corners": lambda: _one(
        "MaxPool", kernel_shape=[3, 2], strides=[2, 1], pads=[1, 0, 0, 1], ceil_mode=1
    ),
    "average pool uneven": lambda: _one(
        "AveragePool", kernel_shape=[3, 3], strides=[2, 2], pads=[0, 0, 1, 1]
    ),
    "average pool with pads": lambda: _one(
        "AveragePool", kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1
    ),
    "conv same": lambda: _one(
        "Conv", stored=[_f(4, 4, 3, 3)], auto_pad="SAME_UPPER", strides=[2, 2]
    ),
    "conv one axis": lambda: _one("Conv", (2, 4, 9), [_f(6, 2, 3), _f(6)], group=2, pads=[2, 0]),
    "conv three axes": lambda: _one("Conv", (1, 2, 5, 5, 5), [_f(3, 2, 3, 3, 3)]),
    "conv transpose": lambda: _one(
        "ConvTranspose", stored=[_f(4, 3, 3, 3), _f(3)], strides=[2, 2], pads=[1, 1, 1, 1],
        output_padding=[1, 1],
    ),
    "conv transpose uneven": lambda: _one(
        "ConvTranspose", stored=[_f(4, 2, 3, 3)], strides=[2, 2], pads=[1, 0, 0, 1], group=2
    ),
    "conv transpose shape": lambda: _one(
        "ConvTranspose", stored=[_f(4, 3, 3, 3)], strides=[2, 2], output_shape=[12, 12],
        auto_pad="SAME_UPPER",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", _CASES)
def test_operator_equals_onnx_runtime(name: str) -> None:
    _same(_CASES[name]())


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_convolution_of_any_setting(data: st.DataObject) -> None:
    two = st.integers(1, 2)
    groups = data.draw(two)
    kernel = [data.draw(st.integers(1, 3)) for _ in range(2)]
    pads = [data.draw(st.integers(0, 2)) for _ in range(4)]
    strides, dilations = ([data.draw(two) for _ in range(2)] for _ in range(2))
    _same(
        _one(
            "Conv", (2, 4, 7, 8), [_f(6, 4 // groups, *kernel), _f(6)], group=groups, pads=pads,
            strides=strides, dilations=dilations,
        )
    )  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_pool_of_any_setting(data: st.DataObject) -> None:
    op = data.draw(st.sampled_from(["MaxPool", "AveragePool"]))
    kernel = [data.draw(st.integers(2, 3)) for _ in range(2)]
    pads = [data.draw(st.integers(0, 1)) for _ in range(4)]
    strides = [data.draw(st.integers(1, 3)) for _ in range(2)]
    extra: dict[str, Any] = {}
    if op == "AveragePool":
        extra["count_include_pad"] = data.draw(st.integers(0, 1))
    _same(_one(op, (1, 2, 7, 8), kernel_shape=kernel, pads=pads, strides=strides, **extra))


def test_operator_without_counterpart_is_named() -> None:
    model = _one("LSTM", (3, 2, 4), [_f(1, 20, 4), _f(1, 20, 5)], hidden_size=5)
    with pytest.raises(UnsupportedError, match=r"EB243.*LSTM 'node'"):
        import_graph(model)
    crop = _one("AveragePool", kernel_shape=[2, 2], dilations=[2, 2])
    with pytest.raises(UnsupportedError, match=r"EB243.*AveragePool 'node'.*gaps"):
        import_graph(crop)


@pytest.mark.parametrize("name", ["digits", "cifar10-resnet20"])
def test_zoo_model_equals_onnx_runtime(name: str) -> None:
    _same(_zoo_graph(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", _LARGE)
def test_large_zoo_model_equals_onnx_runtime(name: str) -> None:
    _same(_zoo_graph(name))


def _zoo_graph(name: str) -> onnx.ModelProto:
    """A zoo model as the compiler's graph stage has it."""
    job = prepare(name, "cpu", Budget(), None, None, None, None, 0, ignore)
    with closing(job.setting.cache):
        body: onnx.ModelProto = job.graph.program.body
    return body
