"""Groups of channels that must be removed together, each proven on the network itself.

torch-pruning's dependency graph ("DepGraph: Towards Any Structural Pruning", 2023) proposes the
groups. It takes operators that it does not know for element-wise, so nothing it says is trusted:
a group is used only after the network without some of its channels answered exactly like the
network with the consumers of those channels set to zero.
"""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from edgebudget.train import Forward
from edgebudget_passes._slicing import Removal, remove_channels, zero_inputs

Role = Literal["out", "in"]
_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.Linear)


@dataclass(frozen=True, slots=True)
class Member:
    """A layer of a group: `index[c]` are the positions of channel c in the layer's dimension."""

    layer: str
    role: Role
    index: tuple[tuple[int, ...], ...]

    @property
    def span(self) -> int:
        """Positions per channel."""
        return len(self.index[0])


@dataclass(frozen=True, slots=True)
class ChannelGroup:
    """Channels 0..size-1 that run through all members; named after the layer that makes them."""

    name: str
    size: int
    members: tuple[Member, ...]

    @property
    def consumers(self) -> tuple[Member, ...]:
        """Layers that read the channels."""
        return tuple(m for m in self.members if m.role == "in")


@dataclass(frozen=True, slots=True)
class Grouping:
    """The groups that can shrink, and why the others cannot (name, reason)."""

    groups: tuple[ChannelGroup, ...]
    declined: tuple[tuple[str, str], ...]


def find_groups(body: nn.Module, forward: Forward, inputs: tuple[Tensor, ...]) -> Grouping:
    """Propose groups by tracing `body` once on `inputs`, and keep those that are proven."""
    traced = copy.deepcopy(body).eval()
    for p in traced.parameters():
        p.requires_grad_(True)
    try:
        graph = _trace(traced, forward, inputs)
        roots = _roots(graph)
    except Exception as e:  # the tracer raises whatever the model's structure provokes
        return Grouping((), (("model", f"the dependency graph cannot be traced: {_first(e)}"),))
    names = {m: n for n, m in traced.named_modules()}
    groups: list[ChannelGroup] = []
    declined: list[tuple[str, str]] = []
    seen: set[str] = set()
    for layer in roots:
        name = names[layer]
        if name in seen:
            continue
        found = _propose(graph, layer, name, names)
        if isinstance(found, str):
            declined.append((name, found))
            continue
        seen.update(m.layer for m in found.members if m.role == "out")
        groups.append(found)
    return _proven(body, forward, inputs, groups, declined)


def _trace(body: nn.Module, forward: Forward, inputs: tuple[Tensor, ...]) -> Any:
    import torch_pruning as tp

    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        return tp.DependencyGraph().build_dependency(
            body,
            example_inputs=inputs,
            forward_fn=lambda m, x: list(forward(m, x)),
            verbose=False,
        )


def _roots(graph: Any) -> list[nn.Module]:
    """Layers that make channels, in the order of the module tree."""
    return [m for m in graph.model.modules() if m in graph.module2node and isinstance(m, _LAYERS)]


def _depthwise(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) and (
        1 < layer.groups == layer.in_channels == layer.out_channels
    )


def _propose(
    graph: Any, layer: nn.Module, name: str, names: Mapping[nn.Module, str]
) -> ChannelGroup | str:
    """The group that starts at `layer`, or why there is none."""
    if getattr(layer, "groups", 1) != 1:
        return "depthwise: shrinks with its input" if _depthwise(layer) else "grouped convolution"
    pruner = graph.get_pruner_of_module(layer)
    size = int(pruner.get_out_channels(layer))
    try:
        found = graph.get_pruning_group(layer, pruner.prune_out_channels, list(range(size)))
    except Exception as e:  # the tracer's index mappings raise many unrelated types
        return f"its dependencies cannot be followed: {_first(e)}"
    members: list[Member] = []
    for item in found:
        target = item.dep.target.module
        if "Output" in type(target).__name__:
            return "its channels are an output of the model"
        if target not in names:
            if isinstance(target, nn.Parameter):
                return "its channels meet a parameter outside any layer"
            continue
        member = _member(graph, item, target, names[target], size)
        if isinstance(member, str):
            return member
        if member is not None:
            members.append(member)
    if not any(m.role == "in" for m in members):
        return "no layer reads its channels: they are an output of the model"
    return ChannelGroup(name, size, tuple(members))


def _member(graph: Any, item: Any, target: nn.Module, name: str, size: int) -> Member | str | None:
    role: Role = "out"
    if isinstance(target, _LAYERS) and not _depthwise(target):
        if getattr(target, "groups", 1) != 1:
            return f"it runs through the grouped convolution {name}"
        role = "in" if graph.is_in_channel_pruning_fn(item.dep.handler) else "out"
    elif isinstance(target, nn.LayerNorm | nn.GroupNorm):
        return f"{name} normalises over these channels together"
    elif isinstance(target, nn.PReLU) and target.num_parameters == 1:
        return None
    elif not _depthwise(target) and not isinstance(
        target, nn.modules.batchnorm._NormBase | nn.PReLU
    ):
        return f"it runs through {name} ({type(target).__name__})"
    index: list[list[int]] = [[] for _ in range(size)]
    for position, channel in zip(item.idxs, item.root_idxs, strict=True):
        index[channel].append(int(position))
    if len({len(i) for i in index}) != 1 or not index[0]:
        return f"its channels reach {name} unevenly"
    return Member(name, role, tuple(tuple(sorted(i)) for i in index))


def removal(groups: Sequence[ChannelGroup], keep: Sequence[Sequence[int]]) -> Removal:
    """What goes from every layer when each group keeps only the channels in `keep`."""
    out: dict[str, set[int]] = {}
    into: dict[str, set[int]] = {}
    for group, kept in zip(groups, keep, strict=True):
        gone = sorted(set(range(group.size)) - set(kept))
        for member in group.members:
            where = out if member.role == "out" else into
            where.setdefault(member.layer, set()).update(p for c in gone for p in member.index[c])
    return Removal(
        {k: tuple(sorted(v)) for k, v in out.items() if v},
        {k: tuple(sorted(v)) for k, v in into.items() if v},
    )


def _proven(
    body: nn.Module,
    forward: Forward,
    inputs: tuple[Tensor, ...],
    groups: list[ChannelGroup],
    declined: list[tuple[str, str]],
) -> Grouping:
    """Keep the groups whose removal equals silencing, halving the set until culprits stand out."""
    shaken = _shaken(body).double()
    wide = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    good: list[ChannelGroup] = []
    stack = [groups] if groups else []
    while stack:
        part = stack.pop()
        why = _refuted(shaken, forward, wide, part)
        if not why:
            good.extend(part)
        elif len(part) == 1:
            declined.append((part[0].name, why))
        else:
            stack += [part[len(part) // 2 :], part[: len(part) // 2]]
    # Groups proven apart may still clash with each other.
    if len(good) < len(groups) and good and (why := _refuted(shaken, forward, wide, good)):
        return Grouping((), (*declined, ("model", f"groups that work alone clash: {why}")))
    return Grouping(tuple(good), tuple(declined))


def _shaken(body: nn.Module) -> nn.Module:
    """A copy with a little noise on the weights: a dead channel would prove anything."""
    copied = copy.deepcopy(body).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in copied.parameters():
            if p.is_floating_point():
                scale = 0.1 * float(p.abs().mean()) + 1e-3
                p.add_(scale * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return copied


def _refuted(
    body: nn.Module,
    forward: Forward,
    inputs: tuple[Tensor, ...],
    groups: Sequence[ChannelGroup],
) -> str:
    """Why removing half of these channels is not the same as silencing them; "" if it is."""
    draw = random.Random(0)
    keep = [sorted(draw.sample(range(g.size), max(1, g.size // 2))) for g in groups]
    gone = removal(groups, keep)
    try:
        with torch.no_grad():
            less = forward(remove_channels(body, gone), inputs)
            silent = forward(zero_inputs(body, gone), inputs)
    except Exception as e:  # a shape that no longer fits, raised by the user's forward
        return f"the network does not run without some of its channels: {_first(e)}"
    for a, b in zip(less, silent, strict=True):
        if a.shape != b.shape:
            return f"an output changes its shape from {tuple(b.shape)} to {tuple(a.shape)}"
        room = 1e-6 * float(b.abs().max()) + 1e-9
        if a.is_floating_point() and not float((a - b).abs().max()) <= room:
            return "channels are not where the dependency graph puts them (pads, reshapes, mixing)"
    return ""


def _first(e: Exception) -> str:
    text = str(e).strip()
    return text.splitlines()[0][:160] if text else type(e).__name__
