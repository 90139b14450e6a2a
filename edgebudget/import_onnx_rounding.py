"""QuantizeLinear and DequantizeLinear as torch's `quantized_decomposed` operators.

An unsigned integer q with zero point z stands for the same number as the signed integer
q - 2^(bits-1) with zero point z - 2^(bits-1): the values are equal, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.ao.quantization.fx._decomposed  # registers the operators
from torch import Tensor

from edgebudget.import_onnx_call import Call, Grid, Op, Run

if TYPE_CHECKING:
    from edgebudget.import_onnx_call import Scope

_SIGNED: Mapping[torch.dtype, torch.dtype] = {
    torch.uint8: torch.int8,
    torch.uint16: torch.int16,
}
_DEFAULT_ZERO = torch.uint8  # of a QuantizeLinear that names no type


@dataclass(frozen=True, slots=True)
class Packed:
    """A stored integer tensor: the names of its parts, and the axis of its steps (None: one)."""

    node: str
    whole: str
    scale: str
    zero: str
    axis: int | None

    def moved(self, whole: str, rank: int) -> Packed:
        """The same with its two dimensions swapped, stored as `whole`."""
        axis = None if self.axis is None else rank - 1 - self.axis
        return replace(self, node=f"{self.node}.T", whole=whole, axis=axis)

    def value(self, known: Mapping[str, Tensor]) -> Tensor:
        """The float tensor it stands for."""
        whole, scale, zero = known[self.whole], known[self.scale], known[self.zero]
        if self.axis is not None:
            shape = [1] * whole.ndim
            shape[self.axis] = -1
            scale, zero = scale.reshape(shape), zero.reshape(shape)
        return (whole.to(torch.float32) - zero.to(torch.float32)) * scale

    def op(self, scope: Scope) -> Op:
        """The operator that makes it float."""
        dtype = scope.known[self.whole].dtype
        low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max
        ops = torch.ops.quantized_decomposed
        if self.axis is None:
            scale, zero = float(scope.known[self.scale]), int(scope.known[self.zero])
            one = ops.dequantize_per_tensor
            return Op(lambda w: one(w, scale, zero, low, high, dtype), (self.whole,))
        axis, many = self.axis, ops.dequantize_per_channel
        names = (self.whole, self.scale, self.zero)
        return Op(lambda w, s, z: many(w, s, z, axis, low, high, dtype), names)


class Rounding:
    """Which values lie on which grid, and which integers are stored signed for unsigned."""

    def __init__(self, signed: bool) -> None:
        self.grids: dict[str, Grid] = {}  # float values that come from integers
        self._signed = signed
        self._shifted: dict[str, tuple[Grid, torch.dtype]] = {}  # and the dtype ONNX says

    def is_shifted(self, name: str) -> bool:
        """Whether an integer value is signed here and unsigned in the graph."""
        return name in self._shifted

    def moved(self, source: str, names: Iterable[str]) -> None:
        """Values that only move a shifted one are shifted as well."""
        self._shifted.update((n, self._shifted[source]) for n in names if n)

    def plain(self, name: str) -> Run:
        """What makes a shifted value the unsigned integers that the graph says.

        Through the numbers that they stand for: engines take an integer tensor to have one grid.
        """
        grid, dtype = self._shifted[name]
        settings = (grid.scale, grid.zero, grid.low, grid.high, grid.dtype)
        factor, offset = 1.0 / grid.scale, grid.zero - grid.low + 0.5  # a cast cuts off
        ops = torch.ops.quantized_decomposed
        return lambda q: (ops.dequantize_per_tensor(q, *settings) * factor + offset).to(dtype)

    def grid_of(self, call: Call) -> Grid | None:
        """The grid of a QuantizeLinear or DequantizeLinear; None where it has many steps."""
        scale, zero, dtype = self._settings(call)
        if scale.numel() != 1:
            return None
        low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max
        shift = self._shift(dtype)
        dtype = _SIGNED[dtype] if shift else dtype
        return Grid(float(scale), int(zero) - shift, low - shift, high - shift, dtype)

    def op(self, call: Call) -> Op:
        """What runs for a node that rounds, or makes float, a computed value."""
        grid = self.grid_of(call)
        if grid is None:
            return self._many(call)
        settings = (grid.scale, grid.zero, grid.low, grid.high, grid.dtype)
        ops, source, result = torch.ops.quantized_decomposed, call.inputs[0], call.node.output[0]
        dtype = self._settings(call)[2]
        if call.node.op_type == "QuantizeLinear":
            if dtype != grid.dtype:
                self._shifted[result] = (grid, dtype)
            return Op(lambda x: ops.quantize_per_tensor(x, *settings), (source,))
        self.grids[result] = grid
        if source in self._shifted or dtype == grid.dtype:
            return Op(lambda q: ops.dequantize_per_tensor(q, *settings), (source,))
        # An input of the graph, which a caller gives unsigned.
        zero = float(grid.zero - grid.low)
        return Op(lambda q: grid.round((q.to(torch.float32) - zero) * grid.scale), (source,))

    def packed(self, call: Call) -> Packed:
        """A stored integer tensor with its steps."""
        scale, zero, _ = self._settings(call)
        whole = call.constant(0)
        assert whole is not None
        shift = self._shift(whole.dtype)
        name = call.inputs[0]
        if shift:
            name = call.scope.stored(f"{name}.signed", _signed(whole))
        many = scale.numel() != 1
        if many and call.whole("block_size", 0):
            raise call.refuse("has steps per block", "quantize per tensor or per channel")
        shape = scale.shape if many else ()
        zeros = (zero.to(torch.int64) - shift).reshape(-1).expand(scale.numel()).reshape(shape)
        return Packed(
            node=call.node.name,
            whole=name,
            scale=call.scope.stored(f"{call.node.name}.steps", scale.reshape(shape)),
            zero=call.scope.stored(f"{call.node.name}.zeros", zeros),
            axis=call.whole("axis", 1) % whole.ndim if many else None,
        )

    def _many(self, call: Call) -> Op:
        """A computed value with one step per channel."""
        scale, zero, dtype = self._settings(call)
        if self._shift(dtype) or call.whole("block_size", 0):
            raise call.refuse("has many steps for unsigned or blocked values")
        axis, low, high = call.axis("axis", 1), torch.iinfo(dtype).min, torch.iinfo(dtype).max
        steps = call.scope.stored(f"{call.node.name}.steps", scale)
        zeros = zero.to(torch.int64).expand(scale.numel())
        zeros_name = call.scope.stored(f"{call.node.name}.zeros", zeros)
        ops = torch.ops.quantized_decomposed
        rounds = call.node.op_type == "QuantizeLinear"
        run = ops.quantize_per_channel if rounds else ops.dequantize_per_channel
        return Op(
            lambda x, s, z: run(x, s, z, axis, low, high, dtype),
            (call.inputs[0], steps, zeros_name),
        )

    def _settings(self, call: Call) -> tuple[Tensor, Tensor, torch.dtype]:
        scale, zero = call.constant(1), call.constant(2)
        assert scale is not None
        if scale.dtype != torch.float32:
            raise call.refuse(f"has steps of type {scale.dtype}", "quantize from float32")
        if zero is None:
            whole = call.scope.known.get(call.inputs[0])
            named = call.node.op_type == "DequantizeLinear" and whole is not None
            zero = torch.zeros((), dtype=whole.dtype if named and whole is not None else None)
            if not named:
                zero = zero.to(_DEFAULT_ZERO)
        if zero.dtype.is_floating_point:
            raise call.refuse(f"rounds to {zero.dtype}", "quantize to integers")
        return scale, zero, zero.dtype

    def _shift(self, dtype: torch.dtype) -> int:
        if not self._signed or dtype not in _SIGNED:
            return 0
        return (torch.iinfo(dtype).max + 1) // 2


def _signed(whole: Tensor) -> Tensor:
    dtype = _SIGNED[whole.dtype]
    return (whole.to(torch.int32) + torch.iinfo(dtype).min).to(dtype)
