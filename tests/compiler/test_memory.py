"""The memory planner against hand-computed peaks, and against bounds that always hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from edgebudget.memory import plan_memory

F = TensorProto.FLOAT


def node(op: str, inputs: str, output: str, **attrs: Any) -> NodeProto:
    return helper.make_node(op, inputs.split(), [output], name=output, **attrs)


def model(
    nodes: list[NodeProto],
    shape: tuple[int, ...],
    outputs: list[str],
    weights: dict[str, Any] | None = None,
) -> ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", F, shape)],
        [helper.make_tensor_value_info(o, F, None) for o in outputs],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in (weights or {}).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])


def ones(*shape: int, dtype: Any = np.float32) -> Any:
    return np.ones(shape, dtype)


def test_a_chain_holds_two_tensors_and_a_residual_three() -> None:
    chain = [node("Relu", "x", "a"), node("Relu", "a", "b"), node("Relu", "b", "y")]
    assert plan_memory(model(chain, (1, 100), ["y"])).peak_activation_bytes == 800
    residual = [node("Relu", "x", "a"), node("Relu", "a", "b"), node("Add", "x b", "y")]
    plan = plan_memory(model(residual, (1, 100), ["y"]))
    assert plan.peak_activation_bytes == 1200
    assert plan.peak_at == "b"
    assert plan.tensors == (("a", 400), ("b", 400), ("x", 400))
    assert plan.live == (("a", 800), ("b", 1200), ("y", 1200))


def test_views_share_storage_and_weights_are_counted_once() -> None:
    nodes = [node("Flatten", "x", "f"), node("Identity", "f", "i"), node("MatMul", "i w", "m"),
             node("MatMul", "m w", "y")]  # fmt: skip
    plan = plan_memory(model(nodes, (1, 10, 10), ["y"], {"w": ones(100, 100)}))
    assert plan.peak_activation_bytes == 800
    assert plan.weight_bytes == 40_000
    assert plan.total_bytes == 40_800


def test_outputs_stay_to_the_end_and_views_keep_their_source_alive() -> None:
    nodes = [node("Relu", "x", "a"), node("Flatten", "a", "f"), node("Relu", "a", "b"),
             node("Relu", "b", "c"), node("Add", "f c", "y")]  # fmt: skip
    assert plan_memory(model(nodes, (1, 100), ["y", "a"])).peak_activation_bytes == 1200


def qdq(name: str, source: str) -> list[NodeProto]:
    return [node("QuantizeLinear", f"{source} s z", f"{name}q"),
            node("DequantizeLinear", f"{name}q s z", name)]  # fmt: skip


QUANTIZATION = {"s": np.float32(0.1), "z": np.uint8(3)}
WEIGHTS = {**QUANTIZATION, "w": ones(4, 4, 3, 3, dtype=np.int8), "ws": np.float32(0.1)}


def conv(name: str, source: str) -> list[NodeProto]:
    return [node("DequantizeLinear", "w ws", f"{name}w"),
            node("Conv", f"{source} {name}w", name, pads=[1] * 4)]  # fmt: skip


def test_quantized_regions_are_stored_as_integers() -> None:
    # x (float, 1600 B) -> q0 -> conv+relu -> q1 -> conv -> q2 -> y (float)
    nodes = [*qdq("x0", "x"), *conv("c1", "x0"), node("Relu", "c1", "r1"), *qdq("x1", "r1"),
             *conv("c2", "x1"), *qdq("y", "c2")]  # fmt: skip
    plan = plan_memory(model(nodes, (1, 4, 10, 10), ["y"], WEIGHTS))
    live = dict(plan.live)
    assert live["x0q"] == 1600 + 400, "the float input is written into integers"
    assert live["c1"] == live["c2"] == 800, "input and output, both integers"
    assert live["r1"] == 400, "part of the convolution before it"
    assert live["y"] == 400 + 1600
    assert plan.peak_activation_bytes == 2000
    assert plan.weight_bytes == 144 + 4 + 4 + 1


def test_a_float_operator_behind_a_dequantize_needs_real_floats() -> None:
    nodes = [*qdq("x0", "x"), *conv("c1", "x0"), *qdq("x1", "c1"), node("Erf", "x1", "e"),
             node("Erf", "e", "y")]  # fmt: skip
    live = dict(plan_memory(model(nodes, (1, 4, 10, 10), ["y"], WEIGHTS)).live)
    assert live["c1"] == 800, "the convolution itself is all integer"
    assert live["x1"] == 400 + 1600
    assert live["e"] == 3200


def test_weight_only_quantization_holds_float_weights_while_they_are_used() -> None:
    nodes = [*conv("c1", "x"), *conv("c2", "c1")]
    nodes = [nodes[0], nodes[2], nodes[1], nodes[3]]  # both weights dequantized first
    live = dict(plan_memory(model(nodes, (1, 4, 10, 10), ["c2"], WEIGHTS)).live)
    assert live["c1"] == live["c2"] == 3200 + 4 * 144


def test_memory_of_the_dearest_branch_is_added() -> None:
    inner = [node("Expand", "x wide", "big"), node("ReduceMax", "big axis", "a", keepdims=1)]
    then = helper.make_graph(inner, "t", [], [helper.make_tensor_value_info("a", F, None)])
    other = helper.make_graph(
        [node("Relu", "x", "b")], "e", [], [helper.make_tensor_value_info("b", F, None)]
    )
    branch = node("If", "c", "y", then_branch=then, else_branch=other)
    weights = {"wide": np.array([8, 100]), "axis": np.array([0]), "c": np.bool_(True)}
    graph = model([branch], (1, 100), ["y"], weights)
    graph.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", F, (1, 100)))
    plan = plan_memory(graph)
    assert plan.peak_activation_bytes == 400 + 400 + 3200 + 400
    assert plan.tensors[0] == ("big", 3200)


@st.composite
def graphs(draw: Any) -> ModelProto:
    """Random acyclic float graphs with views, joins and several outputs."""
    known = ["x"]
    nodes: list[NodeProto] = []
    for index in range(draw(st.integers(1, 12))):
        op = draw(st.sampled_from(["Relu", "Identity", "Add", "Concat", "Flatten"]))
        sources = [draw(st.sampled_from(known)) for _ in range(2 if op in ("Add", "Concat") else 1)]
        if op == "Add":
            sources = [sources[0]] * 2
        attrs = {"axis": 1} if op in ("Concat", "Flatten") else {}
        nodes.append(node(op, " ".join(sources), f"t{index}", **attrs))
        known.append(f"t{index}")
    outputs = sorted({known[-1], draw(st.sampled_from(known[1:]))})
    return model(nodes, (2, 5), outputs)


@given(graphs())
@settings(deadline=None, derandomize=True)
def test_the_peak_lies_between_its_bounds(graph: ModelProto) -> None:
    plan = plan_memory(graph)
    inferred = onnx.shape_inference.infer_shapes(graph).graph
    size = {
        v.name: 4 * int(np.prod([d.dim_value for d in v.type.tensor_type.shape.dim]))
        for v in (*inferred.input, *inferred.output, *inferred.value_info)
    }
    store: dict[str, str] = {"x": "x"}
    for n in graph.graph.node:
        view = n.op_type in ("Identity", "Flatten")
        store[n.output[0]] = store[n.input[0]] if view else n.output[0]
    for n, (_, live) in zip(graph.graph.node, plan.live, strict=True):
        assert live >= sum(size[s] for s in {store[t] for t in (*n.input, *n.output)})
    assert plan.peak_activation_bytes == max(live for _, live in plan.live)
    assert plan.peak_activation_bytes <= sum(size[s] for s in set(store.values()))
    assert sum(b for _, b in plan.tensors) == plan.peak_activation_bytes


def test_planning_changes_nothing() -> None:
    graph = model([node("Relu", "x", "y")], (1, 4), ["y"])
    before = graph.SerializeToString(deterministic=True)
    assert plan_memory(graph) == plan_memory(graph)
    assert graph.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("batch", [1, 3])
def test_activations_scale_with_the_batch(batch: int) -> None:
    plan = plan_memory(model([node("Relu", "x", "y")], (batch, 25), ["y"]))
    assert plan.peak_activation_bytes == 200 * batch
