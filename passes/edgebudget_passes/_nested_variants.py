"""What the passes that add variants share: combining dimensions, counting, judging."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from edgebudget import graph
from edgebudget.distill import Distillation, EveryExit, Loss, spread
from edgebudget.events import Advanced, Finished, Started
from edgebudget.export import run_module
from edgebudget.nested import Edit, Nested, Variant
from edgebudget.program import Context, Note, PassResult, Program
from edgebudget.scaled_input import output_shapes
from edgebudget.train import Caller, TensorData, bytes_of_sample, load_tensors, outputs_over
from edgebudget_runtime.errors import EdgeBudgetError, PassError, UsageError

if TYPE_CHECKING:
    from edgebudget.workload import Dataset

_BATCH_BYTES = 2e8
_LEAST_SAMPLES = 8


@dataclass(frozen=True, slots=True)
class Level:
    """One value of a dimension below the whole: what it is called, the edit that makes it.

    `macs` is what the edit alone must leave of the whole, where that was solved for.
    """

    label: str
    edit: Edit
    macs: int = 0


@dataclass(frozen=True, slots=True)
class Judged:
    """Samples in memory, the original's answers to them, and the loss against those."""

    data: TensorData
    answers: tuple[Tensor, ...]
    loss: Loss
    batch: int

    def of(self, forward: Caller, body: nn.Module) -> float:
        """Loss of a network against the original; infinite where it is not finite."""
        got = outputs_over(forward, body, self.data, self.batch)
        value = float(self.loss.loss(got, self.answers, None))
        return value if math.isfinite(value) else math.inf


class FinalOutputs(Caller):
    """Calls a module and returns its last outputs only: those that the original has too."""

    __slots__ = ()

    @staticmethod
    def of_teacher(program: Program, ctx: Context) -> FinalOutputs:
        """For a program that may have early exits, which come before."""
        return FinalOutputs(tuple(s.name for s in program.inputs), ctx.original.outputs)

    def __call__(self, body: nn.Module, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The outputs in name order."""
        return Caller.__call__(self, body, tensors)[-len(self.outputs) :]


def base_of(program: Program) -> Program:
    """The program of the whole network alone."""
    body = program.body
    return replace(program, body=body.base) if isinstance(body, Nested) else program


def count(program: Program) -> int:
    """Multiply-accumulates of one inference."""
    from edgebudget import counter

    return int(counter.count(program).macs)


def shapes_of(program: Program, again: Callable[[], object] = lambda: None) -> list[Any]:
    """Shapes of a program's outputs, on shapes alone where its code allows, else by running it.

    `again` is called before it is run a second time.
    """
    try:
        return list(output_shapes(program))
    except Exception:  # code that looks at values, as some masks do
        again()
        values = run_module(program, graph.probe(program.inputs))
        return [values[name].shape for name in program.outputs]


def over_exits(one: Distillation, program: Program, ctx: Context) -> Loss:
    """Early exits, which the original lacks, are held to its answer too."""
    exits = len(program.outputs)
    return one if exits == len(ctx.original.outputs) else EveryExit(one, (1.0,) * exits)


def judged(
    program: Program, ctx: Context, dataset: Dataset, indices: Sequence[int], batch: int
) -> Judged:
    """Read samples, and ask the original about them."""
    data = load_tensors(dataset, [s.name for s in program.inputs], indices, emit=ctx.emit)
    answers = outputs_over(Caller.of(ctx.original), ctx.original.body, data, batch)
    loss = over_exits(Distillation(ctx.task.kind, scale=spread(answers, None)), program, ctx)
    return Judged(data, answers, loss, batch)


def drawn(ctx: Context, runs: float, whole: int, samples: int, budget_macs: float) -> list[int]:
    """Calibration samples such that `runs` passes over them stay below `budget_macs`."""
    dataset = ctx.data.calibration
    if dataset is None or not len(dataset):
        return []
    count = int(budget_macs / max(1.0, runs * whole))
    count = min(len(dataset), samples, max(_LEAST_SAMPLES, count))
    return [int(i) for i in np.random.default_rng(ctx.seed).permutation(len(dataset))[:count]]


def batch_for(dataset: Dataset, batch: int) -> int:
    """`batch`, or less where samples are large."""
    return max(1, min(batch, int(_BATCH_BYTES // max(1, bytes_of_sample(dataset)))))


def check_shares(name: str, shares: Sequence[float]) -> None:
    """Raises: UsageError EB155, a share is not between 0 and 1."""
    for share in shares:
        if not 0.0 < share < 1.0:
            raise UsageError(
                "EB155", f"{name}: {share} is no share of the whole", hint="between 0 and 1"
            )


def combined(
    program: Program,
    ctx: Context,
    dimension: str,
    whole: str,
    levels: Sequence[Level],
    *,
    combine: bool,
    refresh_samples: int,
    batch: int,
) -> PassResult:
    """Add every level to the whole and, if `combine`, to every variant that is there already.

    `whole` is what the dimension is called in variants that it leaves alone. Each new variant is
    counted, and its normalisation statistics are re-estimated on calibration samples.

    Raises:
        PassError: EB360, a variant counts something else than was solved for.
    """
    names = [s.name for s in program.inputs]
    old = program.body
    if not isinstance(old, Nested):
        old = Nested(old, names, [Variant({}, macs=count(program))])
    starts = old.variants if combine else old.variants[:1]
    kept = [replace(v, choices={**v.choices, dimension: whole}) for v in old.variants]
    found, did, declined = [], [], []
    ctx.emit(Started("count variants", len(starts) * len(levels)))
    for start in starts:
        for level in levels:
            choices = {**start.choices, dimension: level.label}
            variant = Variant(choices, (*start.edits, level.edit))
            try:
                found.append(_counted(program, old, variant, level, not start.edits))
            except EdgeBudgetError as e:
                if e.code == "EB360":
                    raise
                declined.append(Note(variant.name, "not made", e.what))
            except Exception as e:  # the user's forward() on shapes that no longer fit
                first = (str(e).strip().splitlines() or [type(e).__name__])[0]
                declined.append(Note(variant.name, "not made", first[:200]))
            ctx.emit(Advanced("count variants"))
    ctx.emit(Finished("count variants"))
    if not found:
        return PassResult(program, declined=tuple(declined))
    nested = old.having([*kept, *found]).eval()
    did = [Note(v.name, f"macs={v.macs} of {nested.variants[0].macs}") for v in found]
    did.append(_refreshed(program, ctx, nested, found, refresh_samples, batch))
    return PassResult(replace(program, body=nested), tuple(did), tuple(declined))


def _counted(program: Program, old: Nested, variant: Variant, level: Level, alone: bool) -> Variant:
    cut = replace(program, body=Nested(old.base, old.inputs, [Variant({}), variant]).cut(variant))
    shapes, now = shapes_of(base_of(program)), shapes_of(cut)
    macs = count(cut)
    if shapes != now or (alone and level.macs and macs != level.macs):
        raise PassError(
            "EB360",
            f"variant {variant.name} counts {macs} MACs where {level.macs} were solved for,"
            f" and answers in {now} where the whole does in {shapes}",
            hint="report this model",
        )
    return replace(variant, macs=macs)


def _refreshed(
    program: Program,
    ctx: Context,
    nested: Nested,
    variants: Sequence[Variant],
    samples: int,
    batch: int,
) -> Note:
    """Give variants statistics of their own, out of the samples that calibrate."""
    if not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in nested.base.modules()):
        return Note("statistics", "none to re-estimate", "no batch normalisation")
    dataset = ctx.data.calibration
    if dataset is None or not len(dataset):
        return Note("statistics", "taken from the whole", "no calibration data")
    order = np.random.default_rng([ctx.seed, 4]).permutation(len(dataset))[:samples]
    data = load_tensors(dataset, nested.inputs, [int(i) for i in order], emit=ctx.emit)
    size = batch_for(dataset, batch)
    forward: Callable[[nn.Module, tuple[Tensor, ...]], object] = Caller.of(program)
    for variant in variants:
        nested.refresh(variant, (c.inputs for c in data.batches(size)), forward)
    return Note("statistics", f"re-estimated on {len(data)} samples for each variant")


@contextmanager
def batch_statistics(body: nn.Module) -> Iterator[None]:
    """Normalise by each batch meanwhile: stands in for a refresh, at half its price."""
    norms = [m for m in body.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    was = [(m, m.training, m.momentum) for m in norms]
    for m in norms:
        m.training, m.momentum = True, 0.0
    try:
        yield
    finally:
        for m, training, momentum in was:
            m.training, m.momentum = training, momentum
