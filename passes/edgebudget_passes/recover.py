"""Fine-tune a changed network towards its original, for a number of steps fixed in advance."""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from edgebudget import schedules
from edgebudget.distill import Distillation, spread
from edgebudget.events import Said
from edgebudget.program import Context, Note, Pass, PassResult, Program
from edgebudget.train import (
    Caller,
    TensorData,
    Tensors,
    bytes_of_sample,
    load_tensors,
    outputs_over,
)
from edgebudget.workload import TaskKind
from edgebudget_passes._fine_tune import FineTune
from edgebudget_passes._train_feed import Feed
from edgebudget_runtime.errors import UsageError

if TYPE_CHECKING:
    from edgebudget.workload import Dataset

_HELD_SAMPLES = 512
_HELD_BYTES = 4e8
_MIRROR_BATCH = 64
_SAME_CLASS = 0.85  # below, mirrored pictures are something else to the original
_SAME_NUMBERS = 0.05


@dataclass(frozen=True, slots=True)
class Config:
    """`steps` counts optimizer steps; 0 takes `epochs` over the training data instead.

    `lr` 0 takes a rate for the optimizer that grows with the root of the steps: a short run that
    starts near its goal only loses by large ones. `warmup`, `bn_freeze` are shares of the steps.
    `augment` auto mirrors pictures where the original answers mirrored ones alike.
    `alpha` is the teacher's share of the loss where there are labels.
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
    rank: float = 0.0
    augment: str = "auto"
    bn_freeze: float = 0.1
    checkpoint_every: int = 100


def run(program: Program, config: Config, ctx: Context) -> PassResult:
    """Distil from the original on training data; keep the start where the end is no better.

    Raises:
        UsageError: EB153, a setting has no such value; EB154, no such schedule.
        PassError: EB341, the loss is not finite even at a lower rate.
        ArtifactError: EB560, a sample cannot be used.
    """
    _check(config)
    dataset, notes = _training_data(ctx)
    if dataset is None:
        why = "no training and no calibration data"
        return PassResult(program, declined=(Note("model", "not trained", why),))
    held, indices = _held_back(program, ctx, dataset)
    what = f"train_samples={len(indices)} held_samples={len(held)}"
    notes.append(Note("data", what, dataset.name))
    teacher = copy.deepcopy(ctx.original.body).eval()
    forward = Caller.of(program)
    answers = outputs_over(Caller.of(ctx.original), teacher, held, config.batch)
    batch = min(config.batch, len(indices))
    steps = config.steps or max(1, round(config.epochs * len(indices) / batch))
    labels = not ctx.task.needs_reference
    truth = held.labels if labels else None
    scale = spread(answers, truth)
    judge = Distillation(ctx.task.kind, config.alpha, config.temperature, scale=scale)
    augment = config.augment
    if augment == "auto":
        augment, why = _mirrors(Caller.of(ctx.original), teacher, held, answers, ctx.task.kind)
        notes.append(Note("data", f"augment={augment}", why))
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

    def held_loss(body: nn.Module) -> float:
        got = outputs_over(forward, body, held, config.batch)
        return float(judge.loss(got, answers, truth))

    before = held_loss(program.body)
    tuner = FineTune(
        student=copy.deepcopy(program.body),
        teacher=teacher,
        forward=forward,
        feed=feed,
        loss=replace(judge, rank=config.rank),
        settings=asdict(config),
        steps=steps,
        folder=ctx.workdir,
        deadline=ctx.deadline,
        emit=ctx.emit,
    )
    done = tuner.run()
    after = held_loss(tuner.student)
    notes += [Note("model", n.what, n.why) for n in tuner.notes]
    what = f"steps={done} held_loss_before={before:.6f} held_loss_after={after:.6f}"
    if not math.isfinite(after) or after > before:
        ctx.emit(Said("warning", "recover: held-back loss did not fall; the start is kept"))
        kept = Note("model", f"{what} kept=start", "training made the held-back loss worse")
        return PassResult(program, tuple(notes), (kept,), tuner.ended_early)
    notes.append(Note("model", f"{what} kept=end", ""))
    done_program = replace(program, body=tuner.student)
    return PassResult(done_program, tuple(notes), (), tuner.ended_early)


def _check(config: Config) -> None:
    schedules.factor(config.schedule, 0, 1)
    choices = {"optimizer": ("sgd", "adamw"), "augment": ("auto", "none", "flip", "flip-crop")}
    for name, allowed in choices.items():
        if (value := getattr(config, name)) not in allowed:
            raise UsageError(
                "EB153", f"recover: {name} = {value!r}", hint=f"one of {', '.join(allowed)}"
            )
    for name in ("batch", "temperature", "checkpoint_every"):
        if (value := getattr(config, name)) <= 0:
            raise UsageError("EB153", f"recover: {name} = {value}", hint="must be positive")
    if config.steps < 0 or (config.steps == 0 and config.epochs <= 0):
        raise UsageError(
            "EB153",
            f"recover: steps = {config.steps}, epochs = {config.epochs}",
            hint="give a positive number of steps or epochs",
        )


def _training_data(ctx: Context) -> tuple[Dataset | None, list[Note]]:
    if ctx.data.train is not None and len(ctx.data.train):
        return ctx.data.train, []
    if ctx.data.calibration is not None and len(ctx.data.calibration):
        why = "no training data: expect less recovery than from a larger set"
        return ctx.data.calibration, [Note("data", "trained on calibration samples", why)]
    return None, []


def _held_back(program: Program, ctx: Context, train: Dataset) -> tuple[TensorData, list[int]]:
    """Samples to judge on, and the indices to learn from; both out of the training data.

    Calibration samples would flatter the start: earlier passes were fitted to them.
    """
    room = max(1, int(_HELD_BYTES // max(1, bytes_of_sample(train))))
    count = min(_HELD_SAMPLES, room, max(1, len(train) // 8))
    # Drawn, not evenly spaced: a data set may repeat its classes at any even spacing.
    drawn = np.random.default_rng([ctx.seed, 2]).permutation(len(train))
    rows = sorted(int(i) for i in drawn[:count])
    rest = sorted(set(range(len(train))) - set(rows)) or rows
    names = [s.name for s in program.inputs]
    return load_tensors(train, names, rows, emit=ctx.emit, work="read held-back samples"), rest


def _mirrors(
    forward: Caller, teacher: nn.Module, held: TensorData, answers: Tensors, kind: TaskKind
) -> tuple[str, str]:
    """Whether mirrored pictures mean the same: asked of the original, on held-back samples."""
    if len(held.inputs) != 1 or held.inputs[0].dim() != 4:
        return "none", "the input is no picture"
    mirrored = TensorData((held.inputs[0].flip(-1),), None)
    turned = outputs_over(forward, teacher, mirrored, _MIRROR_BATCH)
    if kind == "classification":
        same = float((turned[0].argmax(-1) == answers[0].argmax(-1)).float().mean())
        why = f"the original gives {same:.3f} of mirrored pictures the same class"
        return ("flip" if same >= _SAME_CLASS else "none"), why
    change = max(
        float((a - b).square().mean() / b.var(correction=0).clamp_min(1e-12))
        for a, b in zip(turned, answers, strict=True)
        if a.is_floating_point()
    )
    why = f"mirroring changes the original's answers by {change:.3f} of their variance"
    return ("flip" if change <= _SAME_NUMBERS else "none"), why


PASS = Pass(
    name="recover",
    run=run,
    config=Config,
    stage="module",
    summary="fine-tune towards the original for a fixed number of steps",
)
