"""Build several pruned networks at one bound, and keep the one nearest to the original."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from edgebudget.batchnorm import refresh
from edgebudget.distill import Distillation, spread
from edgebudget.events import Advanced, Emit, Finished, Started
from edgebudget.train import Caller, TensorData, outputs_over
from edgebudget.workload import TaskKind
from edgebudget_passes import _importance as importance
from edgebudget_passes._allocate import Ladder, monotone, solve, widths_of
from edgebudget_passes._channel_groups import ChannelGroup, removal
from edgebudget_passes._importance import Ranking
from edgebudget_passes._layer_moments import Moments, measurable, measure, repair
from edgebudget_passes._slicing import remove_channels
from edgebudget_passes._width_costs import WidthCost

_SPREAD = 0.35  # of the random factors on the costs of a group
_SENSITIVITY_WIDTHS = (0.75, 0.5, 0.25)
_LEAST_SENSITIVITY_SAMPLES = 32
_LARGEST_GRADIENT_MACS = 2e10  # a backward pass through more does not fit a small machine


@dataclass(frozen=True, slots=True)
class Scored:
    """A pruned network, its widths, and its loss against the original on held-back samples."""

    name: str
    widths: tuple[int, ...]
    macs: int
    loss: float
    agreement: float | None  # share of samples with the original's class
    body: nn.Module


@dataclass(frozen=True, slots=True)
class Samples:
    """What rankings and statistics see, what candidates are scored on, and the answers there."""

    fit: TensorData
    held: TensorData
    answers: tuple[Tensor, ...]
    macs_each: float  # of the whole network on one of these samples


@dataclass(slots=True)
class Search:
    """Everything that candidates of one network share."""

    body: nn.Module
    forward: Caller
    groups: tuple[ChannelGroup, ...]
    macs: WidthCost
    price: WidthCost  # what `bound` bounds: the same, or time
    bound: int
    multiple: int
    kind: TaskKind
    samples: Samples | None
    batch: int
    rng: np.random.Generator
    emit: Emit
    budget_macs: float
    deadline: float | None
    moments: Mapping[str, Moments] = field(default_factory=dict)
    orders: dict[str, list[Ranking]] = field(default_factory=dict)
    costs: dict[str, list[Ladder]] = field(default_factory=dict)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    ended_early: bool = False

    def run(self, candidates: int) -> list[Scored]:
        """All candidates that were built, best first; at least one."""
        self.rank()
        self.emit(Started("prune candidates", candidates))
        found: list[Scored] = []
        best_costs = self.costs["mixed"]
        for number in range(candidates):
            names = list(self.costs)
            if number < len(names):
                name, ladders = names[number], self.costs[names[number]]
            else:
                name, ladders = f"random-{number - len(names) + 1}", self._shaken(best_costs)
            widths = solve(ladders, self.price, self.bound)
            assert widths is not None, "the caller checked that the bound is reachable"
            if any(s.widths == widths for s in found):
                self.emit(Advanced("prune candidates", 1, f"{name}: same widths as before"))
                continue
            scored = self.build(name, widths)
            if not found or scored.loss < min(s.loss for s in found):
                best_costs = ladders
            found.append(scored)
            self.emit(Advanced("prune candidates", 1, f"{name}: loss {scored.loss:.4f}"))
            if self.samples is None:
                break
            if self._late() and number + 1 < candidates:
                self.ended_early = True
                break
        self.emit(Finished("prune candidates"))
        return sorted(found, key=lambda s: s.loss)

    def build(self, name: str, widths: Sequence[int]) -> Scored:
        """Cut, repair, refresh and score one choice of widths."""
        body = self._cut(widths)
        macs = self.macs(widths)
        if self.samples is None:
            return Scored(name, tuple(widths), macs, math.nan, None, body)
        fit = self.samples.fit
        refresh(body, (c.inputs for c in fit.batches(self.batch)), lambda x: self.forward(body, x))
        answers = outputs_over(self.forward, body, self.samples.held, self.batch)
        loss = self._loss(answers)
        agreement = None
        if self.kind == "classification":
            same = answers[0].argmax(-1) == self.samples.answers[0].argmax(-1)
            agreement = float(same.float().mean())
        return Scored(name, tuple(widths), macs, loss, agreement, body)

    def _cut(self, widths: Sequence[int]) -> nn.Module:
        order = next(iter(self.orders.values()))
        keep = [r.kept(w) for r, w in zip(order, widths, strict=True)]
        gone = removal(self.groups, keep)
        body = remove_channels(self.body, gone)
        repair(self.body, body, gone, self.moments)
        return body

    def _loss(self, answers: tuple[Tensor, ...]) -> float:
        assert self.samples is not None
        loss = self._judge().loss(answers, self.samples.answers, self.samples.held.labels)
        value = float(loss)
        return value if math.isfinite(value) else math.inf

    def _late(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline

    def _ladders(self, cost: Callable[[int, int], float]) -> list[Ladder]:
        ladders = []
        for g, group in enumerate(self.groups):
            widths = widths_of(group.size, self.multiple)
            ladders.append(Ladder(widths, monotone([cost(g, w) for w in widths])))
        return ladders

    def rank(self) -> None:
        """Fill `orders` (the first is the one used to cut) and `costs` (each gives widths)."""
        self.emit(Started("rank channels"))
        magnitude = importance.by_magnitude(self.body, self.groups)
        if self.samples is not None:
            self._rank_on_data()
        self.orders["magnitude"] = magnitude
        scales = importance.by_norm_scale(self.body, self.groups)
        if scales is not None:
            self.orders["norm-scale"] = scales
        uniform = self._ladders(
            lambda g, w: self.price.share(g) * (1 - w / self.groups[g].size) ** 2
        )
        by_order = {
            name: self._ladders(partial(_cost, order)) for name, order in self.orders.items()
        }
        measured = self._sensitivity()
        if measured is not None:
            by_order["sensitivity"] = measured
        self.costs = {"mixed": _mixed([uniform, *by_order.values()]), **by_order}
        self.costs["uniform"] = uniform
        self.emit(Finished("rank channels"))

    def _rank_on_data(self) -> None:
        assert self.samples is not None
        fit = self.samples.fit
        readers = sorted({m.layer for g in self.groups for m in g.consumers})
        self.moments = measure(self.body, self.forward, fit, self.batch, readers, seed=0)
        for name in readers:
            if not measurable(self.body.get_submodule(name)):
                self.skipped.append((name, "too wide or not a plain layer: weights not refitted"))
        rebuilt = importance.by_reconstruction(self.body, self.groups, self.moments)
        if rebuilt is not None:
            self.orders["reconstruction"] = rebuilt
        if self.samples.macs_each > _LARGEST_GRADIENT_MACS:
            self.skipped.append(("fisher", f"{self.samples.macs_each:.3g} MACs a sample"))
            return
        count = min(len(fit), max(8, int(0.1 * self.budget_macs / (3 * self.samples.macs_each))))
        self.orders["fisher"] = importance.by_fisher(
            self.body,
            self.forward,
            self.groups,
            fit.part(0, count),
            self.kind,
            min(self.batch, 64),
            seed=0,
        )

    def _sensitivity(self) -> list[Ladder] | None:
        """Loss added when one group alone shrinks, at a few widths, interpolated between.

        Source: sensitivity maps as in FastNAS (Model Optimizer); normalisation uses each batch's
        own statistics, which stands in for a refresh at half its price.
        """
        if self.samples is None:
            return None
        runs = len(self.groups) * len(_SENSITIVITY_WIDTHS)
        count = int(0.5 * self.budget_macs / (runs * self.samples.macs_each))
        count = min(256, len(self.samples.held), count)
        if count < _LEAST_SENSITIVITY_SAMPLES or self._late():
            self.skipped.append(("sensitivity", "too costly to measure on enough samples"))
            return None
        data, full = self.samples.held.part(0, count), [g.size for g in self.groups]
        self.emit(Started("measure sensitivity", len(self.groups)))
        base = self._batch_loss(copy.deepcopy(self.body), data)
        tables: list[dict[int, float]] = []
        for g, group in enumerate(self.groups):
            widths = widths_of(group.size, self.multiple)
            points = {group.size: 0.0}
            for share in _SENSITIVITY_WIDTHS:
                near = min(widths[:-1], key=lambda w: abs(w - share * group.size), default=None)
                if near is not None and near not in points:
                    trial = [*full[:g], near, *full[g + 1 :]]
                    points[near] = max(0.0, self._batch_loss(self._cut(trial), data) - base)
            tables.append(points)
            self.emit(Advanced("measure sensitivity"))
        self.emit(Finished("measure sensitivity"))
        return self._ladders(lambda g, w: _interpolated(tables[g], w))

    def _batch_loss(self, body: nn.Module, data: TensorData) -> float:
        """Loss against the original; `body` is used up."""
        assert self.samples is not None
        # Torch is far faster at the statistics of pictures with their channels last.
        body.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        norms = [m for m in body.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        for m in norms:
            m.training, m.momentum = True, 0.0
        answers = outputs_over(self.forward, body, data, self.batch)
        teacher = tuple(y[: len(data)] for y in self.samples.answers)
        # Against the original's answers only: labels add noise to small differences.
        return float(self._judge().loss(answers, teacher, None))

    def _judge(self) -> Distillation:
        assert self.samples is not None
        return Distillation(self.kind, scale=spread(self.samples.answers, self.samples.held.labels))

    def _shaken(self, ladders: Sequence[Ladder]) -> list[Ladder]:
        factors = np.exp(_SPREAD * self.rng.standard_normal(len(ladders)))
        return [
            Ladder(x.widths, tuple(c * float(f) for c in x.costs))
            for x, f in zip(ladders, factors, strict=True)
        ]


def _cost(order: Sequence[Ranking], group: int, width: int) -> float:
    return order[group].cost(width)


def _mixed(tables: Sequence[Sequence[Ladder]]) -> list[Ladder]:
    """The sum of several cost tables, each scaled so that all its groups together weigh one."""
    scales = [1.0 / max(1e-30, sum(sum(x.costs) for x in t)) for t in tables]
    mixed = []
    for rows in zip(*tables, strict=True):
        parts = [[s * c for c in x.costs] for s, x in zip(scales, rows, strict=True)]
        mixed.append(Ladder(rows[0].widths, tuple(sum(c) for c in zip(*parts, strict=True))))
    return mixed


def _interpolated(points: Mapping[int, float], width: int) -> float:
    known = sorted(points)
    values = monotone([points[w] for w in known])
    if width < known[0]:  # below what was measured: keep growing as the channels run out
        return values[0] * known[0] / max(1, width)
    return float(np.interp(width, known, values))


def split(data: TensorData) -> tuple[TensorData, TensorData]:
    """Samples to fit on and samples held back: every other one."""
    if len(data) < 2:
        return data, data
    number = torch.arange(len(data))
    return data.take(number[::2]), data.take(number[1::2])
