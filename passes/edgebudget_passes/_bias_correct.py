"""Move the mean error that rounding adds to each layer's output into its bias.

Each layer is compared with its own integer form on the *float* network's activations, all in one
run, so that no layer corrects for another's error: "Data-Free Quantization Through Weight
Equalization and Bias Correction", Nagel et al., 2019, appendix D.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgebudget import graph as graphs
from edgebudget.qdq import Plan, along, step_for
from edgebudget.ranges import run_over

if TYPE_CHECKING:
    from edgebudget.events import Emit
    from edgebudget.quant_graph import Graph
    from edgebudget.workload import Array, Dataset

_AXES_AS_INPUT = 18  # the operator set from which ReduceMean takes its axes as an input


def shifts(
    graph: Graph,
    plan: Plan,
    dataset: Dataset,
    indices: Sequence[int],
    emit: Emit,
    exact: bool,
) -> dict[str, Array]:
    """Node name -> what to add to its bias, [channels], from the given samples.

    `exact` is the target's: what clips there is corrected.

    Raises:
        ArtifactError: EB520, a sample holds NaN or infinity.
    """
    nodes = [
        n
        for n in graph.nodes
        if n.op_type in {"Conv", "Gemm"} and n.name in plan.dtypes and graph.has_weight(n)
    ]
    if not nodes:  # nothing has a bias: a run that watches nothing is an error to the engine
        return {}
    total: dict[str, Array] = {}
    count = 0
    paired = _paired(graph, plan, nodes)
    for _, out in run_over(
        paired, dataset, indices, emit=emit, work="bias correction", exact=exact
    ):
        for i, node in enumerate(nodes):
            gap = out[f"eb.float.{i}"].astype(np.float64) - out[f"eb.whole.{i}"]
            total[node.name] = total.get(node.name, 0.0) + gap.reshape(-1)
        count += 1
    return {k: (v / count).astype(np.float32) for k, v in total.items()}


def _paired(graph: Graph, plan: Plan, nodes: Sequence[onnx.NodeProto]) -> onnx.ModelProto:
    """The float model with each layer's mean output, and that of its integer form, as outputs."""
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    body = model.graph
    del body.output[:]

    def store(name: str, value: Array) -> str:
        body.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    for i, node in enumerate(nodes):
        source = node.input[0]
        if plan.dtypes[node.name] == "uint8":
            source = f"eb.x.{i}"
            scale, zero = step_for(graph, plan, node.input[0], "uint8")
            step = [
                store(f"eb.s.{i}", np.asarray(scale, np.float32)),
                store(f"eb.z.{i}", np.asarray(zero, np.uint8)),
            ]
            body.node.append(
                helper.make_node("QuantizeLinear", [node.input[0], *step], [f"eb.q.{i}"])
            )
            body.node.append(helper.make_node("DequantizeLinear", [f"eb.q.{i}", *step], [source]))
        weight = graph.weights[node.input[1]]
        steps = along(plan.scales[node.name], graph.channel_axis(node), weight.ndim)
        whole = np.clip(np.rint(weight / steps), -127, 127) * steps
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.name, copy.output[0] = f"eb.{node.name}", f"eb.y.{i}"
        copy.input[0], copy.input[1] = source, store(f"eb.w.{i}", whole.astype(np.float32))
        body.node.append(copy)
        rank = len(graph.shape(node.output[0]) or (1,) * weight.ndim)
        for value, name in ((node.output[0], f"eb.float.{i}"), (f"eb.y.{i}", f"eb.whole.{i}")):
            body.node.append(_mean(model, value, name, [a for a in range(rank) if a != 1]))
            body.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    return model


def _mean(model: onnx.ModelProto, value: str, name: str, axes: list[int]) -> onnx.NodeProto:
    if graphs.opset(model) < _AXES_AS_INPUT:
        return helper.make_node("ReduceMean", [value], [name], axes=axes, keepdims=0)
    stored = f"{name}.axes"
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(axes, np.int64), stored))
    return helper.make_node("ReduceMean", [value, stored], [name], keepdims=0)
