"""The edits that cut a variant out of a whole network. Each is plain data, and acts by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from edgebudget.scaled_input import ScaledInput
from edgebudget_passes._patch_resize import Resample, kernel_matrix, position_matrix
from edgebudget_passes._slicing import Removal, remove_channels


@dataclass(frozen=True, slots=True)
class CutChannels:
    """Take channels out."""

    gone: Removal
    order: ClassVar[int] = 0

    def __call__(self, body: nn.Module) -> nn.Module:
        """A copy without them."""
        return remove_channels(body, self.gone)


@dataclass(frozen=True, slots=True)
class Skip:
    """One module that is left out.

    `keeps_input`: it hands its first argument on; otherwise it answers zero, so that the shortcut
    beside it is what remains. `arity` is the length of the tuple that it returned, 0 for a tensor.
    """

    module: str
    keeps_input: bool
    arity: int


@dataclass(frozen=True, slots=True)
class LeaveOut:
    """Leave residual blocks out."""

    skips: tuple[Skip, ...]
    order: ClassVar[int] = 1

    def __call__(self, body: nn.Module) -> nn.Module:
        """The same module, the blocks replaced."""
        names = [f"{s.module}." for s in self.skips]
        for skip in self.skips:
            if not any(skip.module.startswith(n) for n in names):  # gone with what is around it
                swap(body, skip.module, left_out(skip))
        return body


def left_out(skip: Skip) -> nn.Module:
    """What stands where a module was."""
    return (_Handed if skip.keeps_input else _Silent)(skip.arity)


def swap(body: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Put `module` at `name`; what was there."""
    path, _, leaf = name.rpartition(".")
    parent = body.get_submodule(path)
    was: nn.Module = getattr(parent, leaf)
    setattr(parent, leaf, module)
    return was


class _Handed(nn.Module):
    """Answers with what it was given."""

    def __init__(self, arity: int) -> None:
        super().__init__()
        self.arity = arity

    def forward(self, *args: Any, **named: Any) -> Any:
        """The first argument."""
        value = args[0] if args else next(iter(named.values()))
        return (value, *(None,) * (self.arity - 1)) if self.arity else value


class _Silent(nn.Module):
    """Answers with one zero, which an addition stretches to any shape."""

    def __init__(self, arity: int) -> None:
        super().__init__()
        self.arity = arity

    def forward(self, *args: Any, **named: Any) -> Any:
        """Zero, of the type of the first argument."""
        first: Tensor = args[0] if args else next(iter(named.values()))
        zero = torch.zeros((), dtype=first.dtype, device=first.device)
        return (zero, *(None,) * (self.arity - 1)) if self.arity else zero


@dataclass(frozen=True, slots=True)
class ResizePatches:
    """Cut the picture into patches of `size`, with the kernel and the positions resized to it.

    `grid` is the number of patches down and across that `positions` (tokens in dimension
    `token_dim`, after `prefix` others) was made for.
    """

    conv: str
    positions: str
    size: tuple[int, int]
    grid: tuple[int, int]
    new_grid: tuple[int, int]
    prefix: int
    token_dim: int
    order: ClassVar[int] = 2

    def __call__(self, body: nn.Module) -> nn.Module:
        """The same module; both weights are computed from the stored ones at every call."""
        conv = body.get_submodule(self.conv)
        assert isinstance(conv, nn.Conv2d)
        old = (int(conv.kernel_size[0]), int(conv.kernel_size[1]))
        kernel = Resample(kernel_matrix(old, self.size), 2, self.size)
        conv.kernel_size = conv.stride = self.size
        parametrize.register_parametrization(conv, "weight", kernel, unsafe=True)
        path, _, leaf = self.positions.rpartition(".")
        moved = Resample(position_matrix(self.grid, self.new_grid, self.prefix), self.token_dim, ())
        parametrize.register_parametrization(body.get_submodule(path), leaf, moved, unsafe=True)
        return body


@dataclass(frozen=True, slots=True)
class Shrink:
    """Run on a smaller picture, shrunk inside the graph."""

    inputs: tuple[str, ...]
    image: str
    outer: tuple[int, int]
    inner: tuple[int, int]
    multiple: int
    order: ClassVar[int] = 3

    def __call__(self, body: nn.Module) -> nn.Module:
        """The module behind a shrinking of its picture."""
        network = body.network if isinstance(body, ScaledInput) else body
        return ScaledInput(network, self.inputs, self.image, self.outer, self.inner, self.multiple)


def skips_of(names: Sequence[Skip]) -> LeaveOut:
    """The edit that leaves these out, in an order that does not depend on how they were found."""
    return LeaveOut(tuple(sorted(names, key=lambda s: s.module)))
