"""One ONNX node as its import rule sees it, and what the rule gives back.

Imports torch and onnx: reach this module only where a graph becomes a torch module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from edgebudget_runtime.errors import UnsupportedError

if TYPE_CHECKING:
    from onnx import NodeProto

Run = Callable[..., Any]  # tensors in, a tensor or a tuple of them out


@dataclass(frozen=True, slots=True)
class Grid:
    """The integers a tensor is rounded to: one step and zero point for all of it."""

    scale: float
    zero: int
    low: int
    high: int
    dtype: torch.dtype

    def round(self, x: Tensor) -> Tensor:
        """`x` on this grid, as float."""
        settings = (self.scale, self.zero, self.low, self.high, self.dtype)
        ops = torch.ops.quantized_decomposed
        whole = ops.quantize_per_tensor(x, *settings)
        found: Tensor = ops.dequantize_per_tensor(whole, *settings)
        return found


@dataclass(frozen=True, slots=True)
class Op:
    """What runs for a node: a function, and the names of the values it takes."""

    run: Run
    args: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Fixed:
    """A node whose result is known at import."""

    value: Tensor


class Scope(Protocol):
    """What a rule may ask about the graph around its node."""

    @property
    def known(self) -> Mapping[str, Tensor]:
        """Values that are known at import."""
        ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Static shapes by value."""
        ...

    @property
    def batches(self) -> bool:
        """Whether the first dimension of what is computed may be larger than its shape says."""
        ...

    def grid(self, name: str) -> Grid | None:
        """The grid of a value that comes from integers; None for others."""
        ...

    def grid_after(self, name: str) -> Grid | None:
        """The grid that a value is rounded to, where that alone reads it."""
        ...

    def transposed(self, name: str) -> str:
        """A value of two dimensions with these swapped; a stored one stays stored (and int8)."""
        ...

    def stored(self, name: str, value: Tensor) -> str:
        """Keep a new constant under a name like this one."""
        ...

    def is_packed(self, name: str) -> bool:
        """Whether a value is a stored integer tensor with its steps."""
        ...


@dataclass(frozen=True, slots=True)
class Call:
    """A node, its attributes, and what is known about its operands ("" is an absent one)."""

    node: NodeProto
    attributes: Mapping[str, Any]
    scope: Scope
    opset: int

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the operands."""
        return tuple(self.node.input)

    def refuse(self, what: str, hint: str = "") -> UnsupportedError:
        """The error for a node that cannot be imported."""
        return UnsupportedError(
            "EB243",
            f"{self.node.op_type} {self.node.name!r} {what}",
            hint=hint or "replace it in the model, or compile for a target that runs ONNX",
        )

    def has(self, index: int) -> bool:
        """Whether an optional operand is there."""
        return index < len(self.node.input) and bool(self.node.input[index])

    def op(self, run: Run, count: int | None = None) -> Op:
        """An `Op` on the first `count` operands (all of them by default)."""
        names = self.inputs if count is None else self.inputs[:count]
        return Op(run, tuple(n for n in names if n))

    def constant(self, index: int) -> Tensor | None:
        """The value of an operand that must be stored; None where it is absent."""
        if not self.has(index):
            return None
        found = self.scope.known.get(self.node.input[index])
        if found is None:
            raise self.refuse(
                f"takes {self.node.input[index]!r}, which is computed at run time",
                "export the model with fixed shapes and settings",
            )
        return found

    def ints(self, name: str, index: int | None = None) -> list[int] | None:
        """A list of integers from an attribute or, in newer operator sets, a stored operand."""
        if name in self.attributes:
            value = self.attributes[name]
            return [int(v) for v in value] if isinstance(value, Sequence) else [int(value)]
        found = None if index is None else self.constant(index)
        return None if found is None else [int(v) for v in found.reshape(-1).tolist()]

    def number(self, name: str, default: float) -> float:
        """A number from an attribute."""
        return float(self.attributes.get(name, default))

    def whole(self, name: str, default: int) -> int:
        """An integer from an attribute."""
        return int(self.attributes.get(name, default))

    def text(self, name: str, default: str) -> str:
        """A word from an attribute."""
        value = self.attributes.get(name, default)
        return value.decode() if isinstance(value, bytes) else str(value)

    def shape(self, index: int = 0) -> tuple[int, ...]:
        """The static shape of an operand."""
        return self._static(self.node.input[index])

    def out_shape(self, index: int = 0) -> tuple[int, ...]:
        """The static shape of a result."""
        return self._static(self.node.output[index])

    def sized(self, shape: Sequence[int]) -> list[int]:
        """A static shape to give the first operand; -1 for a first dimension that is free.

        Only what keeps its first dimension can take a batch: the graph's shapes are for one sample.
        """
        free = self.scope.batches and shape and self.shape() and shape[0] == self.shape()[0]
        return [-1, *shape[1:]] if free else list(shape)

    def rank(self, index: int = 0) -> int:
        """Number of dimensions of an operand."""
        return len(self.shape(index))

    def axis(self, name: str, default: int) -> int:
        """An axis of the first operand, counted from the front."""
        return self.whole(name, default) % max(1, self.rank())

    def grid(self, index: int = 0) -> Grid | None:
        """See `Scope.grid`."""
        return self.scope.grid(self.node.input[index])

    def _static(self, name: str) -> tuple[int, ...]:
        found = self.scope.shapes.get(name)
        if found is None:
            raise self.refuse(
                f"reads or makes {name!r}, whose shape cannot be derived",
                "export the model with fixed shapes",
            )
        return found


Rule = Callable[[Call], "Op | Fixed"]


def on_grid(grid: Grid | None, x: Tensor) -> Tensor:
    """`x` rounded, where there is a grid: engines fuse integers only around single operators."""
    return x if grid is None else grid.round(x)
