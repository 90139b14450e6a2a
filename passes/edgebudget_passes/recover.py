"""Fine-tune a changed network towards its original, for a number of steps fixed in advance."""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, dataclass, replace

from torch import nn

from edgebudget import schedules
from edgebudget.distill import Distillation, EveryExit, Loss, spread
from edgebudget.events import Said
from edgebudget.program import Context, Note, Pass, PassResult, Program
from edgebudget.train import Caller, outputs_over
from edgebudget_passes._fine_tune import FineTune
from edgebudget_passes._train_feed import Feed, held_back, mirrors, training_data
from edgebudget_runtime.errors import UsageError


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
    dataset, notes = training_data(ctx)
    if dataset is None:
        why = "no training and no calibration data"
        return PassResult(program, declined=(Note("model", "not trained", why),))
    held, indices = held_back(program, ctx, dataset)
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
    one = Distillation(ctx.task.kind, config.alpha, config.temperature, scale=scale)
    judge, loss = (_over_exits(d, program, ctx) for d in (one, replace(one, rank=config.rank)))
    augment = config.augment
    if augment == "auto":
        augment, why = mirrors(Caller.of(ctx.original), teacher, held, answers, ctx.task.kind)
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
        loss=loss,
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


def _over_exits(one: Distillation, program: Program, ctx: Context) -> Loss:
    """Early exits, which the original lacks, learn its answer too."""
    exits = len(program.outputs)
    return one if exits == len(ctx.original.outputs) else EveryExit(one, (1.0,) * exits)


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


PASS = Pass(
    name="recover",
    run=run,
    config=Config,
    stage="module",
    summary="fine-tune towards the original for a fixed number of steps",
)
