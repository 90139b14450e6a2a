"""Decide which nodes become integer, and at which width, for one target."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from edgebudget.quant_graph import CLAMP_OPS, MAC_OPS, MOVE_OPS, Graph
from edgebudget_passes._tail import after_pooling

if TYPE_CHECKING:
    import onnx

    from edgebudget.target import TargetSpec

# Operators besides the multiplying ones for which ONNX Runtime's CPU has integer kernels; other
# engines name theirs.
_CPU_OPS = frozenset(
    {"Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool", "LeakyRelu", "Sigmoid"}
)
_CPU_MACS = frozenset({"Conv", "Gemm", "MatMul"})
_NO_INTEGER = frozenset(
    {"Constant", "ConstantOfShape", "Shape", "Size", "Range", "QuantizeLinear", "DequantizeLinear"}
)


@dataclass(frozen=True, slots=True)
class Assignment:
    """Integer nodes and their activation type, those that give float sums, and the reasons.

    Outputs in `narrowed` are made in 16 bits and given in 8.
    """

    dtypes: dict[str, str]
    open: frozenset[str]
    declined: dict[str, str]  # node name -> why it stays float
    narrowed: frozenset[str] = frozenset()


def units(graph: Graph, target: TargetSpec) -> list[onnx.NodeProto]:
    """Nodes with weights that this target can run in integers."""
    allowed = _CPU_MACS if target.family == "cpu" else MAC_OPS
    return [n for n in graph.nodes if n.op_type in allowed and graph.has_weight(n)]


def named(patterns: Collection[str], graph: Graph) -> frozenset[str]:
    """Node names that match one of the patterns."""
    return frozenset(n.name for n in graph.nodes if any(fnmatchcase(n.name, p) for p in patterns))


def assign(
    graph: Graph, target: TargetSpec, keep_float: frozenset[str], wide: frozenset[str]
) -> Assignment:
    """Integer form of the graph with `keep_float` nodes in float and `wide` ones in 16 bits."""
    if target.family == "cpu":
        return _for_cpu(graph, target, keep_float)
    return _for_all(graph, target, keep_float, wide)


def _for_cpu(graph: Graph, target: TargetSpec, keep_float: frozenset[str]) -> Assignment:
    """Weighted nodes, and what lies between them; after the last one the graph stays float.

    A value that no weighted node reads again gains nothing from 8 bits, only rounding. The
    exception joins integer values: in float, each of them would be converted, and laid out anew.
    """
    dtype = target.activation_dtypes[0]
    joining = frozenset(target.options.get("integer_ops", "").split()) or _CPU_OPS
    macs = {n.name for n in units(graph, target)} - keep_float
    declined = {n: "asked for" for n in keep_float}
    for node in graph.nodes:
        if node.op_type in MAC_OPS and node.name not in macs and node.name not in declined:
            declined[node.name] = _why_float(graph, node)
    chosen: set[str] = set()
    for node in reversed(graph.nodes):
        feeds = any(r.name in chosen for o in node.output for r in _readers(graph, node, o))
        joins = feeds and node.name not in keep_float and _cpu_can(graph, node, joining)
        if node.name in macs or joins:
            chosen.add(node.name)
    made: set[str] = set(graph.inputs)
    integer: set[str] = set()
    for node in graph.nodes:
        data = [n for _, n in graph.data_inputs(node)]
        if node.name not in chosen:
            joins = len(data) > 1 and integer.issuperset(data) and node.name not in keep_float
            if not (joins and _cpu_can(graph, node, joining)):
                continue
            chosen.add(node.name)
        if node.name not in macs and not any(n in made for n in data):
            chosen.discard(node.name)
            continue
        integer.update((*node.output, graph.result(node)))
        made.update(node.output)
        made.add(graph.result(node))
    opened = {
        n.name
        for n in graph.nodes
        if n.name in chosen
        and target.options.get("float_sums") != "false"
        and n.op_type in {"Gemm", "MatMul"}
        and not any(r.name in chosen for r in graph.readers[graph.result(n)])
    }
    return Assignment({n: dtype for n in chosen}, frozenset(opened), declined)


def _readers(graph: Graph, node: onnx.NodeProto, output: str) -> list[onnx.NodeProto]:
    return graph.readers[graph.result(node) if output == node.output[0] else output]


def _cpu_can(graph: Graph, node: onnx.NodeProto, joining: frozenset[str]) -> bool:
    data = graph.data_inputs(node)
    if not data or not graph.is_float(node.output[0]):
        return False
    if node.op_type in MOVE_OPS:
        return data[0][0] == 0 and data[0][1] not in graph.weights
    return node.op_type in joining and not any(n in graph.weights for _, n in data)


def _why_float(graph: Graph, node: onnx.NodeProto) -> str:
    if node.op_type == "ConvTranspose":
        return "this engine has no integer kernel for ConvTranspose"
    if not graph.has_weight(node):
        return "its weights are computed, not stored"
    return f"this engine has no integer kernel for {node.op_type}"


def _for_all(
    graph: Graph, target: TargetSpec, keep_float: frozenset[str], wide: frozenset[str]
) -> Assignment:
    """Every node that touches float values; a node that reads a 16-bit value is 16-bit too.

    Weighted nodes alone decide for themselves: they convert what they read. What follows the
    last average is computed in 16 bits, and given in 8 unless more was asked for.
    """
    narrow = target.activation_dtypes[0]
    tail = after_pooling(graph) if "uint16" in target.activation_dtypes else frozenset()
    dtypes: dict[str, str] = {}
    declined = {}
    made: dict[str, str] = {}
    for node in graph.nodes:
        if any(a.HasField("g") or a.graphs for a in node.attribute):
            declined[node.name] = "it holds a graph of its own"
            continue
        if node.op_type in _NO_INTEGER or not _touches_float(graph, node):
            continue
        if node.name in keep_float and target.float_fallback:
            declined[node.name] = "asked for"
            continue
        read = {made[n] for _, n in graph.data_inputs(node) if n in made}
        follows = "uint16" in read and not graph.has_weight(node)
        dtype = "uint16" if node.name in wide or node.name in tail or follows else narrow
        dtypes[node.name] = dtype
        made.update({o: dtype for o in (*node.output, graph.result(node))})
    for name, clamp in graph.clamps.items():
        if name in dtypes and clamp.op_type in CLAMP_OPS:
            dtypes.pop(clamp.name, None)
    given = {o for n in tail - wide if n in dtypes for o in _results(graph, graph.by_name[n])}
    return Assignment(dtypes, frozenset(), declined, graph.outputs & given)


def _results(graph: Graph, node: onnx.NodeProto) -> tuple[str, ...]:
    return (*node.output, graph.result(node))


def _touches_float(graph: Graph, node: onnx.NodeProto) -> bool:
    dynamic = any(n not in graph.weights for _, n in graph.data_inputs(node))
    return dynamic or any(o and graph.is_float(o) for o in node.output)
