"""What a graph costs a Hexagon NPU, as numbers that a linear model can weigh.

The matrix unit works on blocks of 32 channels by 32 pixels and stores activations in tiles of
8x8 pixels by 32 channels, so that a narrow layer costs as much as one of 32 channels.

Imports onnx: reach this module only where a graph is at hand.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import onnx
from onnx import numpy_helper

from edgebudget.onnx_contrib import attributes
from edgebudget.onnx_shapes import Tensors, constants, infer, inlined

if TYPE_CHECKING:
    from edgebudget.workload import Array

_FREE = frozenset(
    {"QuantizeLinear", "DequantizeLinear", "Constant", "Identity", "Relu", "Clip", "Cast",
     "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Dropout", "BatchNormalization", "Shape"}
)  # fmt: skip
_POOLS = frozenset({"MaxPool", "AveragePool"})
_MEANS = frozenset({"GlobalAveragePool", "GlobalMaxPool", "ReduceMean"})
_SUMS = frozenset({"Add", "Sub", "Mul", "Div", "Min", "Max", "Sum", "PRelu"})
_FUNCTIONS = frozenset({"HardSwish", "Sigmoid", "HardSigmoid", "Tanh", "Gelu", "LeakyRelu"})
_KINDS = (
    (_FUNCTIONS, "function"),
    (_POOLS, "pool"),
    (_MEANS, "mean"),
    (_SUMS, "sum"),
)
_BLOCK, _TILE = 32, 8
BLOCK_MACS = float(_BLOCK**3)  # of one unit of work
_PLANES = 4  # convolutions of so few planes have a path of their own
Features = dict[str, float]


@dataclass(frozen=True, slots=True)
class Kernel:
    """One node that costs time: its kind and its features, each zero or more."""

    name: str
    op: str
    kind: str
    features: Mapping[str, float]


def kernels(model: onnx.ModelProto) -> tuple[Kernel, ...]:
    """Every node of the main graph that the NPU spends time on.

    Raises:
        UnsupportedError: EB211, EB212: a shape is not known.
    """
    model = inlined(model)
    known = infer(model)
    fixed = set(dict(constants(model.graph)))
    small = {
        w.name: numpy_helper.to_array(w)
        for w in model.graph.initializer
        if w.data_type == onnx.TensorProto.INT64
    }
    found = []
    for node in model.graph.node:
        if all(i in fixed for i in node.input if i):
            fixed.update(node.output)  # a weight being prepared
        elif node.op_type not in _FREE:
            found.append(_kernel(node, known, fixed, small))
    return tuple(found)


def features(model: onnx.ModelProto) -> Features:
    """The sum over all kernels, and what crosses the graph's edges.

    Raises:
        UnsupportedError: EB211, EB212: a shape is not known.
    """
    total: Features = {"graph": 1.0}
    for kernel in kernels(model):
        for name, value in kernel.features.items():
            total[name] = total.get(name, 0.0) + value
    known = infer(model)
    weights = {w.name for w in model.graph.initializer}
    edges = [v.name for v in model.graph.input if v.name not in weights]
    edges += [v.name for v in model.graph.output]
    total["edge"] = float(sum(i.elements for e in edges if (i := known.get(e))))
    return total


def _kernel(
    node: onnx.NodeProto, known: Tensors, fixed: set[str], small: Mapping[str, Array]
) -> Kernel:
    out = known.need(node.output[0], node).shape
    ins = [known.need(i, node).shape for i in node.input if i and i not in fixed]
    kind = _kind(node, known, fixed)
    read, written = float(sum(map(_stored_bytes, ins))), float(_stored_bytes(out))
    found: Features = {kind: 1.0, f"{kind}_read": read, f"{kind}_written": written}
    if kind in ("stem", "conv1", "conv", "grouped", "depthwise"):
        weight = known.need(node.input[1], node).shape
        groups = int(attributes(node).get("group", 1))
        taps = math.prod(weight[2:])
        if kind == "depthwise":
            found["depthwise_blocks"] = _blocks(weight[0])
            found["depthwise_work"] = written * taps
        else:
            each = weight[0] // groups
            blocks = groups * _blocks(weight[1]) * _blocks(each) * taps
            found[f"{kind}_blocks"] = blocks
            found[f"{kind}_work"] = blocks * _blocks(math.prod(out[2:]))
    elif kind in ("linear", "product"):
        blocks = _blocks(ins[0][-1]) * _blocks(out[-1])
        found[f"{kind}_blocks"] = blocks
        found[f"{kind}_work"] = blocks * _blocks(math.prod(out[:-1]))
    elif _shifts(node, ins, small):
        found[f"{kind}_shifted"] = 1.0
    return Kernel(node.name or node.output[0], node.op_type, kind, found)


def _shifts(node: onnx.NodeProto, ins: Sequence[Sequence[int]], small: Mapping[str, Array]) -> bool:
    """Whether channels move to another place in their block of 32, which is a dear shuffle."""
    starts: list[int] = []
    if node.op_type == "Pad" and len(node.input) > 1 and node.input[1] in small:
        pads = small[node.input[1]].tolist()
        starts = [int(pads[1])] if len(pads) >= 4 else []
    elif node.op_type == "Concat" and len(ins[0]) == 4 and attributes(node).get("axis") == 1:
        starts = list(accumulate(shape[1] for shape in ins[:-1]))
    return any(start % _BLOCK for start in starts)


def _kind(node: onnx.NodeProto, known: Tensors, fixed: set[str]) -> str:
    op = node.op_type
    if op in ("Conv", "ConvTranspose"):
        weight = known.need(node.input[1], node).shape
        if int(attributes(node).get("group", 1)) > 1:
            return "depthwise" if weight[1] == 1 else "grouped"
        if weight[1] <= _PLANES:
            return "stem"
        return "conv1" if math.prod(weight[2:]) == 1 else "conv"
    if op in ("Gemm", "MatMul"):
        return "linear" if node.input[1] in fixed else "product"
    if op == "Resize" and attributes(node).get("mode", b"nearest") != b"nearest":
        return "smooth-Resize"
    if op in _POOLS and known.need(node.input[0], node).shape[1] <= _PLANES:
        return "plane-pool"
    for names, kind in _KINDS:
        if op in names:
            return kind
    return op  # nothing was fitted for it


def _blocks(size: int) -> float:
    return float(-(-size // _BLOCK))


def _stored_bytes(shape: Sequence[int]) -> int:
    """Bytes of an 8-bit activation as the NPU stores it: [.., C, H, W] in tiles of 8x8x32."""
    if len(shape) < 4:
        return _up(math.prod(shape), _BLOCK)
    rows = _up(shape[-2], _TILE) * _up(shape[-1], _TILE)
    return math.prod(shape[:-3]) * _up(shape[-3], _BLOCK) * rows


def _up(value: int, step: int) -> int:
    return -(-value // step) * step
