"""Multiply-accumulates as a function of the groups' widths, in microseconds per candidate.

Positions of every layer come from one run; the rest is arithmetic. The exact counter still has
the last word on the network that is built.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgebudget.train import Forward
from edgebudget_passes._channel_groups import ChannelGroup

_CONVS = nn.modules.conv._ConvNd
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True, slots=True)
class _Layer:
    """macs = factor * outputs * inputs; a removed channel of group g takes `span` off a side."""

    factor: int
    outputs: int
    inputs: int
    cut_out: tuple[tuple[int, int], ...]  # (group, span)
    cut_in: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class WidthMacs:
    """Callable: one width per group -> multiply-accumulates of the network."""

    sizes: tuple[int, ...]
    layers: tuple[_Layer, ...]
    elsewhere: int  # work that widths do not change, from the exact count

    def __call__(self, widths: Sequence[int]) -> int:
        total = self.elsewhere
        gone = [s - w for s, w in zip(self.sizes, widths, strict=True)]
        for layer in self.layers:
            outputs = layer.outputs - sum(gone[g] * span for g, span in layer.cut_out)
            inputs = layer.inputs - sum(gone[g] * span for g, span in layer.cut_in)
            total += layer.factor * outputs * inputs
        return total

    def share(self, group: int) -> int:
        """What removing all but none of a group would save at full width: its layers' work."""
        widths = list(self.sizes)
        full = self(widths)
        widths[group] = 0
        return full - self(widths)


def width_macs(
    body: nn.Module,
    forward: Forward,
    inputs: tuple[Tensor, ...],
    groups: Sequence[ChannelGroup],
    total: int | None = None,
) -> WidthMacs:
    """Derive the formula; `total` is the exact count of the whole network where it is known."""
    positions = _positions(body, forward, inputs)
    outs: dict[str, list[tuple[int, int]]] = {}
    ins: dict[str, list[tuple[int, int]]] = {}
    for number, group in enumerate(groups):
        for member in group.members:
            side = outs if member.role == "out" else ins
            side.setdefault(member.layer, []).append((number, member.span))
    layers: list[_Layer] = []
    counted = 0
    for name, layer in body.named_modules():
        if name not in positions:
            continue
        factor, outputs, inputs_ = _factors(layer, positions[name])
        counted += factor * outputs * inputs_
        if name in outs or name in ins:
            layers.append(
                _Layer(
                    factor, outputs, inputs_, tuple(outs.get(name, ())), tuple(ins.get(name, ()))
                )
            )
    varying = sum(x.factor * x.outputs * x.inputs for x in layers)
    whole = counted if total is None else total
    return WidthMacs(tuple(g.size for g in groups), tuple(layers), whole - varying)


def _positions(body: nn.Module, forward: Forward, inputs: tuple[Tensor, ...]) -> dict[str, int]:
    """How often each layer's kernel is applied, over all its calls; shapes only if possible."""
    try:
        shapes = copy.deepcopy(body).to("meta")
        return _observed(shapes, forward, tuple(x.to("meta") for x in inputs))
    except Exception:  # some networks make tensors of their own, which do not mix with shapes
        return _observed(body, forward, inputs)


def _observed(body: nn.Module, forward: Forward, inputs: tuple[Tensor, ...]) -> dict[str, int]:
    found: dict[str, int] = {}

    def note(name: str, layer: nn.Module, x: Tensor, y: Tensor) -> None:
        if isinstance(layer, nn.Linear):
            times = y.numel() // max(1, layer.out_features)
        else:
            grid = x if isinstance(layer, _TRANSPOSED) else y
            times = grid.numel() // max(1, grid.shape[1])
        found[name] = found.get(name, 0) + times

    hooks = [
        m.register_forward_hook(lambda m, args, y, n=n: note(n, m, args[0], y))
        for n, m in body.named_modules()
        if isinstance(m, nn.Linear | _CONVS)
    ]
    try:
        with torch.no_grad():
            forward(body, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _factors(layer: nn.Module, positions: int) -> tuple[int, int, int]:
    if isinstance(layer, nn.Linear):
        return positions, layer.out_features, layer.in_features
    assert isinstance(layer, _CONVS)
    kernel = positions * math.prod(layer.kernel_size)
    return kernel, layer.out_channels, layer.in_channels // layer.groups
