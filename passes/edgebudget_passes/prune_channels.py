"""Remove channels until a bound on MACs or time holds, choosing widths by what they cost."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from edgebudget.program import Context, Note, Pass, PassResult, Program
from edgebudget.train import Caller, bytes_of_sample, load_tensors, outputs_over
from edgebudget_passes._allocate import step_of, widths_of
from edgebudget_passes._channel_groups import Grouping, find_groups
from edgebudget_passes._prune_search import Samples, Scored, Search, split
from edgebudget_passes._width_costs import WidthCost, width_macs, width_time
from edgebudget_runtime.errors import InfeasibleError, PassError, UsageError

if TYPE_CHECKING:
    from edgebudget.target import TargetSpec
    from edgebudget.workload import Dataset

_TRACE_SIDE = 256  # larger pictures are traced smaller where the network allows it
_LARGE_SAMPLE_MACS = 5e9
_LEAST_SAMPLES = 4


@dataclass(frozen=True, slots=True)
class Config:
    """`macs` is the bound, or `us`; 0 in `multiple` takes the target's own channel multiple.

    `us` bounds the time of all layers with weights as the target prices them (`layer_time`).
    `search_macs` bounds the work of measuring candidates, so that it does not depend on the clock.
    """

    macs: int = 0
    us: float | None = None
    multiple: int = 0
    candidates: int = 12
    samples: int = 512
    batch: int = 64
    search_macs: float = 5e12


def run(program: Program, config: Config, ctx: Context) -> PassResult:
    """Solve widths for the bound by several criteria; keep the candidate nearest to the original.

    Raises:
        UsageError: EB155, not one bound is given, or the target does not price layers.
        InfeasibleError: EB406, no allowed widths reach the bound.
        PassError: EB342, the built network does not count what was solved for.
    """
    _check(config, ctx.target)
    body, forward = program.body, Caller.of(program)
    whole = _count(program)
    already = PassResult(program, declined=(Note("model", "not pruned", "already in bound"),))
    if 0 < config.macs and whole <= config.macs:
        return already
    multiple = config.multiple or ctx.target.channel_multiple
    found, macs = study(program, whole)
    price, bound, unit = macs, config.macs, "MACs"
    if config.us:
        price, bound, unit = timed(program, found, ctx.target), round(config.us * 1e3), "ns"
        if price([g.size for g in found.groups]) <= bound:
            return already
    smallest = price([widths_of(g.size, multiple)[0] for g in found.groups])
    if smallest > bound:
        raise _unreachable(bound, smallest, unit, found)
    samples, notes = samples_for(program, config, ctx, whole)
    search = Search(
        body=body,
        forward=forward,
        groups=found.groups,
        macs=macs,
        price=price,
        bound=bound,
        multiple=multiple,
        kind=ctx.task.kind,
        samples=samples,
        batch=config.batch,
        rng=ctx.rng,
        emit=ctx.emit,
        budget_macs=config.search_macs,
        deadline=ctx.deadline,
    )
    scored = search.run(max(1, config.candidates))
    result = replace(program, body=scored[0].body.eval())
    _verify(program, result, scored[0].macs)
    declined = [Note(where, "not pruned", why) for where, why in found.declined]
    declined += [Note(where, "not used", why) for where, why in search.skipped]
    did = (*notes, *_rounding(found, multiple), *_account(found, scored))
    return PassResult(result, did, tuple(declined), "deadline" if search.ended_early else "")


def _check(config: Config, target: TargetSpec) -> None:
    bounds = (config.macs, config.us or 0.0)
    if min(bounds) < 0 or sum(b > 0 for b in bounds) != 1:
        raise UsageError(
            "EB155",
            f"macs = {config.macs}, us = {config.us}: not one positive bound",
            hint="give one of the two, > 0",
        )
    if config.us and target.layer_time is None:
        raise UsageError(
            "EB155", f"{target.name} does not price layers", hint="give macs, not us, as the bound"
        )


def reachable(program: Program, target: TargetSpec) -> tuple[float, ...]:
    """Smallest and largest MACs that pruning can leave, from shapes alone.

    Where the target prices layers, then the smallest and the largest microseconds of layers too.
    """
    whole = _count(program)
    found, macs = study(program, whole)
    narrow = [widths_of(g.size, target.channel_multiple)[0] for g in found.groups]
    if target.layer_time is None:
        return macs(narrow), whole
    price = timed(program, found, target)
    return macs(narrow), whole, price(narrow) / 1e3, price([g.size for g in found.groups]) / 1e3


def _count(program: Program) -> int:
    from edgebudget.counter import count

    return int(count(program).macs)


def study(program: Program, whole: int) -> tuple[Grouping, WidthCost]:
    """The groups that can shrink, and MACs as a function of their widths."""
    body, forward = program.body, Caller.of(program)
    inputs = _example(program)
    found = find_groups(body, forward, _shrunk(body, forward, inputs))
    return found, width_macs(body, forward, inputs, found.groups, whole)


def timed(program: Program, found: Grouping, target: TargetSpec) -> WidthCost:
    """Nanoseconds of the layers as a function of the groups' widths, as the target prices them."""
    assert target.layer_time is not None, "the caller checked"
    forward, inputs = Caller.of(program), _example(program)
    return width_time(program.body, forward, inputs, found.groups, target.layer_time)


def _example(program: Program) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(s.shape, generator=draw)
        if s.dtype.startswith("float")
        else torch.ones(s.shape, dtype=getattr(torch, s.dtype))
        for s in program.inputs
    )


def _shrunk(body: nn.Module, forward: Caller, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Smaller pictures to trace the structure on, if the network takes them."""
    small = tuple(
        x[..., : min(_TRACE_SIDE, x.shape[-2]), : min(_TRACE_SIDE, x.shape[-1])]
        if x.dim() == 4
        else x
        for x in inputs
    )
    if all(a.shape == b.shape for a, b in zip(small, inputs, strict=True)):
        return inputs
    try:
        with torch.no_grad():
            forward(body, small)
    except Exception:  # a network of fixed size says so in its own words
        return inputs
    return small


def samples_for(
    program: Program, config: Config, ctx: Context, whole: int
) -> tuple[Samples | None, list[Note]]:
    """What to rank and to judge candidates on, drawn from calibration (or training) data."""
    dataset = ctx.data.calibration
    if dataset is None:
        why = "no calibration data: channels ranked by weights, statistics not refreshed"
        return None, [Note("model", "one candidate only", why)]
    notes = []
    each = _macs_each(program, dataset, whole)
    train = ctx.data.train
    if each > _LARGE_SAMPLE_MACS and train is not None:
        smaller = _macs_each(program, train, whole)
        if smaller < each / 2:
            why = f"{smaller:.3g} MACs a sample against {each:.3g}"
            notes.append(Note("model", "candidates measured on training samples", why))
            dataset, each = train, smaller
    runs = 3 * max(1, config.candidates)
    count = int(0.4 * config.search_macs / (runs * each)) if each else config.samples
    count = min(len(dataset), config.samples, max(_LEAST_SAMPLES, count))
    # Drawn: a data set may be sorted by class, or repeat its classes at an even spacing.
    indices = [int(i) for i in np.random.default_rng(ctx.seed).permutation(len(dataset))[:count]]
    names = [s.name for s in program.inputs]
    fit, held = split(load_tensors(dataset, names, indices, emit=ctx.emit))
    if ctx.task.needs_reference:
        held = replace(held, labels=None)
    batch = max(1, min(config.batch, int(2e8 // max(1, bytes_of_sample(dataset)))))
    answers = outputs_over(Caller.of(ctx.original), ctx.original.body, held, batch)
    notes.append(Note("model", f"fit_samples={len(fit)} held_samples={len(held)}", dataset.name))
    return Samples(fit, held, answers, each), notes


def _macs_each(program: Program, dataset: Dataset, whole: int) -> float:
    """MACs of one sample of `dataset`, whose size may differ from the program's input."""
    spec = program.inputs[0]
    value = dataset.sample(0).inputs.get(spec.name)
    size = math.prod(value.shape) if value is not None else math.prod(spec.shape[1:])
    return whole * size / max(1, math.prod(spec.shape))


def _verify(before: Program, after: Program, solved: int) -> None:
    counted = _count(after)
    if counted != solved:
        raise PassError(
            "EB342",
            f"the pruned network counts {counted} MACs where {solved} were solved for",
            hint="report this model: a layer's work does not follow its channels",
        )
    inputs = _example(before)
    with torch.no_grad():
        old = _shrunk(before.body, Caller.of(before), inputs)
        was, now = (Caller.of(p)(p.body, old) for p in (before, after))
    if [x.shape for x in was] != [x.shape for x in now]:
        raise PassError("EB343", "the pruned network's outputs changed shape", hint="report it")


def _unreachable(bound: int, smallest: int, unit: str, found: Grouping) -> InfeasibleError:
    why = f"; {len(found.declined)} groups cannot shrink" if found.declined else ""
    return InfeasibleError(
        "EB406",
        f"pruning reaches {smallest} {unit} at the least, {bound} needed{why}",
        hint=f"ask for at least {smallest} {unit}, or combine with a smaller input",
    )


def _rounding(found: Grouping, multiple: int) -> list[Note]:
    finer = {g.size: step_of(g.size, multiple) for g in found.groups}
    small = {size: step for size, step in sorted(finer.items()) if step != multiple}
    if not small:
        return []
    steps = ", ".join(f"{size} by {step}" for size, step in small.items())
    why = f"rounded to {multiple} they would have fewer than four widths to choose from"
    return [Note("small groups", f"groups of {steps}", why)]


def _account(found: Grouping, scored: list[Scored]) -> list[Note]:
    notes = []
    for rank, s in enumerate(scored):
        agree = "" if s.agreement is None else f" agreement={s.agreement:.4f}"
        loss = "" if math.isnan(s.loss) else f" loss={s.loss:.6f}"
        what = f"candidate={s.name} macs={s.macs}{loss}{agree} kept={int(rank == 0)}"
        notes.append(Note("candidates", what, "lowest held-back loss" if rank == 0 else ""))
    best = scored[0]
    for group, width in zip(found.groups, best.widths, strict=True):
        if width < group.size:
            notes.append(Note(group.name, f"channels={group.size} kept={width}", best.name))
    return notes


PASS = Pass(
    name="prune_channels",
    run=run,
    config=Config,
    stage="module",
    summary="remove channels until a bound on MACs or time holds; the best of several candidates",
    reach=reachable,
)
