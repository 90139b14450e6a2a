"""An integer graph that ONNX Runtime rounds as an Arm NPU does, bit for bit.

ONNX Runtime scales sums of products in single precision and rounds halves to even; the NPU
multiplies by 31 bits and rounds halves up. One value in 100,000 differs in every layer, which a
deep network carries on to several steps of its answer. Here sums are made of whole numbers that
single precision holds exactly, and scaled in double precision by the NPU's own factors.

The rules are those of TOSA's RESCALE (`TOSA 1.0 specification`, 2025), and of the scales that
ExecuTorch's back end for Arm gives it. Imports onnx.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgebudget import graph as graphs
from edgebudget.workload import Array
from edgebudget_targets._ethos_forms import in_npu_forms

_EXACT = 2.0**24  # whole numbers up to here are exact in single precision
_FACTOR_BITS = 31
_SUM_SHIFT = 2.0**20  # how much finer the NPU makes two operands before it adds them
_DIGIT = 16  # halves of a byte, for sums that would leave the exact range
_NARROW = (np.dtype(np.uint8), np.dtype(np.int8))
_CLIPS = frozenset({"Relu", "Clip"})


def rounded_as_npu(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same function of the same inputs; what has no such form stays as it is.

    That is what does not lie between 8-bit integers: 16-bit sums, tables (softmax, sigmoid).
    """
    made = onnx.ModelProto()
    made.CopyFrom(graphs.infer_shapes(model))
    in_npu_forms(made)
    _Rewriter(made).rewrite()
    return made


@dataclass(frozen=True, slots=True)
class _Grid:
    """A computed value of 8 bits: scale * (integer - zero)."""

    integer: str
    scale: float
    zero: int
    dtype: np.dtype[Any]

    @property
    def farthest(self) -> int:
        """The largest magnitude of integer - zero."""
        held = np.iinfo(self.dtype)
        return int(max(held.max - self.zero, self.zero - held.min))


@dataclass(frozen=True, slots=True)
class _Stored:
    """A stored integer tensor less its zero point, with its steps (one, or one per channel)."""

    whole: Array
    scale: Array


@dataclass(frozen=True, slots=True)
class _Sum:
    """Whole numbers in double precision, and what one of them stands for."""

    name: str
    unit: Array


class _Rewriter:
    """Replaces what computes each rounded value; makes the graph's nodes anew, in order."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._graph = model.graph
        self._stored = graphs.initializers(model)
        self._used = {*self._stored, *(o for n in model.graph.node for o in n.output)}
        self._maker = {o: n for n in model.graph.node for o in n.output}
        self._nodes: list[onnx.NodeProto] = []
        self._whole: dict[str, str] = {}  # integer value -> the same less its zero, as float

    def rewrite(self) -> None:
        """Do it, and leave out what nothing reads any more."""
        for node in self._graph.node:
            if node.op_type != "QuantizeLinear" or not self._replaced(node):
                self._nodes.append(node)
        wanted = {o.name for o in self._graph.output}
        kept = []
        for node in reversed(self._nodes):
            if wanted & set(node.output):
                kept.append(node)
                wanted.update(node.input)
        del self._graph.node[:]
        self._graph.node.extend(reversed(kept))
        del self._graph.value_info[:]

    def _replaced(self, node: onnx.NodeProto) -> bool:
        """Whether a rounding and what it rounds could be written anew."""
        scale, zero = self._settings(node)
        source, clips = self._maker.get(node.input[0]), list[onnx.NodeProto]()
        while source is not None and source.op_type in _CLIPS:
            clips.append(source)
            source = self._maker.get(source.input[0])
        if source is None or source.op_type not in _RULES:
            return False
        if scale is None or zero.dtype not in _NARROW:
            return False
        low, high = float(np.iinfo(zero.dtype).min), float(np.iinfo(zero.dtype).max)
        for clip in clips:
            bounds = self._bounds(clip)
            if bounds is None:
                return False
            low, high = (
                min(max(f, low), high)
                for f in (np.rint(np.asarray(bounds) / scale) + int(zero)).tolist()
            )
        total = _RULES[source.op_type](self, source)
        if total is None:
            return False
        factor = _factors(total.unit / scale)
        scaled = self._add("Mul", total.name, self._constant(factor))
        # Half up: what a cast cuts off below zero is floored first.
        raised = self._add("Add", scaled, self._constant(np.float64(int(zero) + 0.5)))
        floored = self._add("Floor", raised)
        limits = (self._constant(np.float64(f)) for f in (low, high))
        clipped = self._add("Clip", floored, *limits)
        kind = helper.np_dtype_to_tensor_dtype(zero.dtype)
        self._nodes.append(
            helper.make_node("Cast", [clipped], list(node.output), name=node.name, to=kind)
        )
        return True

    def _bounds(self, clip: onnx.NodeProto) -> tuple[float, float] | None:
        """What a node clips to, in the values' own units; None where it is computed."""
        if clip.op_type == "Relu":
            return 0.0, math.inf
        found = [-math.inf, math.inf]
        for i, name in enumerate(clip.input[1:]):
            if name and name not in self._stored:
                return None
            if name:
                found[i] = float(self._stored[name])
        return found[0], found[1]

    def product(self, node: onnx.NodeProto) -> _Sum | None:
        """A convolution or a product with stored weights."""
        x, w = self._grid(node.input[0]), self._weights(node.input[1])
        if x is None:
            return None
        if w is None:
            return self._product_of_two(node, x) if node.op_type == "MatMul" else None
        settings = graphs.attributes(node)
        if settings.get("transA", 0) or {settings.get(k, 1.0) for k in ("alpha", "beta")} != {1.0}:
            return None
        first = node.op_type == "Conv" or bool(settings.get("transB", 0))
        axis = 0 if first else w.whole.ndim - 1
        shape = (-1, *[1] * (w.whole.ndim - 2)) if node.op_type == "Conv" else (-1,)
        unit = (x.scale * w.scale).reshape(shape)
        bias = None
        if len(node.input) > 2 and node.input[2]:
            bias = self._weights(node.input[2])
            if bias is None or not np.allclose(bias.scale, unit.ravel(), rtol=1e-5, atol=0):
                return None
        sums = np.abs(w.whole).sum(axis=tuple(i for i in range(w.whole.ndim) if i != axis))
        whole = self._exact_product(node, x, w, float(sums.max()))
        if whole is None:
            return None
        if bias is not None:
            whole = self._add("Add", whole, self._constant(bias.whole.reshape(shape)))
        return _Sum(whole, unit)

    def _exact_product(self, node: onnx.NodeProto, x: _Grid, w: _Stored, sums: float) -> str | None:
        """The sums in double precision: at once, or the halves of each byte one by one."""
        weights = self._constant(w.whole.astype(np.float32))
        plain = self._whole_of(x)

        def times(value: str) -> str:
            made = onnx.NodeProto()
            made.CopyFrom(node)
            del made.input[:], made.output[:]
            made.input.extend([value, weights])
            made.output.append(self._name(node.output[0]))
            made.name = made.output[0]
            self._nodes.append(made)
            return self._cast(made.output[0], TensorProto.DOUBLE)

        if sums * x.farthest <= _EXACT:
            return times(plain)
        if sums * _DIGIT > _EXACT:
            return None
        digit = self._constant(np.float32(_DIGIT))
        high = self._add("Floor", self._add("Div", plain, digit))
        low = self._add("Sub", plain, self._add("Mul", high, digit))
        wide = self._add("Mul", times(high), self._constant(np.float64(_DIGIT)))
        return self._add("Add", wide, times(low))

    def _product_of_two(self, node: onnx.NodeProto, x: _Grid) -> _Sum | None:
        y = self._grid(node.input[1])
        if y is None:
            return None
        both = [self._wide(g) for g in (x, y)]
        return _Sum(self._add("MatMul", *both), np.asarray(x.scale * y.scale))

    def sum(self, node: onnx.NodeProto) -> _Sum | None:
        """A sum or difference: both operands on one finer scale, rounded there."""
        a, b = (self._grid(n) for n in node.input)
        if a is None or b is None:
            return None
        unit = 2 * max(a.scale, b.scale) / _SUM_SHIFT
        fine = []
        for grid in (a, b):
            factor = self._constant(_factors(np.float64(grid.scale / unit)))
            scaled = self._add("Mul", self._wide(grid), factor)
            fine.append(self._add("Floor", self._add("Add", scaled, self._constant(_HALF))))
        return _Sum(self._add(node.op_type, *fine), np.asarray(unit))

    def times(self, node: onnx.NodeProto) -> _Sum | None:
        """An element-wise product of two computed values."""
        a, b = (self._grid(n) for n in node.input)
        if a is None or b is None:
            return None
        both = [self._wide(g) for g in (a, b)]
        return _Sum(self._add("Mul", *both), np.asarray(a.scale * b.scale))

    def same(self, node: onnx.NodeProto) -> _Sum | None:
        """A value that is only put on another scale."""
        grid = self._grid(node.output[0])
        return None if grid is None else _Sum(self._wide(grid), np.asarray(grid.scale))

    def _grid(self, name: str) -> _Grid | None:
        """The integers that a computed value stands for; None without 8-bit ones."""
        node = self._maker.get(name)
        if node is None or node.op_type != "DequantizeLinear" or node.input[0] in self._stored:
            return None
        scale, zero = self._settings(node)
        if scale is None or zero.dtype not in _NARROW:
            return None
        return _Grid(node.input[0], float(scale), int(zero), zero.dtype)

    def _weights(self, name: str) -> _Stored | None:
        node = self._maker.get(name)
        if node is None or node.op_type != "DequantizeLinear":
            return None
        if any(n not in self._stored for n in node.input):
            return None
        whole, scale = (self._stored[n].astype(np.float64) for n in node.input[:2])
        if len(node.input) > 2 and self._stored[node.input[2]].any():
            return None  # the NPU's weights are symmetric
        return _Stored(whole, scale)

    def _settings(self, node: onnx.NodeProto) -> tuple[np.float64 | None, Any]:
        """Step (None: many, or unknown) and zero point of a node that rounds or makes float."""
        if len(node.input) < 3 or any(n not in self._stored for n in node.input[1:]):
            return None, np.float32(0)
        scale, zero = (self._stored[n] for n in node.input[1:3])
        return (np.float64(scale.item()) if scale.size == 1 else None), zero.reshape(-1)[0]

    def _whole_of(self, grid: _Grid) -> str:
        """Integer - zero, in single precision."""
        if grid.integer not in self._whole:
            value = self._cast(grid.integer, TensorProto.FLOAT)
            if grid.zero:
                value = self._add("Sub", value, self._constant(np.float32(grid.zero)))
            self._whole[grid.integer] = value
        return self._whole[grid.integer]

    def _wide(self, grid: _Grid) -> str:
        return self._cast(self._whole_of(grid), TensorProto.DOUBLE)

    def _cast(self, name: str, kind: int) -> str:
        result = self._name(name)
        self._nodes.append(helper.make_node("Cast", [name], [result], name=result, to=kind))
        return result

    def _add(self, op: str, *inputs: str) -> str:
        result = self._name(inputs[0])
        self._nodes.append(helper.make_node(op, list(inputs), [result], name=result))
        return result

    def _constant(self, value: Any) -> str:
        name = self._name("npu.constant")
        self._graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def _name(self, start: str) -> str:
        return graphs.unique(f"{start}.npu" if not start.endswith(".npu") else start, self._used)


_HALF = np.float64(0.5)
_RULES: Mapping[str, Callable[[_Rewriter, onnx.NodeProto], _Sum | None]] = {
    "Conv": _Rewriter.product,
    "Gemm": _Rewriter.product,
    "MatMul": _Rewriter.product,
    "Add": _Rewriter.sum,
    "Sub": _Rewriter.sum,
    "Mul": _Rewriter.times,
    "DequantizeLinear": _Rewriter.same,
}


def _factors(wanted: Any) -> Array:
    """Each factor with the bits that the NPU has for it."""
    mantissa, exponent = np.frexp(np.asarray(wanted, np.float64))
    return np.ldexp(np.rint(np.ldexp(mantissa, _FACTOR_BITS)), exponent - _FACTOR_BITS)
