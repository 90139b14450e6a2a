"""Which channels of a group to give up first, by several criteria."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from edgebudget.train import Forward, TensorData
from edgebudget.workload import TaskKind
from edgebudget_passes._channel_groups import ChannelGroup
from edgebudget_passes._layer_moments import Moments
from edgebudget_passes._slicing import in_dim


@dataclass(frozen=True, slots=True)
class Ranking:
    """`order[0]` goes first; `costs[i]` is what losing the first i channels costs, [size + 1]."""

    order: tuple[int, ...]
    costs: tuple[float, ...]

    def kept(self, width: int) -> tuple[int, ...]:
        """The `width` most important channels, ascending."""
        return tuple(sorted(self.order[len(self.order) - width :]))

    def cost(self, width: int) -> float:
        """What shrinking to `width` costs."""
        return self.costs[len(self.order) - width]


def _ranked(scores: Tensor) -> Ranking:
    order = torch.argsort(scores, stable=True)
    costs = torch.cat([scores.new_zeros(1), scores[order].cumsum(0)])
    return Ranking(tuple(order.tolist()), tuple(costs.tolist()))


def by_magnitude(body: nn.Module, groups: Sequence[ChannelGroup]) -> list[Ranking]:
    """Squared weights of all that makes or reads a channel, relative to the group's mean."""
    return [_ranked(_weights(body, g)) for g in groups]


def _weights(body: nn.Module, group: ChannelGroup) -> Tensor:
    total = torch.zeros(group.size, dtype=torch.float64)
    number = 0
    for member in group.members:
        layer = body.get_submodule(member.layer)
        if not isinstance(layer, nn.Linear | nn.modules.conv._ConvNd):
            continue
        weight = layer.get_parameter("weight").detach().double()
        dim = in_dim(layer) if member.role == "in" else 1 - in_dim(layer)
        if getattr(layer, "groups", 1) > 1:
            dim = 0
        power = weight.square().sum([d for d in range(weight.dim()) if d != dim])
        total += power[torch.tensor(member.index)].sum(1)
        number += 1
    total /= max(1, number)
    return total / total.mean().clamp_min(1e-30)


def by_norm_scale(body: nn.Module, groups: Sequence[ChannelGroup]) -> list[Ranking] | None:
    """|gamma| of batch normalisation ("Learning Efficient Convolutional Networks through Network
    Slimming", 2017); None where a group has no such layer."""
    rankings = []
    for group in groups:
        scales = [
            body.get_submodule(m.layer)
            .get_parameter("weight")
            .detach()
            .double()
            .abs()[torch.tensor(m.index)]
            for m in group.members
            if isinstance(body.get_submodule(m.layer), nn.modules.batchnorm._BatchNorm)
            and body.get_submodule(m.layer).weight is not None
        ]
        if not scales:
            return None
        score = torch.stack([s.mean(1) for s in scales]).mean(0)
        rankings.append(_ranked(score / score.mean().clamp_min(1e-30)))
    return rankings


def by_reconstruction(
    body: nn.Module, groups: Sequence[ChannelGroup], moments: Mapping[str, Moments]
) -> list[Ranking] | None:
    """Remove, one after the other, the channel whose loss the rest can best make up for.

    The error is that of the consumers' outputs after their weights were refitted, as a share of
    the outputs' power. None where some consumer has no moments.
    Source: "ZipLM: Inference-Aware Structured Pruning of Language Models", 2023 (block-wise
    optimal brain surgeon).
    """
    if any(m.layer not in moments for g in groups for m in g.consumers):
        return None
    return [_eliminate(body, g, moments) for g in groups]


@dataclass(slots=True)
class _Fit:
    weight: Tensor  # [out, d], refitted as channels go
    inverse: Tensor  # [d, d]
    blocks: Tensor  # [channels, b] rows of each channel
    power: float
    _buffers: tuple[Tensor, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self._buffers = torch.empty_like(self.weight), torch.empty_like(self.inverse)

    def errors(self) -> Tensor:
        """Relative error that losing each channel adds, [channels]."""
        if self.blocks.shape[1] == 1:  # one weight to an output: no systems to solve
            rows = self.blocks[:, 0]
            parts = self.weight[:, rows]
            return (parts * (parts / self.inverse[rows, rows])).sum(0) / self.power
        sub = self.inverse[self.blocks[:, :, None], self.blocks[:, None, :]]
        parts = self.weight[:, self.blocks].permute(1, 2, 0)
        added: Tensor = (parts * torch.linalg.solve(sub, parts)).sum((1, 2))
        return added / self.power

    def drop(self, channel: int) -> None:
        """Refit without a channel."""
        rows = self.blocks[channel]
        gain = torch.linalg.solve(self.inverse[rows][:, rows], self.inverse[rows])
        # Into kept memory: new pages for every channel take longer than the arithmetic.
        for matrix, product in zip((self.weight, self.inverse), self._buffers, strict=True):
            torch.mm(matrix[:, rows], gain, out=product)
            matrix -= product
        # Keep the removed block invertible; it is never asked for again.
        self.inverse[rows, rows] = 1.0
        self.weight[:, rows] = 0.0


def _eliminate(body: nn.Module, group: ChannelGroup, moments: Mapping[str, Moments]) -> Ranking:
    fits = []
    for member in group.consumers:
        known = moments[member.layer]
        weight = body.get_submodule(member.layer).get_parameter("weight").detach()
        flat = weight.double().flatten(1)
        blocks = torch.stack([known.rows(i) for i in member.index])
        power = float((flat @ known.second * flat).sum())
        inverse = torch.linalg.inv(known.second)
        fits.append(_Fit(flat.clone(), inverse, blocks, max(power, 1e-30)))
    order: list[int] = []
    total = 0.0
    costs = [0.0]
    gone = torch.zeros(group.size, dtype=torch.float64)
    for _ in range(group.size - 1):
        errors = torch.stack([f.errors() for f in fits]).mean(0) + gone
        channel = int(errors.argmin())
        total += float(errors[channel])
        for f in fits:
            f.drop(channel)
        gone[channel] = torch.inf
        order.append(channel)
        costs.append(total)
    order += [c for c in range(group.size) if c not in set(order)]
    costs.append(max(1.0, total))
    return Ranking(tuple(order), tuple(costs))


def by_fisher(
    body: nn.Module,
    forward: Forward,
    groups: Sequence[ChannelGroup],
    data: TensorData,
    kind: TaskKind,
    batch: int,
    seed: int,
) -> list[Ranking]:
    """Squared gradient, per sample, of the answer's loss with respect to a gate on each channel.

    At the original the distillation loss has no gradient, so its curvature is used: labels drawn
    from the original's own answer for classes, a random sign per output for anything else.
    Source: "Faster gaze prediction with dense networks and Fisher pruning", 2018.
    """
    totals = [torch.zeros(g.size, dtype=torch.float64) for g in groups]
    readers = sorted({m.layer for g in groups for m in g.consumers})
    draw = torch.Generator().manual_seed(seed)
    gates: dict[str, Tensor] = {}

    def gate(name: str, layer: nn.Module, x: Tensor) -> Tensor:
        dim = x.dim() - 1 if isinstance(layer, nn.Linear) else 1
        shape = [len(x), *(x.shape[d] if d == dim else 1 for d in range(1, x.dim()))]
        gates[name] = torch.ones(shape, requires_grad=True)
        return x * gates[name]

    hooks = [
        body.get_submodule(n).register_forward_pre_hook(
            lambda m, args, n=n: (gate(n, m, args[0]), *args[1:])
        )
        for n in readers
    ]
    wanted = [p.requires_grad for p in body.parameters()]
    try:
        for p in body.parameters():
            p.requires_grad_(False)
        for chunk in data.batches(batch):
            with torch.enable_grad():
                loss = _probe_loss(forward(body, chunk.inputs), kind, draw)
                # A head of an exit does not act on the last answer.
                grads = torch.autograd.grad(
                    loss, [gates[n] for n in readers], materialize_grads=True, allow_unused=True
                )
            slopes = {
                n: g.reshape(len(g), -1).double() for n, g in zip(readers, grads, strict=True)
            }
            for total, group in zip(totals, groups, strict=True):
                joint = sum(
                    slopes[m.layer][:, torch.tensor(m.index)].sum(2) for m in group.consumers
                )
                assert isinstance(joint, Tensor)
                total += joint.square().sum(0)
    finally:
        for hook in hooks:
            hook.remove()
        for p, flag in zip(body.parameters(), wanted, strict=True):
            p.requires_grad_(flag)
    return [_ranked(t / len(data)) for t in totals]


def _probe_loss(outputs: tuple[Tensor, ...], kind: TaskKind, draw: torch.Generator) -> Tensor:
    total = outputs[0].sum() * 0.0
    if kind == "classification":
        for y in outputs:  # every exit counts
            scores = y.flatten(0, -2)
            with torch.no_grad():
                drawn = torch.multinomial(scores.softmax(-1), 1, generator=draw).flatten()
            total = total + torch.nn.functional.cross_entropy(scores, drawn, reduction="sum")
        return total
    for y in outputs:
        if y.is_floating_point():
            signs = torch.randint(0, 2, y.shape, generator=draw).to(y.dtype) * 2 - 1
            total = total + (y * signs).sum() / max(1, y[0].numel()) ** 0.5
    return total
