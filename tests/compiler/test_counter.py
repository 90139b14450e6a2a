"""The count on ONNX graphs, against numbers worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from edgebudget.count_onnx import count_graph
from edgebudget.count_rules import einsum_macs
from edgebudget.counter import DEFINITION, LayerCount, count
from edgebudget.program import Program
from edgebudget_runtime.errors import UnsupportedError

F, U8, I8, I64 = TensorProto.FLOAT, TensorProto.UINT8, TensorProto.INT8, TensorProto.INT64


def model(
    nodes: list[NodeProto],
    inputs: dict[str, tuple[Any, ...]],
    outputs: list[str],
    weights: dict[str, Any] | None = None,
    opset: int = 21,
) -> ModelProto:
    """A model of float inputs; weights are arrays or ready tensors."""
    tensors = [
        w if isinstance(w, TensorProto) else numpy_helper.from_array(np.asarray(w), k)
        for k, w in (weights or {}).items()
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(k, F, s) for k, s in inputs.items()],
        [helper.make_tensor_value_info(k, F, None) for k in outputs],
        tensors,
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets)


def node(op: str, inputs: str, outputs: str = "y", **attrs: Any) -> NodeProto:
    names = ["" if i == "_" else i for i in inputs.split()]
    return helper.make_node(op, names, outputs.split(), name=f"{op}.{outputs}", **attrs)


def ones(*shape: int, dtype: Any = np.float32) -> Any:
    return np.ones(shape, dtype)


def single(report_of: ModelProto) -> LayerCount:
    (layer,) = count_graph(report_of).layers
    return layer


def test_grouped_dilated_convolution_with_bias() -> None:
    conv = node("Conv", "x w b", group=2, dilations=[2, 2], strides=[2, 1], pads=[1, 2, 1, 2])
    layer = single(model([conv], {"x": (3, 4, 9, 8)}, ["y"], {"w": ones(6, 2, 3, 3), "b": ones(6)}))
    assert layer.output_shape == (3, 6, 4, 8)
    assert layer.macs == 3 * 6 * 4 * 8 * (4 // 2) * 9
    assert layer.other_ops == 3 * 6 * 4 * 8  # the bias
    assert (layer.params, layer.weight_bytes) == (6 * 2 * 9 + 6, 4 * (6 * 2 * 9 + 6))


@pytest.mark.parametrize(
    ("op", "inputs", "shapes", "weights", "attrs", "macs"),
    [
        ("Conv", "x w", {"x": (1, 3, 7)}, {"w": ones(4, 3, 3)}, {}, 4 * 5 * 3 * 3),
        ("Conv", "x w", {"x": (1, 2, 4, 4, 4)}, {"w": ones(3, 2, 2, 2, 2)}, {}, 3 * 27 * 2 * 8),
        # Every input element meets every weight of its channel, whatever is cropped later.
        ("ConvTranspose", "x w", {"x": (2, 4, 5, 5)}, {"w": ones(4, 3, 2, 2)},
         {"strides": [2, 2], "group": 2}, 2 * 4 * 25 * 3 * 4),
        ("Gemm", "x w b", {"x": (7, 5)}, {"w": ones(3, 7), "b": ones(3)},
         {"transA": 1, "transB": 1}, 5 * 7 * 3),
        ("MatMul", "x z", {"x": (2, 1, 3, 4), "z": (5, 4, 6)}, {}, {}, 2 * 5 * 3 * 4 * 6),
        ("MatMul", "x z", {"x": (4,), "z": (4,)}, {}, {}, 4),
        ("Einsum", "x z", {"x": (2, 3, 4), "z": (2, 5, 4)}, {}, {"equation": "bij,bkj->bik"},
         2 * 3 * 5 * 4),
        # x (T=3, B=2, I=4), hidden 5, both directions.
        ("LSTM", "x w r", {"x": (3, 2, 4)}, {"w": ones(2, 20, 4), "r": ones(2, 20, 5)},
         {"hidden_size": 5, "direction": "bidirectional"}, 2 * 3 * 2 * 20 * (4 + 5)),
        ("GRU", "x w r", {"x": (3, 2, 4)}, {"w": ones(1, 15, 4), "r": ones(1, 15, 5)},
         {"hidden_size": 5}, 3 * 2 * 15 * (4 + 5)),
        ("ConvInteger", "q w", {}, {"q": ones(1, 2, 4, 4, dtype=np.uint8),
         "w": ones(3, 2, 3, 3, dtype=np.int8)}, {}, 3 * 4 * 2 * 9),
    ],
)  # fmt: skip
def test_multiply_accumulates(
    op: str,
    inputs: str,
    shapes: dict[str, tuple[int, ...]],
    weights: dict[str, Any],
    attrs: dict[str, Any],
    macs: int,
) -> None:
    assert single(model([node(op, inputs, **attrs)], shapes, ["y"], weights)).macs == macs


@pytest.mark.parametrize("rank", [3, 4])
def test_attention_counts_both_products_and_shared_heads(rank: int) -> None:
    # 6 query heads, 2 key heads of 8 (values 4), 5 queries, 7 keys, batch 2.
    four = {"x": (2, 6, 5, 8), "k": (2, 2, 7, 8), "v": (2, 2, 7, 4)}
    three = {"x": (2, 5, 48), "k": (2, 7, 16), "v": (2, 7, 8)}
    attrs: dict[str, Any] = {"q_num_heads": 6, "kv_num_heads": 2} if rank == 3 else {}
    graph = model(
        [node("Attention", "x k v", **attrs)], four if rank == 4 else three, ["y"], opset=23
    )
    assert single(graph).macs == 2 * 6 * 5 * 7 * (8 + 4)


def contrib(op: str, inputs: str, **attrs: Any) -> NodeProto:
    return node(op, inputs, domain="com.microsoft", **attrs)


@pytest.mark.parametrize(
    ("made", "shapes", "weights", "out", "macs"),
    [
        (contrib("FusedConv", "x w", activation="Relu"), {"x": (1, 2, 4, 4)},
         {"w": ones(3, 2, 3, 3)}, (1, 3, 2, 2), 12 * 18),
        (contrib("FusedMatMul", "x z", transA=1, transB=1), {"x": (2, 4, 3), "z": (2, 5, 4)}, {},
         (2, 3, 5), 2 * 3 * 5 * 4),
        (contrib("MultiHeadAttention", "x k v", num_heads=2),
         {"x": (2, 3, 8), "k": (2, 5, 8), "v": (2, 5, 6)}, {}, (2, 3, 6), 2 * 3 * 5 * (8 + 6)),
        (contrib("Attention", "x w b", num_heads=2), {"x": (2, 3, 4)},
         {"w": ones(4, 12), "b": ones(12)}, (2, 3, 4), 2 * 3 * 4 * 12 + 2 * 3 * 3 * (4 + 4)),
    ],
)  # fmt: skip
def test_runtime_operators_are_counted_and_known_behind(
    made: NodeProto,
    shapes: dict[str, tuple[int, ...]],
    weights: dict[str, Any],
    out: tuple[int, ...],
    macs: int,
) -> None:
    layers = count_graph(model([made, node("Relu", "y", "z2")], shapes, ["z2"], weights)).layers
    assert layers[0].macs == macs
    assert layers[1].output_shape == out


def test_qdq_counts_weights_at_their_stored_width_and_not_the_scales() -> None:
    four_bit = helper.make_tensor("w4", TensorProto.INT4, [3, 2, 3, 3], [1] * 54)
    nodes = [
        node("QuantizeLinear", "x s z", "q"),
        node("DequantizeLinear", "q s z", "xd"),
        node("DequantizeLinear", "w4 ws", "wd", axis=0),
        node("DequantizeLinear", "b bs", "bd", axis=0),
        node("Conv", "xd wd bd", "c"),
        node("QuantizeLinear", "c s z", "cq"),
        node("DequantizeLinear", "cq s z", "y"),
    ]
    weights = {
        "s": np.float32(0.1), "z": np.uint8(3), "w4": four_bit, "ws": ones(3),
        "b": ones(3, dtype=np.int32), "bs": ones(3),
    }  # fmt: skip
    report = count_graph(model(nodes, {"x": (1, 2, 4, 4)}, ["y"], weights))
    by_name = {x.name: x for x in report.layers}
    assert report.macs == 12 * 18
    assert report.params == 54 + 3
    assert report.weight_bytes == 27 + 12 + 12 + 12 + 4 + 1
    assert by_name["Conv.c"].params == 57, "weights are charged to the layer that uses them"
    assert by_name["Conv.c"].other_ops == 12
    assert by_name["QuantizeLinear.q"].other_ops == 3 * 32
    assert by_name["DequantizeLinear.y"].other_ops == 2 * 12


def test_quantized_operators_and_shared_weights() -> None:
    qconv = node("QLinearConv", "q s z w s wz s z b", "qc")
    nodes = [node("QuantizeLinear", "x s z", "q"), qconv,
             node("DequantizeLinear", "qc s z", "f"), node("Flatten", "f", "g"),
             node("MatMul", "g m", "a"), node("MatMul", "a m", "y")]  # fmt: skip
    weights = {
        "s": np.float32(0.1), "z": np.uint8(3), "wz": np.int8(0), "m": ones(12, 12),
        "w": ones(3, 2, 3, 3, dtype=np.int8), "b": ones(3, dtype=np.int32),
    }  # fmt: skip
    report = count_graph(model(nodes, {"x": (1, 2, 4, 4)}, ["y"], weights))
    assert report.macs == 12 * 18 + 2 * 144
    assert report.params == 54 + 3 + 144, "a shared tensor is stored once"


def test_four_bit_matmul() -> None:
    bits = contrib("MatMulNBits", "x B scales", K=64, N=8, bits=4, block_size=32)
    weights = {"B": ones(8, 2, 16, dtype=np.uint8), "scales": ones(16)}
    report = count_graph(model([bits, node("Relu", "y", "r")], {"x": (5, 64)}, ["r"], weights))
    assert (report.macs, report.params) == (5 * 64 * 8, 64 * 8)
    assert report.weight_bytes == 8 * 2 * 16 + 64
    assert report.layers[1].output_shape == (5, 8)


def test_other_operations() -> None:
    nodes = [node("MaxPool", "x", "p", kernel_shape=[2, 3]), node("Relu", "p", "r"),
             node("Transpose", "r", "t", perm=[0, 2, 3, 1]), node("Softmax", "t", "s"),
             node("ReduceMean", "s", "y")]  # fmt: skip
    report = count_graph(model(nodes, {"x": (1, 2, 4, 4)}, ["y"]))
    assert [x.other_ops for x in report.layers] == [12 * 6, 12, 0, 12 * 5, 12]
    assert report.macs == 0


def body(nodes: list[NodeProto], inputs: list[Any], outputs: list[str]) -> GraphProto:
    return helper.make_graph(
        nodes, "body", inputs, [helper.make_tensor_value_info(o, F, None) for o in outputs]
    )


def test_if_counts_its_dearest_branch_and_stores_both() -> None:
    dear, cheap = node("MatMul", "x m", "a"), node("Relu", "r", "b")
    weight = numpy_helper.from_array(ones(4, 3), "n")
    small = body([node("MatMul", "x n", "r"), cheap], [], ["b"])
    small.initializer.append(weight)
    branch = node("If", "c", then_branch=body([dear], [], ["a"]), else_branch=small)
    graph = model([branch], {"x": (2, 4)}, ["y"], {"m": ones(4, 4), "c": np.bool_(True)})
    # The branches differ in width, so the result of If has no one shape: stated by the file.
    graph.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", F, (2, 4)))
    report = count_graph(graph)
    assert report.macs == 2 * 4 * 4
    assert report.params == 16 + 12


def loop(rounds: str) -> NodeProto:
    inputs = [
        helper.make_tensor_value_info("i", I64, []),
        helper.make_tensor_value_info("go", TensorProto.BOOL, []),
        helper.make_tensor_value_info("h", F, None),
    ]
    inner = [node("Identity", "go", "gone"), node("MatMul", "h m", "hn")]
    return node("Loop", f"{rounds} _ x", body=body(inner, inputs, ["gone", "hn"]))


def test_loop_counts_its_rounds_and_refuses_an_unknown_number() -> None:
    weights = {"m": ones(4, 4), "n": np.int64(6)}
    fixed = model([loop("n")], {"x": (2, 4)}, ["y"], weights)
    fixed.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", F, (2, 4)))
    report = count_graph(fixed)
    assert (report.macs, report.params) == (6 * 2 * 4 * 4, 16)
    fixed.graph.node[0].input[0] = ""
    with pytest.raises(UnsupportedError, match="EB210"):
        count_graph(fixed)


def test_shape_arithmetic_is_followed() -> None:
    # The Expand and Reshape of older exporters: shapes computed by nodes, one of them by Where.
    nodes = [
        node("Shape", "x", "s"),
        node("ConstantOfShape", "two", "o", value=helper.make_tensor("v", I64, [1], [1])),
        node("Equal", "o o", "e"),
        node("Where", "e s o", "d"),
        node("Expand", "k d", "kx"),
        node("MatMul", "x kx", "y"),
    ]
    weights = {"two": np.array([2]), "k": ones(4, 1)}
    assert count_graph(model(nodes, {"x": (4, 4)}, ["y"], weights)).macs == 64


@pytest.mark.parametrize(
    ("made", "shape", "code"),
    [
        (node("Relu", "x"), ("batch", 3), "EB211"),
        (node("Resize", "x _ scales"), ("batch", 3), "EB211"),
        (node("NonZero", "x"), (2, 3), "EB213"),
        (node("MatMul", "x scales"), (2, 3), "EB212"),
    ],
)
def test_what_has_no_fixed_cost_is_refused(made: NodeProto, shape: Any, code: str) -> None:
    graph = model([made], {"x": shape}, ["y"], {"scales": ones(2)})
    with pytest.raises(UnsupportedError) as caught:
        count_graph(graph)
    assert caught.value.code == code
    assert caught.value.hint


def test_an_operator_without_a_rule_is_named() -> None:
    made = helper.make_node("Magic", ["x"], ["y"], domain="my.ops", name="head/magic")
    graph = model([made], {"x": (2, 3)}, ["y"])
    graph.opset_import.append(helper.make_opsetid("my.ops", 1))
    with pytest.raises(UnsupportedError, match=r"EB213.*my\.ops:Magic.*head/magic"):
        count_graph(graph)


@pytest.mark.parametrize(
    ("equation", "shapes", "macs"),
    [
        ("ij,jk", [(2, 3), (3, 4)], 24),
        ("...ij,...jk->...ik", [(5, 1, 2, 3), (6, 3, 4)], 5 * 6 * 24),
        ("ij,jk,kl->il", [(2, 3), (3, 4), (4, 5)], 24 + 2 * 4 * 5),
        ("ii->i", [(3, 3)], 0),
        ("i,i->", [(7,), (7,)], 7),
    ],
)
def test_einsum(equation: str, shapes: list[tuple[int, ...]], macs: int) -> None:
    assert einsum_macs(equation, shapes) == macs


def test_count_dispatches_on_the_stage_and_says_what_it_counts() -> None:
    graph = model([node("MatMul", "x m")], {"x": (2, 4)}, ["y"], {"m": ones(4, 3)})
    assert count(Program("graph", graph, (), ("y",))).macs == 24
    assert "FLOPs = 2 x MACs" in DEFINITION
    assert max(map(len, DEFINITION.splitlines())) <= 100


def test_large_weights_need_not_be_loaded() -> None:
    weight = TensorProto(name="w", data_type=F, dims=[1024, 1024])
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="nowhere.bin")
    graph = model([node("MatMul", "x w")], {"x": (1, 1024)}, ["y"], {"w": weight})
    before = graph.SerializeToString(deterministic=True)
    report = count_graph(graph)
    assert (report.macs, report.weight_bytes) == (2**20, 2**22)
    assert graph.SerializeToString(deterministic=True) == before, "counting changes nothing"


def test_local_functions_are_looked_into() -> None:
    twice = helper.make_function(
        "own", "Twice", ["a", "b"], ["d"],
        [node("MatMul", "a b", "c"), node("MatMul", "c b", "d")],
        [helper.make_opsetid("", 21)],
    )  # fmt: skip
    graph = model(
        [helper.make_node("Twice", ["x", "m"], ["y"], domain="own")],
        {"x": (2, 4)},
        ["y"],
        {"m": ones(4, 4)},
    )
    graph.opset_import.append(helper.make_opsetid("own", 1))
    graph.functions.append(twice)
    assert count_graph(graph).macs == 2 * 2 * 16
