"""A float ONNX graph as quantization sees it: who makes, who reads, what multiplies.

Imports onnx: reach this module only where a graph is at hand.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import numpy_helper, version_converter

from edgebudget import graph as graphs
from edgebudget_runtime.errors import ArtifactError, UnsupportedError

if TYPE_CHECKING:
    from edgebudget.workload import Array

MAC_OPS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
# The values are those of the input, so the scale is too.
MOVE_OPS = frozenset(
    "DepthToSpace Expand Flatten Gather Identity MaxPool Pad Reshape Resize Slice SpaceToDepth "
    "Split Squeeze Tile Transpose Unsqueeze".split()
)
CLAMP_OPS = frozenset({"Relu", "Clip"})
_NORM_OPS = frozenset({"LayerNormalization", "InstanceNormalization"})
# Inputs that carry data; the rest (bounds, scales, region) parametrise the operator.
_DATA_INPUTS: Mapping[str, tuple[int, ...]] = {"Resize": (0,), "Clip": (0,), "Pad": (0, 2)}
_INTEGER_OPS = frozenset(
    {
        "QuantizeLinear",
        "QLinearConv",
        "QLinearMatMul",
        "ConvInteger",
        "MatMulInteger",
        "DynamicQuantizeLinear",
    }
)
OLDEST_OPSET = 13  # the first with one scale per channel
WIDE_OPSET, _WIDE_IR = 21, 10  # the first with 16-bit rounding


@dataclass(frozen=True)
class Graph:
    """A model and the lookups that quantization needs; the model is not changed afterwards."""

    model: onnx.ModelProto

    @cached_property
    def nodes(self) -> tuple[onnx.NodeProto, ...]:
        """Nodes in execution order."""
        return tuple(self.model.graph.node)

    @cached_property
    def by_name(self) -> dict[str, onnx.NodeProto]:
        """Nodes by name."""
        return {n.name: n for n in self.nodes}

    @cached_property
    def weights(self) -> dict[str, Array]:
        """Stored tensors by name."""
        return graphs.initializers(self.model)

    @cached_property
    def outputs(self) -> frozenset[str]:
        """Names of the graph's outputs."""
        return frozenset(o.name for o in self.model.graph.output)

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """Names of the inputs a caller feeds."""
        return tuple(i.name for i in graphs.inputs(self.model))

    @cached_property
    def producer(self) -> dict[str, onnx.NodeProto]:
        """The node that makes each value."""
        return {o: n for n in self.nodes for o in n.output if o}

    @cached_property
    def readers(self) -> dict[str, list[onnx.NodeProto]]:
        """The nodes that read each value, one entry for each use."""
        found: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in self.nodes:
            for name in (*node.input, *_outer_reads(node)):
                found[name].append(node)
        return found

    @cached_property
    def _values(self) -> dict[str, onnx.TypeProto.Tensor]:
        inferred = graphs.infer_shapes(self.model).graph
        values = (*inferred.input, *inferred.value_info, *inferred.output)
        return {v.name: v.type.tensor_type for v in values}

    def is_float(self, name: str) -> bool:
        """Whether a value is float32."""
        if name in self.weights:
            return bool(self.weights[name].dtype == np.float32)
        found = self._values.get(name)
        return found is not None and found.elem_type == onnx.TensorProto.FLOAT

    def shape(self, name: str) -> tuple[int, ...] | None:
        """A value's shape, or None when it cannot be derived."""
        if name in self.weights:
            return tuple(self.weights[name].shape)
        found = self._values.get(name)
        if found is None or not found.HasField("shape"):
            return None
        dims = tuple(d.dim_value for d in found.shape.dim)
        return dims if all(d > 0 for d in dims) else None

    def data_inputs(self, node: onnx.NodeProto) -> list[tuple[int, str]]:
        """Float inputs that carry data: (position, name)."""
        allowed = _DATA_INPUTS.get(node.op_type, range(len(node.input)))
        return [(i, n) for i, n in enumerate(node.input) if i in allowed and self.is_float(n)]

    def has_weight(self, node: onnx.NodeProto) -> bool:
        """Whether a node multiplies its input by stored float weights (and adds a stored bias)."""
        if node.op_type not in MAC_OPS or node.input[1] not in self.weights:
            return False
        weight = self.weights[node.input[1]]
        if weight.dtype != np.float32 or weight.ndim < 2 or node.input[0] in self.weights:
            return False
        if len(node.input) < 3 or not node.input[2]:
            return True
        bias = self.weights.get(node.input[2])
        return bias is not None and bias.size in (1, self.channels(node))

    def channel_axis(self, node: onnx.NodeProto) -> int:
        """The weight axis that runs over output channels (groups of a transposed conv: within)."""
        attributes = graphs.attributes(node)
        if node.op_type == "ConvTranspose":
            return 1
        if node.op_type == "Gemm":
            return 0 if attributes.get("transB", 0) else 1
        return 0 if node.op_type == "Conv" else self.weights[node.input[1]].ndim - 1

    def channels(self, node: onnx.NodeProto) -> int:
        """Number of output channels of a node with weights."""
        size: int = self.weights[node.input[1]].shape[self.channel_axis(node)]
        if node.op_type == "ConvTranspose":
            size *= graphs.attributes(node).get("group", 1)
        return size

    def bias(self, node: onnx.NodeProto) -> Array | None:
        """The stored bias of a node with weights or of a normalisation, flat."""
        if len(node.input) < 3 or not node.input[2]:
            return None
        return np.broadcast_to(self.weights[node.input[2]].reshape(-1), (self.channels(node),))

    def has_bias_input(self, node: onnx.NodeProto) -> bool:
        """Whether input 2 is a bias that accumulates at scale input x weight."""
        if len(node.input) < 3 or node.input[2] not in self.weights:
            return False
        return node.op_type in _NORM_OPS or self.has_weight(node)

    def macs(self, node: onnx.NodeProto) -> int:
        """Multiply-accumulates of a node with stored weights, for weighing choices."""
        if not self.has_weight(node):
            return 0
        weight, out = self.weights[node.input[1]], self.shape(node.output[0])
        source = self.shape(node.input[0])
        if out is None or source is None:
            return 0
        if node.op_type == "Conv":
            return math.prod(out) * int(weight[0].size)
        if node.op_type == "ConvTranspose":
            return math.prod(source) * int(weight[0].size)
        return math.prod(out) * int(weight.size) // self.channels(node)

    @cached_property
    def clamps(self) -> dict[str, onnx.NodeProto]:
        """Node name -> the Relu or Clip that alone reads its output.

        Saturation of the integer output does the clamping, if its range lies within the bounds.
        """
        found = {}
        for node in self.nodes:
            if node.op_type not in {"Conv", "ConvTranspose", "Gemm", "MatMul", "Add"}:
                continue
            readers = self.readers[node.output[0]]
            if len(readers) != 1 or node.output[0] in self.outputs:
                continue
            if readers[0].op_type in CLAMP_OPS and self._holds_zero(readers[0]):
                found[node.name] = readers[0]
        return found

    def _holds_zero(self, node: onnx.NodeProto) -> bool:
        bounds = [self.weights.get(n) if n else np.float32(0) for n in node.input[1:]]
        if any(b is None for b in bounds):
            return False
        low = bounds[0] if bounds and node.input[1] else 0.0
        high = bounds[1] if len(bounds) > 1 and node.input[2] else 0.0
        return float(np.asarray(low)) <= 0.0 <= float(np.asarray(high))

    def result(self, node: onnx.NodeProto) -> str:
        """The value a node makes once the clamp after it is part of it."""
        name: str = self.clamps.get(node.name, node).output[0]
        return name


def prepare(model: onnx.ModelProto, *, wide: bool = False) -> Graph:
    """Index a copy of `model`: named nodes, constants as stored tensors, opset 13 or later.

    `wide` asks for opset 21, the first with 16-bit rounding; a model that cannot be raised to it
    keeps its own (16-bit rounding is then ONNX Runtime's).

    Raises:
        ArtifactError: EB521, a stored float tensor holds NaN or infinity.
        UnsupportedError: EB230, the operator set is too old and cannot be raised; EB231, the
            graph holds integer operators already.
    """
    quantized = sorted({n.op_type for n in model.graph.node} & _INTEGER_OPS)
    if quantized:
        raise UnsupportedError(
            "EB231",
            f"the graph is quantized already ({', '.join(quantized)})",
            hint="start from the float model",
        )
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    _store_constants(copy)  # first: the version converter mistakes weights among the inputs
    if graphs.opset(copy) < OLDEST_OPSET:
        copy = _upgrade(copy)
    if wide and graphs.opset(copy) < WIDE_OPSET:
        copy = _widened(copy)
    _store_constants(copy)
    graphs.name_nodes(copy)
    for tensor in copy.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            value = numpy_helper.to_array(tensor)
            bad = value.size - int(np.isfinite(value).sum())
            if bad:
                raise ArtifactError(
                    "EB521",
                    f"weight {tensor.name!r} holds {bad} NaN or infinite values of {value.size}",
                    hint="train or export the model again",
                )
    return Graph(copy)


def _widened(model: onnx.ModelProto) -> onnx.ModelProto:
    try:
        raised = version_converter.convert_version(model, WIDE_OPSET)
        onnx.checker.check_model(raised)
    except Exception:  # the converter's C++ part raises RuntimeError and others
        return model
    raised.ir_version = max(raised.ir_version, _WIDE_IR)
    return raised


def _upgrade(model: onnx.ModelProto) -> onnx.ModelProto:
    try:
        return version_converter.convert_version(model, 17)
    except Exception as e:  # the converter's C++ part raises RuntimeError and others
        raise UnsupportedError(
            "EB230",
            f"operator set {graphs.opset(model)} has no per-channel scales and cannot be raised",
            hint=f"export the model again with operator set {OLDEST_OPSET} or later",
        ) from e


def _store_constants(model: onnx.ModelProto) -> None:
    """Turn Constant nodes into initializers, and stored weights out of the inputs."""
    kept = []
    for node in model.graph.node:
        value = graphs.attributes(node).get("value") if node.op_type == "Constant" else None
        if value is None:
            kept.append(node)
            continue
        tensor = model.graph.initializer.add()
        tensor.CopyFrom(value)
        tensor.name = node.output[0]
    fed = graphs.inputs(model)
    fields: tuple[tuple[Any, list[Any]], ...] = (
        (model.graph.node, kept),
        (model.graph.input, fed),
    )
    for field, items in fields:
        if len(items) != len(field):
            copies = [type(i).FromString(i.SerializeToString()) for i in items]
            del field[:]
            field.extend(copies)


def _outer_reads(node: onnx.NodeProto) -> Iterator[str]:
    for attribute in node.attribute:
        for body in (attribute.g, *attribute.graphs):
            for inner in body.node:
                yield from inner.input
                yield from _outer_reads(inner)
