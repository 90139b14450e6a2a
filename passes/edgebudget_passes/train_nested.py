"""Train a whole network and its variants together, on one set of weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np

from edgebudget import schedules
from edgebudget.distill import Distillation, spread
from edgebudget.events import Said
from edgebudget.nested import Nested
from edgebudget.program import Context, Note, Pass, PassResult, Program
from edgebudget.train import Caller, load_tensors, outputs_over
from edgebudget_passes._nested_tuner import Sandwich
from edgebudget_passes._nested_variants import over_exits
from edgebudget_passes._train_feed import Feed, held_back, mirrors, training_data
from edgebudget_runtime.errors import UsageError

if TYPE_CHECKING:
    from edgebudget.workload import Dataset

_WORK = "train_nested"


@dataclass(frozen=True, slots=True)
class Config:
    """As for `recover`; a step trains `together` sub-networks.

    `tolerance` is how much worse the whole may answer held-back samples afterwards, in units of
    the loss: nats for classes, half a squared standard deviation for numbers. The original has
    often learnt those samples by heart, so that any change looks worse than it is.
    `statistics_samples` re-estimate every variant's normalisation at the end.
    """

    steps: int = 0
    epochs: float = 1.0
    batch: int = 64
    lr: float = 0.0
    schedule: str = "rex"
    warmup: float = 0.02
    optimizer: str = "sgd"
    weight_decay: float = 1e-4
    clip: float = 5.0
    alpha: float = 0.3
    temperature: float = 2.0
    augment: str = "auto"
    bn_freeze: float = 0.1
    checkpoint_every: int = 100
    together: int = 4
    tolerance: float = 0.2
    statistics_samples: int = 512


def run(program: Program, config: Config, ctx: Context) -> PassResult:
    """Train by the sandwich rule; keep the start where the whole suffers or the variants gain not.

    Raises:
        UsageError: EB153, a setting has no such value; EB154, no such schedule.
        PassError: EB341, the loss is not finite even at a lower rate.
        ArtifactError: EB560, a sample cannot be used.
    """
    _check(config)
    nested = program.body
    if not isinstance(nested, Nested) or len(nested.variants) < 2:
        why = "there are no variants: add some with slim_width, skip_layers or nest_resolution"
        return PassResult(program, declined=(Note("model", "not trained", why),))
    dataset, notes = training_data(ctx)
    if dataset is None:
        why = "no training and no calibration data"
        return PassResult(program, declined=(Note("model", "not trained", why),))
    held, indices = held_back(program, ctx, dataset)
    notes.append(Note("data", f"train_samples={len(indices)} held_samples={len(held)}"))
    teacher = copy.deepcopy(ctx.original.body).eval()
    forward = Caller.of(program)
    answers = outputs_over(Caller.of(ctx.original), teacher, held, config.batch)
    labels = not ctx.task.needs_reference
    truth = held.labels if labels else None
    one = Distillation(
        ctx.task.kind, config.alpha, config.temperature, scale=spread(answers, truth)
    )
    loss = over_exits(one, program, ctx)

    def held_losses(body: Nested) -> list[float]:
        found = []
        for variant in body.variants:
            got = outputs_over(forward, body.cut(variant), held, config.batch)
            found.append(float(loss.loss(got, answers, truth)))
        return found

    augment = config.augment
    if augment == "auto":
        augment, why = mirrors(Caller.of(ctx.original), teacher, held, answers, ctx.task.kind)
        notes.append(Note("data", f"augment={augment}", why))
    batch = min(config.batch, len(indices))
    steps = config.steps or max(1, round(config.epochs * len(indices) / batch))
    feed = Feed.of(
        dataset,
        forward.inputs,
        indices,
        batch=batch,
        steps=steps,
        seed=ctx.seed,
        augment=augment,
        labels=labels,
        emit=ctx.emit,
    )
    before = held_losses(nested)
    settings = asdict(config) | {"variants": [dict(v.choices) for v in nested.variants]}
    tuner = Sandwich(
        student=copy.deepcopy(nested),
        teacher=teacher,
        forward=forward,
        feed=feed,
        loss=loss,
        settings=settings,
        steps=steps,
        folder=ctx.workdir,
        deadline=ctx.deadline,
        emit=ctx.emit,
        work=_WORK,
        together=config.together,
    )
    done = tuner.run()
    trained = tuner.student
    assert isinstance(trained, Nested)
    refreshed = _refresh(trained, dataset, indices, forward, config, ctx)
    after = held_losses(trained)
    notes += [*tuner.notes, refreshed]
    notes += [
        Note(v.name, f"macs={v.macs} held_loss_before={b:.6f} held_loss_after={a:.6f}")
        for v, b, a in zip(nested.variants, before, after, strict=True)
    ]
    refused = _refused(before, after, config.tolerance)
    what = f"steps={done} tolerance={config.tolerance}"
    if refused:
        ctx.emit(Said("warning", f"{_WORK}: {refused}; the start is kept"))
        kept = Note("model", f"{what} kept=start", refused)
        return PassResult(program, tuple(notes), (kept,), tuner.ended_early)
    notes.append(Note("model", f"{what} kept=end"))
    return PassResult(replace(program, body=trained), tuple(notes), (), tuner.ended_early)


def _refused(before: Sequence[float], after: Sequence[float], tolerance: float) -> str:
    """Why the trained network is not taken, if it is not."""
    if not all(math.isfinite(a) for a in after):
        return "a variant's held-back loss is not finite"
    if after[0] > before[0] + tolerance:
        worse = after[0] - before[0]
        return f"the whole's held-back loss rose by {worse:.4f}, more than {tolerance}"
    if fmean(after[1:]) > fmean(before[1:]):
        return "the variants' mean held-back loss did not fall"
    return ""


def _refresh(
    nested: Nested,
    dataset: Dataset,
    indices: Sequence[int],
    forward: Caller,
    config: Config,
    ctx: Context,
) -> Note:
    """Statistics of every variant, over training samples as they are; the whole keeps its own."""
    order = np.random.default_rng([ctx.seed, 4]).permutation(len(indices))
    rows = [indices[int(i)] for i in order[: config.statistics_samples]]
    data = load_tensors(dataset, forward.inputs, rows, emit=ctx.emit)
    layers = 0
    for variant in nested.variants[1:]:
        inputs = (c.inputs for c in data.batches(config.batch))
        layers = max(layers, nested.refresh(variant, inputs, forward))
    if not layers:
        return Note("statistics", "none to re-estimate", "no batch normalisation")
    return Note("statistics", f"re-estimated on {len(data)} samples for each variant")


def _check(config: Config) -> None:
    schedules.factor(config.schedule, 0, 1)
    choices = {"optimizer": ("sgd", "adamw"), "augment": ("auto", "none", "flip", "flip-crop")}
    for name, allowed in choices.items():
        if (value := getattr(config, name)) not in allowed:
            raise UsageError(
                "EB153", f"{_WORK}: {name} = {value!r}", hint=f"one of {', '.join(allowed)}"
            )
    for name in ("batch", "temperature", "checkpoint_every", "statistics_samples"):
        if (value := getattr(config, name)) <= 0:
            raise UsageError("EB153", f"{_WORK}: {name} = {value}", hint="must be positive")
    if config.together < 2:
        raise UsageError("EB153", f"{_WORK}: together = {config.together}", hint="2 or more")
    if config.steps < 0 or (config.steps == 0 and config.epochs <= 0):
        raise UsageError(
            "EB153",
            f"{_WORK}: steps = {config.steps}, epochs = {config.epochs}",
            hint="give a positive number of steps or epochs",
        )


PASS = Pass(
    name="train_nested",
    run=run,
    config=Config,
    stage="module",
    summary="train a network and its variants together on one set of weights",
)
