"""Write a quantized graph: QuantizeLinear/DequantizeLinear around every integer node.

ONNX Runtime and QNN fuse each such group into one integer kernel. The activation's step is one
per tensor, the weight's one per output channel (symmetric int8), the bias int32 at the product
of the two, as in "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", Jacob et al., 2018.

Imports onnx: reach this module only where a graph is at hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import helper, numpy_helper

from edgebudget import graph as graphs
from edgebudget.quant_graph import MOVE_OPS, Graph
from edgebudget.ranges import Range

if TYPE_CHECKING:
    from edgebudget.workload import Array

LEVELS: Mapping[str, int] = {"uint8": 255, "uint16": 65535}
# What the Hexagon compiler requires of the 16-bit forms (and ORT's own recipe for it emits).
_FIXED: Mapping[tuple[str, str], tuple[float, int]] = {
    ("Sigmoid", "uint16"): (1.0 / 65536.0, 0),
    ("Tanh", "uint16"): (1.0 / 32768.0, 32768),
}
_ROOM = 2.0  # of a 16-bit range beyond what was seen: one bit of sixteen against clipping
_BIAS_STEPS = float(2**30)


@dataclass(frozen=True, slots=True)
class Plan:
    """Every decision about one quantized graph; `emit` makes none.

    `dtypes` maps integer nodes to the type of their activations; all others stay float. `open`
    nodes give their sum as float without rounding it to an activation type first. `narrowed`
    outputs are made in 16 bits and given in 8.
    """

    dtypes: Mapping[str, str]
    ranges: Mapping[str, Range]  # value name -> range, for every value an integer node touches
    scales: Mapping[str, Array]  # node name -> weight step, a scalar or one per output channel
    bias_shift: Mapping[str, Array] = field(default_factory=dict)
    open: frozenset[str] = frozenset()
    least_range: float = 0.0
    narrowed: frozenset[str] = frozenset()


def step_of(span: Range, dtype: str) -> tuple[float, int]:
    """Step and zero point that cover a range; a range without width gets a step of 1/levels."""
    low, high = min(span[0], 0.0), max(span[1], 0.0)
    levels = LEVELS[dtype]
    width = high - low
    if width < float(np.finfo(np.float32).tiny) * levels:
        return 1.0 / levels, 0
    scale = float(np.float32(width / levels))
    return scale, round(-low / scale)


def step_for(graph: Graph, plan: Plan, value: str, dtype: str) -> tuple[float, int]:
    """Step and zero point of one value; operators that only move values keep their input's."""
    maker = graph.producer.get(value)
    while maker is not None and maker.op_type in MOVE_OPS and maker.name in plan.dtypes:
        value = maker.input[0]
        maker = graph.producer.get(value)
    if maker is not None and (maker.op_type, dtype) in _FIXED:
        return _FIXED[maker.op_type, dtype]
    low, high = plan.ranges[value]
    if 0.0 < high - low < plan.least_range:
        high = low + plan.least_range
    room = _ROOM if dtype == "uint16" else 1.0
    return step_of((low * room, high * room), dtype)


def emit(graph: Graph, plan: Plan) -> onnx.ModelProto:
    """The quantized model of `graph`; values keep their names (a value's rounded form has it)."""
    return _Writer(graph, plan).write()


class _Writer:
    def __init__(self, graph: Graph, plan: Plan) -> None:
        self._graph, self._plan = graph, plan
        self._nodes: list[onnx.NodeProto] = []
        self._tensors: dict[str, Array] = {}
        self._done: dict[tuple[str, str], str] = {}
        wide = "uint16" in plan.dtypes.values()
        self._domain = "com.microsoft" if wide and graphs.opset(graph.model) < 21 else ""
        self._made: dict[str, str] = {}  # value -> dtype of the integer node that makes it

    def write(self) -> onnx.ModelProto:
        merged = {
            clamp.name
            for name, clamp in self._graph.clamps.items()
            if name in self._plan.dtypes and name not in self._plan.open
        }
        for node in self._graph.nodes:
            if node.name in merged:
                continue
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            dtype = self._plan.dtypes.get(node.name)
            if dtype is None:
                self._nodes.append(copy)
            else:
                self._integer(node, copy, dtype)
        return self._model()

    def _integer(self, node: onnx.NodeProto, copy: onnx.NodeProto, dtype: str) -> None:
        graph = self._graph
        weighted = graph.has_weight(node)
        for i, name in graph.data_inputs(node):
            if weighted and i == 1:
                continue
            if i == 2 and graph.has_bias_input(node):
                continue
            if node.op_type == "Pad" and i == 2:
                copy.input[2] = self._padding(node, dtype)
            elif name in graph.weights:
                copy.input[i] = self._constant(name, dtype)
            else:
                copy.input[i] = self._rounded(name, dtype)
        if node.op_type == "Pad" and (len(node.input) < 3 or not node.input[2]):
            while len(copy.input) < 3:
                copy.input.append("")
            copy.input[2] = self._padding(node, dtype)
        if weighted:
            self._weights(node, copy, dtype)
        elif graph.has_bias_input(node):
            self._norm_bias(node, copy, dtype)
        self._nodes.append(copy)
        if node.name in self._plan.open:
            return
        for i, out in enumerate(node.output):
            value = graph.result(node) if i == 0 else out
            if value and graph.is_float(value):
                copy.output[i] = f"{value}.raw"
                if value in self._plan.narrowed:
                    self._round(f"{value}.raw", f"{value}.{dtype}", value, dtype)
                    self._round(f"{value}.{dtype}", value, value, "uint8")
                    self._made[value] = "uint8"
                else:
                    self._round(f"{value}.raw", value, value, dtype)
                    self._made[value] = dtype

    def _rounded(self, name: str, dtype: str) -> str:
        """`name` as an integer node of type `dtype` reads it."""
        if self._made.get(name) == dtype:
            return name
        key = (name, dtype)
        if key not in self._done:
            self._done[key] = f"{name}.{dtype}"
            self._round(name, self._done[key], name, dtype)
        return self._done[key]

    def _round(self, source: str, result: str, value: str, dtype: str) -> None:
        scale, zero = step_for(self._graph, self._plan, value, dtype)
        prefix = f"{value}.{dtype}"
        self._tensors[f"{prefix}.scale"] = np.asarray(scale, np.float32)
        self._tensors[f"{prefix}.zero"] = np.asarray(zero, dtype)
        parameters = [f"{prefix}.scale", f"{prefix}.zero"]
        whole = f"{prefix}.q"
        self._add("QuantizeLinear", [source, *parameters], whole)
        self._add("DequantizeLinear", [whole, *parameters], result)

    def _constant(self, name: str, dtype: str) -> str:
        """A stored tensor that is not a weight, at the precision of the activations."""
        result = f"{name}.{dtype}"
        if (name, dtype) not in self._done:
            self._done[name, dtype] = result
            value = self._graph.weights[name]
            scale, zero = step_of((float(value.min()), float(value.max())), dtype)
            steps = np.clip(np.rint(value / scale) + zero, 0, LEVELS[dtype])
            self._store(
                result, steps.astype(dtype), np.asarray(scale, np.float32), np.asarray(zero, dtype)
            )
        return result

    def _padding(self, node: onnx.NodeProto, dtype: str) -> str:
        scale, zero = step_for(self._graph, self._plan, node.input[0], dtype)
        given = node.input[2] if len(node.input) > 2 else ""
        value = float(self._graph.weights[given].reshape(-1)[0]) if given else 0.0
        steps = int(np.clip(round(value / scale) + zero, 0, LEVELS[dtype]))
        result = f"{node.name}.padding"
        self._store(
            result, np.asarray(steps, dtype), np.asarray(scale, np.float32), np.asarray(zero, dtype)
        )
        return result

    def _weights(self, node: onnx.NodeProto, copy: onnx.NodeProto, dtype: str) -> None:
        graph = self._graph
        value, axis = graph.weights[node.input[1]], graph.channel_axis(node)
        step, _ = step_for(self._graph, self._plan, node.input[0], dtype)
        bias = self._bias(node)
        scale = _wide_enough(self._plan.scales[node.name], step, bias)
        shaped = along(scale, axis, value.ndim)
        whole = np.clip(np.rint(value / shaped), -127, 127).astype(np.int8)
        copy.input[1] = self._stored_weight(node.input[1], whole, scale, axis)
        if bias is not None:
            product = (np.float64(step) * scale.astype(np.float64)).astype(np.float32)
            copy.input[2:] = [f"{node.name}.bias"]
            if scale.ndim == 1 and product.size != bias.size:  # groups share their channels' steps
                product = np.tile(product, bias.size // product.size)
            self._store(copy.input[2], np.rint(bias / product).astype(np.int32), product, None, 0)

    def _stored_weight(self, name: str, whole: Array, scale: Array, axis: int) -> str:
        """Nodes that share a weight share its integer form, as long as their steps agree."""
        result = f"{name}.int8"
        count = 1
        while result in self._tensors or f"{result}.scale" in self._tensors:
            same = np.array_equal(self._tensors[f"{result}.scale"], scale)
            if same and np.array_equal(self._tensors[f"{result}.q"], whole):
                return result
            count += 1
            result = f"{name}.int8.{count}"
        zero = np.zeros(scale.shape, np.int8)
        self._store(result, whole, scale, zero, axis)
        return result

    def _bias(self, node: onnx.NodeProto) -> Array | None:
        bias = self._graph.bias(node)
        shift = self._plan.bias_shift.get(node.name)
        if shift is None:
            return bias
        return shift if bias is None else bias + shift

    def _norm_bias(self, node: onnx.NodeProto, copy: onnx.NodeProto, dtype: str) -> None:
        gamma = self._graph.weights[node.input[1]]
        step, _ = step_for(self._graph, self._plan, node.input[0], dtype)
        scale, _ = step_of((float(gamma.min()), float(gamma.max())), dtype)
        product = np.asarray(step * scale, np.float32)
        copy.input[2] = f"{node.name}.bias"
        value = np.rint(self._graph.weights[node.input[2]] / product)
        self._store(copy.input[2], np.clip(value, -(2**31), 2**31 - 1).astype(np.int32), product)

    def _store(
        self, result: str, whole: Array, scale: Array, zero: Array | None = None, axis: int = 0
    ) -> None:
        self._tensors[f"{result}.q"] = whole
        self._tensors[f"{result}.scale"] = scale
        inputs = [f"{result}.q", f"{result}.scale"]
        if zero is not None:
            self._tensors[f"{result}.zero"] = zero
            inputs.append(f"{result}.zero")
        self._add("DequantizeLinear", inputs, result, axis if np.ndim(scale) else None)

    def _add(self, op: str, inputs: list[str], output: str, axis: int | None = None) -> None:
        node = helper.make_node(op, inputs, [output], name=f"{output}.{op}", domain=self._domain)
        if axis is not None:
            node.attribute.append(helper.make_attribute("axis", axis))
        self._nodes.append(node)

    def _model(self) -> onnx.ModelProto:
        model = onnx.ModelProto()
        model.CopyFrom(self._graph.model)
        body = model.graph
        del body.node[:], body.value_info[:]
        body.node.extend(self._nodes)
        used = {n for node in self._nodes for n in node.input}
        used |= {n for node in self._graph.nodes if _has_body(node) for n in self._graph.weights}
        kept = [
            t
            for t in self._graph.model.graph.initializer
            if t.name in used | {*self._graph.outputs}
        ]
        del body.initializer[:]
        body.initializer.extend(kept)
        body.initializer.extend(
            numpy_helper.from_array(np.asarray(v), k) for k, v in self._tensors.items()
        )
        if self._domain and self._domain not in {o.domain for o in model.opset_import}:
            model.opset_import.append(helper.make_opsetid(self._domain, 1))
        return model


def along(scale: Array, axis: int, ndim: int) -> Array:
    """`scale` shaped to divide a tensor of `ndim` dimensions along `axis`."""
    if scale.ndim == 0:
        return scale
    shape = [1] * ndim
    shape[axis] = -1
    return scale.reshape(shape)


def _wide_enough(scale: Array, step: float, bias: Array | None) -> Array:
    """Weight steps at which the bias still fits in 32 bits."""
    if bias is None:
        return scale.astype(np.float32)
    needed = np.abs(bias).astype(np.float64) / (_BIAS_STEPS * step)
    needed = needed.reshape(-1, scale.size).max(axis=0) if scale.ndim else needed.max()
    wide: Array = np.maximum(scale, needed).astype(np.float32)
    return wide


def _has_body(node: onnx.NodeProto) -> bool:
    return any(a.HasField("g") or a.graphs for a in node.attribute)
