"""Take channels out of layers, or silence them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True, slots=True)
class Removal:
    """Positions to take out of each layer's output and input dimension."""

    out: Mapping[str, tuple[int, ...]]
    into: Mapping[str, tuple[int, ...]]


def remove_channels(body: nn.Module, gone: Removal) -> nn.Module:
    """A copy of `body` without these positions."""
    copied = copy.deepcopy(body)
    for name, positions in gone.out.items():
        _cut_out(copied.get_submodule(name), positions)
    for name, positions in gone.into.items():
        _cut_in(copied.get_submodule(name), positions)
    return copied


def zero_inputs(body: nn.Module, gone: Removal) -> nn.Module:
    """A copy of `body` whose layers ignore these input positions."""
    copied = copy.deepcopy(body)
    with torch.no_grad():
        for name, positions in gone.into.items():
            layer = copied.get_submodule(name)
            layer.get_parameter("weight").index_fill_(
                in_dim(layer), torch.tensor(positions, dtype=torch.long), 0.0
            )
    return copied


def in_dim(layer: nn.Module) -> int:
    """The weight dimension of input channels."""
    return 0 if isinstance(layer, _TRANSPOSED) else 1


def _kept(size: int, gone: tuple[int, ...]) -> Tensor:
    mask = torch.ones(size, dtype=torch.bool)
    mask[list(gone)] = False
    return mask.nonzero().flatten()


def _select(layer: nn.Module, name: str, dim: int, kept: Tensor) -> None:
    value = getattr(layer, name, None)
    if value is None:
        return
    less = value.detach().index_select(dim, kept).clone()
    if isinstance(value, nn.Parameter):
        setattr(layer, name, nn.Parameter(less, requires_grad=value.requires_grad))
    else:
        setattr(layer, name, less)


def _cut_out(layer: nn.Module, gone: tuple[int, ...]) -> None:
    if isinstance(layer, nn.Linear):
        kept = _kept(layer.out_features, gone)
        _select(layer, "weight", 0, kept)
        _select(layer, "bias", 0, kept)
        layer.out_features = len(kept)
    elif isinstance(layer, nn.modules.conv._ConvNd):
        kept = _kept(layer.out_channels, gone)
        depthwise = layer.groups > 1
        _select(layer, "weight", 1 - in_dim(layer), kept)
        _select(layer, "bias", 0, kept)
        layer.out_channels = len(kept)
        if depthwise:
            layer.in_channels = layer.groups = len(kept)
    elif isinstance(layer, nn.modules.batchnorm._NormBase):
        kept = _kept(layer.num_features, gone)
        for name in ("weight", "bias", "running_mean", "running_var"):
            _select(layer, name, 0, kept)
        layer.num_features = len(kept)
    elif isinstance(layer, nn.PReLU):
        kept = _kept(layer.num_parameters, gone)
        _select(layer, "weight", 0, kept)
        layer.num_parameters = len(kept)
    else:
        raise TypeError(f"no rule for {type(layer).__name__}")


def _cut_in(layer: nn.Module, gone: tuple[int, ...]) -> None:
    dim = in_dim(layer)
    kept = _kept(layer.get_parameter("weight").shape[dim], gone)
    _select(layer, "weight", dim, kept)
    if isinstance(layer, nn.Linear):
        layer.in_features = len(kept)
    elif isinstance(layer, nn.modules.conv._ConvNd):
        layer.in_channels = len(kept)
