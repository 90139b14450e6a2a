"""Nested widths: narrower variants whose channels are the most important ones of wider variants.

Channels are ranked once for each group that must shrink together; every width takes the first of
that ranking, and the widths of all groups are solved for a number of MACs, each within those of
the next wider variant.
Source: "Universally Slimmable Networks and Improved Training Techniques", Yu and Huang, 2019;
channels sorted by importance as in "Once-for-All", Cai et al., 2019.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from edgebudget.events import Advanced, Finished, Started
from edgebudget.program import Context, Note, Pass, PassResult, Program
from edgebudget_passes import prune_channels
from edgebudget_passes._allocate import Ladder, Price, solve, widths_of
from edgebudget_passes._channel_groups import ChannelGroup, removal
from edgebudget_passes._nested_edits import CutChannels
from edgebudget_passes._nested_variants import (
    FinalOutputs,
    Level,
    base_of,
    check_shares,
    combined,
    count,
)
from edgebudget_passes._prune_search import Search
from edgebudget_runtime.errors import UsageError

if TYPE_CHECKING:
    from edgebudget.target import TargetSpec


@dataclass(frozen=True, slots=True)
class Config:
    """`shares` of the whole's MACs, or `macs` themselves, one variant for each.

    0 in `multiple` takes the target's channel multiple. `combine` False adds variants of the
    whole only, and none of the variants that other passes made.
    """

    shares: tuple[float, ...] = (0.75, 0.5, 0.25)
    macs: tuple[int, ...] = ()
    multiple: int = 0
    combine: bool = True
    candidates: int = 6
    samples: int = 512
    batch: int = 64
    search_macs: float = 5e12


@dataclass(frozen=True, slots=True)
class _Family:
    """One ranking and one choice of widths for every bound, widest first."""

    name: str
    order: str
    widths: tuple[tuple[int, ...], ...]
    loss: float


def run(program: Program, config: Config, ctx: Context) -> PassResult:
    """Add nested widths, chosen among several rankings by loss on held-back samples.

    Raises:
        UsageError: EB155, a share or a bound makes no sense.
        PassError: EB360, a variant does not count what was solved for.
    """
    check_shares("slim_width", config.shares)
    if any(m <= 0 for m in config.macs):
        raise UsageError("EB155", f"slim_width: macs = {config.macs}", hint="give bounds > 0")
    base = base_of(program)
    whole = count(base)
    found, macs = prune_channels.study(base, whole)
    if not found.groups:
        why = "; ".join(f"{n}: {w}" for n, w in found.declined[:3]) or "no layer has channels"
        return PassResult(program, declined=(Note("model", "no widths", why),))
    multiple = config.multiple or ctx.target.channel_multiple
    bounds, declined = _bounds(config, whole, macs(_least(found.groups, multiple)))
    declined += [Note(where, "not slimmed", why) for where, why in found.declined]
    if not bounds:
        return PassResult(program, declined=tuple(declined))
    settings = prune_channels.Config(
        macs=bounds[-1],
        candidates=config.candidates * len(bounds),
        samples=config.samples,
        batch=config.batch,
        search_macs=config.search_macs,
    )
    samples, did = prune_channels.samples_for(base, settings, ctx, whole)
    search = Search(
        body=base.body,
        forward=FinalOutputs.of_teacher(base, ctx),
        groups=found.groups,
        macs=macs,
        price=macs,
        bound=bounds[-1],
        multiple=multiple,
        kind=ctx.task.kind,
        samples=samples,
        batch=config.batch,
        rng=ctx.rng,
        emit=ctx.emit,
        budget_macs=config.search_macs,
        deadline=ctx.deadline,
    )
    best, notes = _choose(search, bounds, config.candidates)
    levels, merged = _levels(best, search, whole)
    result = combined(
        program,
        ctx,
        "width",
        "1",
        levels,
        combine=config.combine,
        refresh_samples=config.samples,
        batch=config.batch,
    )
    declined += merged
    did += notes
    return PassResult(result.program, (*did, *result.did), (*declined, *result.declined))


def _least(groups: Sequence[ChannelGroup], multiple: int) -> list[int]:
    return [widths_of(g.size, multiple)[0] for g in groups]


def _bounds(config: Config, whole: int, smallest: int) -> tuple[list[int], list[Note]]:
    """Bounds that can be reached, largest first."""
    asked = config.macs or tuple(int(s * whole) for s in config.shares)
    declined = []
    bounds = []
    for bound in sorted(set(asked), reverse=True):
        if bound >= whole:
            declined.append(Note(f"{bound} MACs", "no variant", f"the whole has {whole}"))
        elif bound < smallest:
            why = f"widths reach {smallest} MACs at the least"
            declined.append(Note(f"{bound} MACs", "no variant", why))
        else:
            bounds.append(bound)
    return bounds, declined


def _choose(search: Search, bounds: Sequence[int], candidates: int) -> tuple[_Family, list[Note]]:
    """Every ranking with the mixed costs, then the best of them with each kind of costs."""
    search.rank()
    search.moments = {}  # shared weights cannot be refitted for one variant
    orders = dict(search.orders)
    tried: list[_Family] = []
    search.emit(Started("try nested widths", candidates))

    def best() -> _Family:
        return min(tried, key=lambda f: f.loss)

    def attempt(order: str, costs: str) -> None:
        search.orders = {order: orders[order]}
        widths = _solved(search.costs[costs], search.macs, bounds)
        if not any(f.order == order and f.widths == widths for f in tried):
            name = f"order={order} costs={costs}"
            scores = [search.build(name, w).loss for w in widths] if search.samples else [math.nan]
            tried.append(_Family(name, order, widths, fmean(scores)))
        search.emit(Advanced("try nested widths"))

    for order in list(orders)[:candidates]:
        attempt(order, "mixed")
        if search.samples is None:
            break
    others = [c for c in search.costs if c != "mixed"] if search.samples else []
    for costs in others[: max(0, candidates - len(orders))]:
        attempt(best().order, costs)
    search.emit(Finished("try nested widths"))
    search.orders = orders
    notes = [
        Note("widths", f"{f.name} mean_loss={f.loss:.6f} kept={int(f is best())}")
        for f in (tried if search.samples else [])
    ]
    return best(), notes


def _solved(
    ladders: Sequence[Ladder], macs: Price, bounds: Sequence[int]
) -> tuple[tuple[int, ...], ...]:
    """Widths for each bound, none wider than for the bound before."""
    found = []
    for bound in bounds:
        widths = solve(ladders, macs, bound)
        assert widths is not None, "the caller checked that the bound is reachable"
        found.append(widths)
        ladders = [_up_to(x, w) for x, w in zip(ladders, widths, strict=True)]
    return tuple(found)


def _up_to(ladder: Ladder, width: int) -> Ladder:
    rows = [(w, c) for w, c in zip(ladder.widths, ladder.costs, strict=True) if w <= width]
    return Ladder(tuple(w for w, _ in rows), tuple(c for _, c in rows))


def _levels(best: _Family, search: Search, whole: int) -> tuple[list[Level], list[Note]]:
    """One level for each choice of widths; those that rounding made alike are one."""
    ranking = search.orders[best.order]
    levels: list[Level] = []
    merged: list[Note] = []
    last: tuple[int, ...] = tuple(g.size for g in search.groups)
    label = "1"
    for widths in best.widths:
        if widths == last:
            why = f"rounded, its channels are those of width={label}"
            merged.append(Note(f"width after {label}", "merged", why))
            continue
        macs = search.macs(widths)
        label, last = f"{macs / whole:.3g}", widths
        keep = [r.kept(w) for r, w in zip(ranking, widths, strict=True)]
        levels.append(Level(label, CutChannels(removal(search.groups, keep)), macs))
    return levels, merged


def reachable(program: Program, target: TargetSpec) -> tuple[float, ...]:
    """Smallest and largest MACs of a width."""
    return prune_channels.reachable(base_of(program), target)[:2]


PASS = Pass(
    name="slim_width",
    run=run,
    config=Config,
    stage="module",
    summary="add narrower variants that share the whole's weights",
    reach=reachable,
)
