"""The count on an exported ONNX graph: the truth every budget is proven on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from edgebudget.count_onnx_rules import MACS, OTHER, Call
from edgebudget.counter import CountReport, LayerCount
from edgebudget.onnx_contrib import CONTRIB, attributes
from edgebudget.onnx_shapes import (
    TensorInfo,
    Tensors,
    constants,
    infer,
    inlined,
    label,
    subgraphs,
    used,
    within,
)
from edgebudget_runtime.errors import UnsupportedError

# Operand slots that hold settings rather than weights, where a float tensor may sit.
_SETTINGS: Mapping[str, frozenset[int]] = {
    "QuantizeLinear": frozenset({1, 2}),
    "DequantizeLinear": frozenset({1, 2}),
    "QLinearConv": frozenset({1, 2, 4, 5, 6, 7}),
    "QLinearMatMul": frozenset({1, 2, 4, 5, 6, 7}),
    "QGemm": frozenset({1, 2, 4, 5, 7, 8}),
    "QLinearAdd": frozenset({1, 2, 4, 5, 6, 7}),
    "QLinearMul": frozenset({1, 2, 4, 5, 6, 7}),
    "ConvInteger": frozenset({2, 3}),
    "MatMulInteger": frozenset({2, 3}),
    "MatMulIntegerToFloat": frozenset({2, 3, 4, 5}),
    "DynamicQuantizeMatMul": frozenset({2, 3}),
    "MatMulNBits": frozenset({2, 3, 4}),
    "Resize": frozenset({1, 2}),
    "Upsample": frozenset({1}),
    "Clip": frozenset({1, 2}),
    "Pad": frozenset({1, 2, 3}),
    "Dropout": frozenset({1, 2}),
}
# Operand slots where an integer tensor is a quantized weight or bias.
_QUANTIZED: Mapping[str, frozenset[int]] = {
    "DequantizeLinear": frozenset({0}),
    "QLinearConv": frozenset({3, 8}),
    "QLinearMatMul": frozenset({0, 3}),
    "QGemm": frozenset({0, 3, 6}),
    "QLinearAdd": frozenset({0, 3}),
    "QLinearMul": frozenset({0, 3}),
    "ConvInteger": frozenset({0, 1}),
    "MatMulInteger": frozenset({0, 1}),
    "MatMulIntegerToFloat": frozenset({0, 1}),
    "DynamicQuantizeMatMul": frozenset({1}),
    "MatMulNBits": frozenset({1}),
}
# A constant that only passes through these belongs to the operator behind them.
_PREPARES = frozenset(
    {"DequantizeLinear", "QuantizeLinear", "Identity", "Cast", "Transpose", "Reshape", "Unsqueeze"}
)


def count_graph(model: ModelProto) -> CountReport:
    """Count an ONNX model with static shapes.

    Raises:
        UnsupportedError: EB210 a loop of unknown length, EB211 a dynamic dimension, EB212 an
            unknown shape, EB213 an operator without a rule, EB215 storage without a size.
    """
    model = inlined(model)
    return CountReport(tuple(_layers(model.graph, infer(model), "")))


@dataclass(slots=True)
class _Stored:
    """Constants charged to one node."""

    params: int = 0
    nbytes: int = 0


def _layers(graph: GraphProto, known: Tensors, prefix: str) -> list[LayerCount]:
    charged = _charge(graph)
    layers = []
    for index, node in enumerate(graph.node):
        if node.op_type == "Constant":
            continue
        own = charged[index]
        layer, inner = _layer(graph, index, known, prefix)
        params, nbytes = layer.params + own.params, layer.weight_bytes + own.nbytes
        layers += [replace(layer, params=params, weight_bytes=nbytes), *inner]
    if charged[-1].nbytes:
        layers.append(
            LayerCount(f"{prefix}(unused)", "Constant", 0, 0, 0, charged[-1].nbytes, (), "")
        )
    return layers


def _layer(
    graph: GraphProto, index: int, known: Tensors, prefix: str
) -> tuple[LayerCount, list[LayerCount]]:
    """One node, and the nodes its subgraphs execute."""
    node = graph.node[index]
    name = prefix + label(node, index)
    op = _key(node, name)
    outputs = [known.need(o, node) for o in node.output if o]
    inputs = [known.need(i, node) if i else None for i in node.input]
    call = Call(name, op, attributes(node), inputs, outputs[0])
    layer = LayerCount(
        name=name,
        op=node.op_type,
        macs=MACS[op](call) if op in MACS else 0,
        other_ops=OTHER[op](call),
        params=0,
        weight_bytes=0,
        output_shape=outputs[0].shape,
        output_dtype=outputs[0].dtype,
    )
    if not subgraphs(node):
        return layer, []
    return _control_flow(graph, node, known, layer)


def _key(node: NodeProto, name: str) -> str:
    op = node.op_type
    if node.domain == CONTRIB and op == "Attention":
        op = f"{CONTRIB}:{op}"
    if node.domain in ("", "ai.onnx", CONTRIB) and op in OTHER:
        return op
    domain = node.domain or "ai.onnx"
    raise UnsupportedError(
        "EB213",
        f"no counting rule for operator {domain}:{node.op_type} (node {name!r})",
        hint="export it as standard ONNX operators",
    )


def _control_flow(
    graph: GraphProto, node: NodeProto, known: Tensors, layer: LayerCount
) -> tuple[LayerCount, list[LayerCount]]:
    """The dearest branch of If, the longest run of Loop and Scan; all of it is stored once."""
    bodies = []
    for body, given in inner_graphs(node, known):
        inner = _layers(body, within(body, known, given), f"{layer.name}/")
        bodies.append((sum(x.macs for x in inner), sum(x.other_ops for x in inner), inner))
    times = 1 if node.op_type == "If" else _rounds(graph, node, known, layer.name)
    dearest = max(range(len(bodies)), key=lambda i: bodies[i][:2])
    skipped = [x for i, b in enumerate(bodies) if i != dearest for x in b[2]]
    layer = replace(
        layer,
        params=sum(x.params for x in skipped),
        weight_bytes=sum(x.weight_bytes for x in skipped),
    )
    inner = [
        replace(x, macs=x.macs * times, other_ops=x.other_ops * times) for x in bodies[dearest][2]
    ]
    return layer, inner


def inner_graphs(node: NodeProto, known: Tensors) -> list[tuple[GraphProto, dict[str, TensorInfo]]]:
    """Subgraphs of a control-flow node, with the shapes of their formal inputs."""
    found = []
    for body in subgraphs(node):
        formal = [i.name for i in body.input]
        given: dict[str, TensorInfo] = {}
        if node.op_type == "Loop":
            given = {formal[0]: TensorInfo((), "int64"), formal[1]: TensorInfo((), "bool")}
            actual, formal = [known.need(i, node) for i in node.input[2:]], formal[2:]
        else:
            actual = [known.need(i, node) for i in node.input]
            if node.op_type == "Scan":
                scanned = int(attributes(node)["num_scan_inputs"])
                axes = attributes(node).get("scan_input_axes") or [0] * scanned
                first = len(actual) - scanned
                for k, axis in enumerate(axes, start=first):
                    shape = list(actual[k].shape)
                    del shape[axis]
                    actual[k] = TensorInfo(tuple(shape), actual[k].dtype)
        given.update(zip(formal, actual, strict=False))
        found.append((body, given))
    return found


def _rounds(graph: GraphProto, node: NodeProto, known: Tensors, name: str) -> int:
    if node.op_type == "Scan":
        attrs = attributes(node)
        scanned = int(attrs["num_scan_inputs"])
        axis = int((attrs.get("scan_input_axes") or [0])[0])
        return known.need(node.input[len(node.input) - scanned], node).shape[axis]
    value = _constant(graph, node.input[0]) if node.input[0] else None
    if value is None:
        raise UnsupportedError(
            "EB210",
            f"loop {name!r} has no constant number of rounds, so its cost has no bound",
            hint="unroll the loop, or export it with a fixed trip count",
        )
    return int(onnx.numpy_helper.to_array(value).item())


def _constant(graph: GraphProto, name: str) -> TensorProto | None:
    found: list[TensorProto] = [t for t in graph.initializer if t.name == name]
    for node in graph.node:
        if node.op_type == "Constant" and name in node.output:
            found += [a.t for a in node.attribute if a.HasField("t")]
    return found[0] if found else None


def _charge(graph: GraphProto) -> defaultdict[int, _Stored]:
    """Charge every constant to its first user (-1: nobody), seen through what prepares it."""
    users: defaultdict[str, list[int]] = defaultdict(list)
    for index, node in enumerate(graph.node):
        for name in dict.fromkeys(used([node])):
            users[name].append(index)
    stored = dict(constants(graph))
    fixed = set(stored)  # constants, and what is merely prepared from them
    for node in graph.node:
        if node.op_type in _PREPARES and all(i in fixed for i in node.input if i):
            fixed.update(node.output)
    charged: defaultdict[int, _Stored] = defaultdict(_Stored)
    for name, info in stored.items():
        owner, result = -1, name
        while users[result] and result in fixed:
            owner = users[result][0]
            result = next(iter(graph.node[owner].output), "")
        charged[owner].nbytes += info.nbytes
        charged[owner].params += max(
            (_parameters(graph.node[i], name, info) for i in users[name]), default=0
        )
    return charged


def _parameters(node: NodeProto, name: str, info: TensorInfo) -> int:
    slots = {i for i, n in enumerate(node.input) if n == name}
    if node.op_type == "MatMulNBits" and 1 in slots:
        attrs = attributes(node)
        return int(attrs["N"]) * int(attrs["K"])
    if not info.is_float:
        keep = bool(slots & _QUANTIZED.get(node.op_type, frozenset()))
    elif slots:
        keep = info.shape != () and bool(slots - _SETTINGS.get(node.op_type, frozenset()))
    else:  # a subgraph of this node reads it
        keep = info.shape != ()
    return info.elements if keep else 0
