"""Half precision inside a float graph; inputs and outputs stay as they are.

IEEE 754 half precision: 11 bits of significand, largest value 65504.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgebudget import graph as graphs

if TYPE_CHECKING:
    from edgebudget.program import Program

LARGEST = 65504.0
_LOST = 0.01  # of an output's largest magnitude: what half precision may move it by
# Operators that take no half-precision numbers, or count with them.
_SINGLE = frozenset(
    "CumSum EyeLike Multinomial NonMaxSuppression RandomNormal RandomNormalLike RandomUniform "
    "RandomUniformLike Range RoiAlign".split()
)
# Inputs that are single precision by the operator's definition.
_SINGLE_INPUTS = {"Resize": (1, 2), "Upsample": (1,)}


def why_not_half(model: onnx.ModelProto) -> str:
    """Why a graph cannot be converted; empty where it can."""
    for node in model.graph.node:
        if any(a.HasField("g") or a.graphs for a in node.attribute):
            return f"{node.op_type} {node.name!r} holds a graph of its own"
        if node.op_type in {"QuantizeLinear", "DequantizeLinear"} or "Integer" in node.op_type:
            return "the graph computes with integers"
    for weight in model.graph.initializer:
        if weight.data_type == TensorProto.FLOAT:
            value = numpy_helper.to_array(weight)
            if value.size and not np.abs(value).max() <= LARGEST:
                return f"weight {weight.name!r} exceeds {LARGEST:.0f}"
    return ""


def halved(program: Program) -> tuple[Program | None, str]:
    """The program in half precision, or None; and what was seen on a seeded probe, in words."""
    if why := why_not_half(program.body):
        return None, f"single precision: {why}"
    values = graphs.probe(program.inputs)
    half = to_half(program.body)
    before, after = (graphs.run(m, values) for m in (program.body, rounded(half)))
    gap = graphs.difference(list(before.values()), [after[k] for k in before])
    if not gap <= _LOST:
        return None, f"single precision: half moves an output by {gap:.2g} of its largest, on noise"
    return replace(program, body=half), (
        f"half precision: outputs on noise within {gap:.2g} of their largest magnitude"
    )


def to_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph in half precision, converted at its inputs and outputs.

    Few operators stay in single precision, between conversions. Equal graphs give equal bytes.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    types = _float_values(model)
    writer = _Writer(result.graph, types)
    for node in model.graph.node:
        writer.add(node)
    writer.finish()
    return result


def to_single(model: onnx.ModelProto) -> onnx.ModelProto:
    """A half-precision graph in single precision: the same weights, finer arithmetic."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    _retype(result.graph, TensorProto.FLOAT16, TensorProto.FLOAT)
    for node in result.graph.node:
        _retype_node(node, TensorProto.FLOAT16, TensorProto.FLOAT)
    return result


def rounded(half: onnx.ModelProto) -> onnx.ModelProto:
    """What a half-precision graph computes, for engines that lack it: each value is rounded.

    ONNX Runtime's CPU engine runs half-precision graphs in single precision from end to end, and
    would hide what the rounding costs, and what leaves the range.
    """
    result = to_single(half)
    floats = _float_values(half)  # single precision there: not to be rounded here
    outputs = {o.name for o in half.graph.output}
    known = _float_values(result)
    used = set(known)
    nodes: list[onnx.NodeProto] = []
    for node in result.graph.node:
        nodes.append(node)
        for i, name in enumerate(node.output):
            if name not in known or name in floats or name in outputs:
                continue
            raw, short = (graphs.unique(f"{name}/{w}", used) for w in ("raw", "rounded"))
            used |= {raw, short}
            node.output[i] = raw
            nodes.append(helper.make_node("Cast", [raw], [short], short, to=TensorProto.FLOAT16))
            nodes.append(helper.make_node("Cast", [short], [name], raw, to=TensorProto.FLOAT))
    copies = [onnx.NodeProto.FromString(n.SerializeToString()) for n in nodes]
    del result.graph.node[:]
    result.graph.node.extend(copies)
    return result


def is_half(model: onnx.ModelProto) -> bool:
    """Whether any weight or conversion of the graph is in half precision."""
    return any(w.data_type == TensorProto.FLOAT16 for w in model.graph.initializer) or any(
        a.name == "to" and a.i == TensorProto.FLOAT16
        for n in model.graph.node
        if n.op_type == "Cast"
        for a in n.attribute
    )


class _Writer:
    """Rewrites one graph node by node, with a conversion where precisions meet."""

    def __init__(self, graph: onnx.GraphProto, floats: frozenset[str]) -> None:
        self._graph, self._floats = graph, floats
        self._outputs = [o.name for o in graph.output]
        self._single_weights = set[str]()
        self._weights = {w.name for w in graph.initializer}
        self._used = {*floats, *self._weights, *self._outputs, *(i.name for i in graph.input)}
        # name in the float graph -> name of its half (or single) form here
        self._half = dict[str, str]()
        self._single = {i.name: i.name for i in graph.input if i.name in floats}
        self._nodes: list[onnx.NodeProto] = []
        names = {n.name for n in graph.node}
        self._names = names

    def add(self, given: onnx.NodeProto) -> None:
        node = onnx.NodeProto()
        node.CopyFrom(given)
        single = node.op_type in _SINGLE
        only = _SINGLE_INPUTS.get(node.op_type, ())
        for i, name in enumerate(node.input):
            if name in self._floats:
                node.input[i] = self._read(name, single or i in only)
        made = [o for o in node.output if o in self._floats]
        if not single:
            _retype_node(node, TensorProto.FLOAT, TensorProto.FLOAT16)
        for i, name in enumerate(node.output):
            if name not in made:
                continue
            if single:
                self._single[name] = name
                continue
            inner = graphs.unique(f"{name}/half", self._used) if name in self._outputs else name
            self._used.add(inner)
            self._half[name] = node.output[i] = inner
        self._nodes.append(node)

    def finish(self) -> None:
        for name in self._outputs:
            if name in self._half:
                self._cast(self._half[name], name, TensorProto.FLOAT)
        del self._graph.node[:]
        self._graph.node.extend(self._nodes)
        del self._graph.value_info[:]
        for weight in self._graph.initializer:
            if weight.data_type == TensorProto.FLOAT and weight.name not in self._single_weights:
                value = numpy_helper.to_array(weight).astype(np.float16)
                weight.CopyFrom(numpy_helper.from_array(value, weight.name))

    def _read(self, name: str, single: bool) -> str:
        if name in self._weights:
            return self._weight(name, single)
        have = self._single if single else self._half
        if name not in have:
            other = self._half[name] if single else self._single[name]
            made = graphs.unique(f"{name}/{'single' if single else 'half'}", self._used)
            self._used.add(made)
            kind = TensorProto.FLOAT if single else TensorProto.FLOAT16
            self._cast(other, made, kind)
            have[name] = made
        return have[name]

    def _weight(self, name: str, single: bool) -> str:
        """A weight that is read in both precisions is stored twice."""
        if not single:
            return name
        if f"{name}/single" not in self._single_weights:
            stored = next(w for w in self._graph.initializer if w.name == name)
            copy = self._graph.initializer.add()
            copy.CopyFrom(stored)
            copy.name = f"{name}/single"
            self._single_weights.add(copy.name)
        return f"{name}/single"

    def _cast(self, source: str, made: str, kind: int) -> None:
        label = graphs.unique(f"{made}/Cast", self._names)
        self._names.add(label)
        self._nodes.append(helper.make_node("Cast", [source], [made], label, to=kind))


def _float_values(model: onnx.ModelProto) -> frozenset[str]:
    """Names of all single-precision values: inputs, weights and what nodes make."""
    graph = graphs.infer_shapes(model).graph
    known = {
        v.name: v.type.tensor_type.elem_type
        for v in (*graph.input, *graph.value_info, *graph.output)
    }
    known |= {w.name: w.data_type for w in graph.initializer}
    return frozenset(n for n, kind in known.items() if kind == TensorProto.FLOAT)


def _retype(graph: onnx.GraphProto, old: int, new: int) -> None:
    for weight in graph.initializer:
        if weight.data_type == old:
            _convert(weight, new)
    for value in (*graph.value_info, *graph.input, *graph.output):
        if value.type.tensor_type.elem_type == old:
            value.type.tensor_type.elem_type = new


def _retype_node(node: onnx.NodeProto, old: int, new: int) -> None:
    """Constants and conversions that a node carries itself."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type == old:
            _convert(attribute.t, new)
        elif node.op_type == "Cast" and attribute.name == "to" and attribute.i == old:
            attribute.i = new


def _convert(tensor: onnx.TensorProto, kind: int) -> None:
    value = numpy_helper.to_array(tensor).astype(helper.tensor_dtype_to_np_dtype(kind))
    tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
