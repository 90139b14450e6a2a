"""Nested depths: variants without some residual blocks, the least important ones first.

Blocks are left out one after the other. How much each would change the original's answers on
calibration samples is measured again at every step, for the few that look cheapest: first by how
little a block turns its input ("Compact Language Models via Pruning and Knowledge Distillation",
2024: 1 - cosine), then by what was last measured, each divided by the work it saves.

For stacks of equal layers the balanced choice needs no data: the first and the last layer and
evenly spaced ones between ("Accelerating Inference in Large Language Models with a Unified Layer
Skipping Strategy", 2024).
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgebudget.events import Advanced, Finished, Started
from edgebudget.program import Context, Note, Pass, PassResult, Program
from edgebudget.train import Caller
from edgebudget_passes._blocks import Block, Blocks, find_blocks
from edgebudget_passes._nested_edits import left_out, skips_of, swap
from edgebudget_passes._nested_variants import (
    Judged,
    Level,
    base_of,
    batch_for,
    batch_statistics,
    check_shares,
    combined,
    drawn,
    judged,
)
from edgebudget_runtime.errors import UsageError

if TYPE_CHECKING:
    from edgebudget.target import TargetSpec

_POOL = 16  # blocks in play at once
_REMEASURED = 4  # of them, at every step
_LEAST_GAIN = 1e-9
_LEAST_LAYERS = 3


@dataclass(frozen=True, slots=True)
class Config:
    """`shares` of the whole's MACs to come down to by measured importance; `speedups` of a stack
    of equal layers, balanced. Without calibration data shares become speed-ups.

    `combine` False adds variants of the whole only, and none of the variants other passes made.
    """

    shares: tuple[float, ...] = (0.75, 0.5)
    speedups: tuple[float, ...] = ()
    combine: bool = True
    samples: int = 256
    batch: int = 64
    search_macs: float = 5e12


def run(program: Program, config: Config, ctx: Context) -> PassResult:
    """Add variants with fewer blocks, or decline where no block can be left out.

    Raises:
        UsageError: EB155, a share or a speed-up makes no sense.
        PassError: EB360, a variant does not count what was solved for.
    """
    check_shares("skip_layers", config.shares)
    if any(s <= 1.0 for s in config.speedups):
        raise UsageError("EB155", f"skip_layers: speedups = {config.speedups}", hint="above 1")
    base = base_of(program)
    blocks = find_blocks(base)
    declined = [Note(where, "not left out", why) for where, why in blocks.declined]
    if not blocks.found:
        why = "no addition of two tensors of one origin and one shape around any layer"
        return PassResult(program, declined=(*declined, Note("model", "no depths", why)))
    did: list[Note] = []
    choices: list[tuple[Block, ...]] = []
    speedups = config.speedups
    order = _ordering(base, blocks, config, ctx)
    if order is not None:
        chosen, notes, refused = order.choose(config.shares)
        choices += chosen
        did += notes
        declined += refused
    elif not speedups:
        speedups = tuple(1.0 / s for s in config.shares)
        why = "no calibration data to measure blocks on"
        did.append(Note("blocks", "chosen evenly spaced", why))
    balanced, refused = _balanced(blocks, speedups)
    choices += balanced
    declined += refused
    levels, merged = _levels(blocks, choices)
    if not levels:
        return PassResult(program, declined=(*declined, *merged))
    result = combined(
        program,
        ctx,
        "depth",
        f"{len(blocks.found)} of {len(blocks.found)}",
        levels,
        combine=config.combine,
        refresh_samples=config.samples,
        batch=config.batch,
    )
    return PassResult(result.program, (*did, *result.did), (*declined, *merged, *result.declined))


def _levels(blocks: Blocks, choices: Sequence[tuple[Block, ...]]) -> tuple[list[Level], list[Note]]:
    levels: list[Level] = []
    merged: list[Note] = []
    seen: set[frozenset[str]] = set()
    labels: Counter[str] = Counter()
    for choice in sorted(choices, key=lambda c: -blocks.macs(c)):
        names = frozenset(b.name for b in choice)
        label = f"{len(blocks.found) - len(names)} of {len(blocks.found)}"
        if names in seen:
            merged.append(Note(f"depth={label}", "merged", "its blocks are those of another"))
            continue
        seen.add(names)
        labels[label] += 1
        if labels[label] > 1:  # as many blocks, but others
            label = f"{label} ({chr(ord('a') + labels[label] - 1)})"
        levels.append(Level(label, skips_of([b.skip for b in choice]), blocks.macs(choice)))
    return levels, merged


def _ordering(base: Program, blocks: Blocks, config: Config, ctx: Context) -> _Ordering | None:
    """The measured ordering, or None where there is nothing to measure on."""
    dataset = ctx.data.calibration
    runs = _POOL + (_REMEASURED + 1) * len(blocks.found)
    indices = drawn(ctx, runs, blocks.whole, config.samples, config.search_macs)
    if dataset is None or not indices or not config.shares:
        return None
    batch = batch_for(dataset, config.batch)
    judge = judged(base, ctx, dataset, indices, batch)
    return _Ordering(base, copy.deepcopy(base.body).eval(), blocks, judge, ctx)


@dataclass(slots=True)
class _Ordering:
    """Leaves out blocks greedily on a copy of the network."""

    base: Program
    body: nn.Module
    blocks: Blocks
    judge: Judged
    ctx: Context
    gone: list[Block] = field(default_factory=list)
    prices: dict[str, float] = field(default_factory=dict)

    def choose(
        self, shares: Sequence[float]
    ) -> tuple[list[tuple[Block, ...]], list[Note], list[Note]]:
        """Blocks to leave out for every share, each set within the next; what was seen."""
        waiting = self._by_prior()
        pool: list[Block] = []
        bounds = sorted((int(s * self.blocks.whole) for s in shares), reverse=True)
        chosen: list[tuple[Block, ...]] = []
        notes: list[Note] = []
        loss = self._loss(())
        self.ctx.emit(Started("leave out blocks", len(waiting)))
        while len(chosen) < len(bounds) and (pool or waiting):
            while waiting and len(pool) < _POOL:
                pool.append(waiting.pop(0))
            taken, loss = self._cheapest(pool, loss)
            pool.remove(taken)
            self.gone.append(taken)
            macs = self.blocks.macs(self.gone)
            notes.append(
                Note(taken.name, f"left out {len(self.gone)}. macs={macs} loss={loss:.6f}")
            )
            while len(chosen) < len(bounds) and macs <= bounds[len(chosen)]:
                chosen.append(tuple(self.gone))
            self.ctx.emit(Advanced("leave out blocks", 1, taken.name))
        self.ctx.emit(Finished("leave out blocks"))
        least = f"without any block {self.blocks.macs(self.gone)} MACs are left"
        refused = [Note(f"{b} MACs", "no variant", least) for b in bounds[len(chosen) :]]
        return chosen, notes, refused

    def _cheapest(self, pool: Sequence[Block], loss: float) -> tuple[Block, float]:
        """The block that costs least for what it saves now, and the loss without it."""
        known = sorted(pool, key=lambda b: self.prices.get(b.name, -1.0))
        fresh = [b for b in known if b.name not in self.prices]
        remeasured = [b for b in known if b.name in self.prices][:_REMEASURED]
        losses: dict[str, float] = {}
        before = self.blocks.macs(self.gone)
        for block in [*fresh, *remeasured]:
            saved = max(1, before - self.blocks.macs([*self.gone, block]))
            losses[block.name] = self._loss([*self.gone, block])
            self.prices[block.name] = max(_LEAST_GAIN, losses[block.name] - loss) / saved
        best = min((b for b in pool if b.name in losses), key=lambda b: self.prices[b.name])
        return best, losses[best.name]

    def _loss(self, gone: Sequence[Block]) -> float:
        with _without(self.body, gone), batch_statistics(self.body):
            return self.judge.of(Caller.of(self.base), self.body)

    def _by_prior(self) -> list[Block]:
        """Blocks that turn their input least come first; those without one input before them."""
        turns: dict[str, float] = {}

        def note(name: str, given: object, made: object) -> None:
            x, y = given, made[0] if isinstance(made, tuple) else made
            if isinstance(x, Tensor) and isinstance(y, Tensor):
                likeness = F.cosine_similarity(x.flatten(1), y.flatten(1)).mean()
                turns[name] = 1.0 - float(likeness)

        hooks = [
            self.body.get_submodule(b.name).register_forward_hook(
                lambda m, args, named, y, n=b.name: note(n, (*args, *named.values())[0], y),
                with_kwargs=True,
            )
            for b in self.blocks.found
            if b.skip.keeps_input
        ]
        try:
            with torch.no_grad():
                Caller.of(self.base)(self.body, self.judge.data.part(0, self.judge.batch).inputs)
        finally:
            for hook in hooks:
                hook.remove()
        return sorted(self.blocks.found, key=lambda b: turns.get(b.name, -1.0) / max(1, b.macs))


@contextmanager
def _without(body: nn.Module, blocks: Sequence[Block]) -> Iterator[None]:
    """The body with these blocks left out, for a while."""
    was = [(b.name, swap(body, b.name, left_out(b.skip))) for b in _outermost(blocks)]
    try:
        yield
    finally:
        for name, module in was:
            swap(body, name, module)


def _outermost(blocks: Sequence[Block]) -> list[Block]:
    names = [f"{b.name}." for b in blocks]
    return [b for b in blocks if not any(b.name.startswith(n) for n in names)]


def _balanced(
    blocks: Blocks, speedups: Sequence[float]
) -> tuple[list[tuple[Block, ...]], list[Note]]:
    """Blocks to leave out of the largest stack of equal layers."""
    stacks: dict[str, list[Block]] = {}
    for block in blocks.found:
        if block.family:
            stacks.setdefault(block.family, []).append(block)
    stack = max(stacks.values(), key=len, default=[])
    chosen, refused = [], []
    for speedup in speedups:
        keep = balanced(len(stack), speedup)
        if keep is None:
            why = f"{len(stack)} equal layers / {speedup:.3g} is below {_LEAST_LAYERS}"
            refused.append(Note(f"{speedup:.3g} times faster", "no variant", why))
        else:
            chosen.append(tuple(b for i, b in enumerate(stack) if i not in keep))
    return chosen, refused


def balanced(layers: int, speedup: float) -> tuple[int, ...] | None:
    """Layers to keep for a speed-up: the ends, and evenly spaced ones; None for fewer than 3."""
    kept = int(layers / speedup)
    if kept < _LEAST_LAYERS:
        return None
    interval = layers // (kept - 1)
    inner = [i for i in range(1, layers - 1) if i % interval == 0][: kept - 2]
    return (0, *inner, layers - 1)


def reachable(program: Program, target: TargetSpec) -> tuple[float, ...]:
    """MACs without any block, and of the whole."""
    blocks = find_blocks(base_of(program))
    return blocks.macs(blocks.found), blocks.whole


PASS = Pass(
    name="skip_layers",
    run=run,
    config=Config,
    stage="module",
    summary="add shallower variants that share the whole's weights",
    reach=reachable,
)
