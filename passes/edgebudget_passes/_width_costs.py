"""MACs, or a target's time, as a function of the groups' widths, in microseconds per candidate.

Positions of every layer come from one run; the rest is arithmetic. The exact counter still has
the last word on the MACs of the network that is built, and a draft's latency on its time.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from edgebudget.layer_time import LayerKind, LayerTime
from edgebudget.train import Forward
from edgebudget_passes._channel_groups import ChannelGroup

_CONVS = nn.modules.conv._ConvNd
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True, slots=True)
class _Layer:
    """A removed channel of group g takes `span` off a side. `inputs` are those of one output."""

    kind: LayerKind
    taps: int
    outputs: int
    inputs: int
    cut_out: tuple[tuple[int, int], ...]  # (group, span)
    cut_in: tuple[tuple[int, int], ...]
    positions: int

    @property
    def macs(self) -> int:
        """At full width."""
        return self.positions * self.taps * self.outputs * self.inputs


Price = Callable[[_Layer, int, int], int]  # layer, outputs and inputs that are left


@dataclass(frozen=True, slots=True)
class WidthCost:
    """Callable: one width per group -> what the network costs, in whole units."""

    sizes: tuple[int, ...]
    layers: tuple[_Layer, ...]  # whose widths change
    elsewhere: int  # what widths do not change
    price: Price
    _touched: tuple[frozenset[int], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        touched: list[set[int]] = [set() for _ in self.sizes]
        for number, layer in enumerate(self.layers):
            for group, _ in (*layer.cut_out, *layer.cut_in):
                touched[group].add(number)
        object.__setattr__(self, "_touched", tuple(map(frozenset, touched)))

    def __call__(self, widths: Sequence[int]) -> int:
        return self.elsewhere + self._of(range(len(self.layers)), widths)

    def change(self, widths: Sequence[int], moves: Mapping[int, int]) -> int:
        """What the cost grows by when some groups get other widths; reads only their layers."""
        after = list(widths)
        for group, width in moves.items():
            after[group] = width
        numbers = frozenset[int]().union(*(self._touched[g] for g in moves))
        return self._of(numbers, after) - self._of(numbers, widths)

    def _of(self, numbers: Iterable[int], widths: Sequence[int]) -> int:
        total, sizes = 0, self.sizes
        for number in numbers:
            layer = self.layers[number]
            outputs, inputs = layer.outputs, layer.inputs
            for g, span in layer.cut_out:
                outputs -= (sizes[g] - widths[g]) * span
            for g, span in layer.cut_in:
                inputs -= (sizes[g] - widths[g]) * span
            total += self.price(layer, outputs, inputs)
        return total

    def share(self, group: int) -> int:
        """What removing all but none of a group would save at full width: its layers' work."""
        widths = list(self.sizes)
        full = self(widths)
        widths[group] = 0
        return full - self(widths)


def _macs(layer: _Layer, outputs: int, inputs: int) -> int:
    return layer.positions * layer.taps * outputs * inputs


def width_macs(
    body: nn.Module,
    forward: Forward,
    inputs: tuple[Tensor, ...],
    groups: Sequence[ChannelGroup],
    total: int | None = None,
) -> WidthCost:
    """Multiply-accumulates; `total` is the exact count of the whole network where it is known."""
    layers = _layers(body, forward, inputs, groups)
    varying = tuple(x for x in layers if x.cut_out or x.cut_in)
    whole = sum(x.macs for x in layers) if total is None else total
    elsewhere = whole - sum(x.macs for x in varying)
    return WidthCost(tuple(g.size for g in groups), varying, elsewhere, _macs)


def width_time(
    body: nn.Module,
    forward: Forward,
    inputs: tuple[Tensor, ...],
    groups: Sequence[ChannelGroup],
    times: LayerTime,
) -> WidthCost:
    """Modelled nanoseconds of all layers with weights; what lies between them is not in it."""

    def price(layer: _Layer, outputs: int, inputs: int) -> int:
        us = times.us(layer.kind, layer.positions, layer.taps, outputs, inputs)
        return round(us * 1e3)

    layers = _layers(body, forward, inputs, groups)
    varying = tuple(x for x in layers if x.cut_out or x.cut_in)
    fixed = (x for x in layers if not (x.cut_out or x.cut_in))
    still = sum(price(x, x.outputs, x.inputs) for x in fixed)
    return WidthCost(tuple(g.size for g in groups), varying, still, price)


def _layers(
    body: nn.Module,
    forward: Forward,
    inputs: tuple[Tensor, ...],
    groups: Sequence[ChannelGroup],
) -> list[_Layer]:
    positions = _positions(body, forward, inputs)
    outs: dict[str, list[tuple[int, int]]] = {}
    ins: dict[str, list[tuple[int, int]]] = {}
    for number, group in enumerate(groups):
        for member in group.members:
            side = outs if member.role == "out" else ins
            side.setdefault(member.layer, []).append((number, member.span))
    found = []
    for name, layer in body.named_modules():
        if name in positions:
            cut = tuple(outs.get(name, ())), tuple(ins.get(name, ()))
            found.append(_Layer(*_shape(layer), *cut, positions=positions[name]))
    return found


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


def _shape(layer: nn.Module) -> tuple[LayerKind, int, int, int]:
    """Kind, taps, outputs, and inputs of one output."""
    if isinstance(layer, nn.Linear):
        return "point", 1, layer.out_features, layer.in_features
    assert isinstance(layer, _CONVS)
    taps = math.prod(layer.kernel_size)
    inputs = layer.in_channels // layer.groups
    kind: LayerKind = "conv" if taps > 1 else "point"
    if inputs == 1 and layer.groups > 1:
        kind = "depthwise"
    return kind, taps, layer.out_channels, inputs
