"""Let a network answer early: heads at the borders of its blocks, placed by cost and quality.

Places are found in the captured graph, wherever all that follows depends on one tensor; heads are
fitted quickly on the still network, the best places are solved for, and the chosen heads are
trained, alone or with the network, to answer what the original answers.
Source: "BranchyNet: Fast Inference via Early Exiting from Deep Neural Networks", 2016; heads on
pretrained networks as in "Shallow-Deep Networks", 2019.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from edgebudget import schedules
from edgebudget.distill import Distillation, Loss, spread
from edgebudget.events import Said
from edgebudget.exits import exit_name
from edgebudget.program import Context, Note, Pass, PassResult, Program
from edgebudget.tasks import Agreement
from edgebudget.train import Caller, TensorData, load_tensors, outputs_over
from edgebudget.workload import Dataset
from edgebudget_passes._exit_choice import (
    Candidate,
    Fitting,
    Judge,
    Lesson,
    best_exits,
    fitted,
)
from edgebudget_passes._exit_graph import exit_macs
from edgebudget_passes._exit_heads import Head
from edgebudget_passes._exit_network import ExitNetwork, Tap, TappedNetwork
from edgebudget_passes._exit_places import Survey, survey
from edgebudget_passes._exit_training import Logarithms, Mode, Training, undominated
from edgebudget_passes._train_feed import Feed, held_back, mirrors, training_data
from edgebudget_runtime.errors import PassError, UsageError

_HELD_SAMPLES = 2048
_FIT_STEPS = (120, 600)
_JOINT_SAMPLES, _JOINT_STEPS = 2000, 200  # with less, a network forgets more than its exits gain


@dataclass(frozen=True, slots=True)
class Config:
    """At most `exits` early exits; `train` is auto, frozen (heads alone) or joint (everything).

    `head_share` is the share of the model's MACs that one head may cost; `weights` are those of
    the early exits in the joint loss (the final answer's is 1, theirs 0.5 unless given). `samples`
    and `fit_steps` are for choosing places; 0 takes a quarter of the training steps, within bounds,
    since convolutional heads show late what they can do. `optimizer` auto is adamw for networks
    without batch normalisation. The other settings are those of `recover`.
    """

    exits: int = 4
    train: str = "auto"
    head_share: float = 0.05
    weights: tuple[float, ...] = ()
    samples: int = 2048
    fit_steps: int = 0
    steps: int = 0
    epochs: float = 2.0
    batch: int = 64
    lr: float = 0.0
    schedule: str = "rex"
    warmup: float = 0.02
    optimizer: str = "auto"
    weight_decay: float = 1e-4
    clip: float = 5.0
    alpha: float = 0.5
    temperature: float = 2.0
    augment: str = "auto"
    bn_freeze: float = 0.1
    checkpoint_every: int = 100


@dataclass(frozen=True, slots=True)
class _Material:
    """What is learned from, and how answers are judged."""

    dataset: Dataset
    indices: tuple[int, ...]  # to learn from
    held: Lesson
    judge: Judge  # of `held`
    teacher: nn.Module
    is_original: bool
    labels: bool
    loss: Loss
    augment: str
    notes: tuple[Note, ...]


def run(program: Program, config: Config, ctx: Context) -> PassResult:
    """Insert, choose and train exits, or decline where the network cannot have any.

    Raises:
        UsageError: EB153, a setting has no such value; EB154, no such schedule.
        PassError: EB341, the loss is not finite even at a lower rate; EB351, the network with
            exits does not cost what its parts cost.
        ArtifactError: EB560, a sample cannot be used.
    """
    _check(config)
    dataset, notes = training_data(ctx)
    if refused := _refused(program, dataset, ctx):
        return _declined(program, refused)
    found = survey(program)
    if isinstance(found, str):
        return _declined(program, found)
    assert dataset is not None
    material = _material(program, config, ctx, dataset, found)
    notes += material.notes
    training = _training(program, config, ctx, material)
    chosen, floor, why = _chosen(program, config, ctx, found, material, training)
    if not chosen:
        return _declined(program, why, notes)
    start = _network(program, [(c.place.tap, c.head) for c in chosen])
    trained = start
    if not training.ended_early:
        trained = training.run(start, _mode(config, ctx, training))
    notes += training.notes
    result, described, dropped = _kept(program, trained, chosen, training, found, floor)
    if not described:
        why = "no exit is better than a constant answer once trained"
        return replace(
            _declined(program, why, [*notes, *dropped]), ended_early=training.ended_early
        )
    return PassResult(result, (*notes, *described), dropped, training.ended_early)


def _network(program: Program, exits: Sequence[tuple[Tap, Head]]) -> ExitNetwork:
    names = [s.name for s in program.inputs]
    taps, heads = zip(*exits, strict=True)
    return ExitNetwork(program.body, names, program.outputs[0], taps, heads).eval()


def _check(config: Config) -> None:
    schedules.factor(config.schedule, 0, 1)
    choices = {
        "train": ("auto", "frozen", "joint"),
        "optimizer": ("auto", "sgd", "adamw"),
        "augment": ("auto", "none", "flip", "flip-crop"),
    }
    for name, allowed in choices.items():
        if (value := getattr(config, name)) not in allowed:
            raise _usage(name, value, f"one of {', '.join(allowed)}")
    for name in ("exits", "batch", "samples", "temperature", "checkpoint_every"):
        if (value := getattr(config, name)) <= 0:
            raise _usage(name, value, "must be positive")
    if config.fit_steps < 0:
        raise _usage("fit_steps", config.fit_steps, "give a number of steps, or 0")
    if config.steps < 0 or (config.steps == 0 and config.epochs <= 0):
        raise _usage("steps", config.steps, "give a positive number of steps or epochs")
    if config.weights and (len(config.weights) != config.exits or min(config.weights) <= 0):
        hint = f"give one positive weight for each of the {config.exits} exits, or none"
        raise _usage("weights", config.weights, hint)


def _usage(name: str, value: object, hint: str) -> UsageError:
    return UsageError("EB153", f"insert_exits: {name} = {value!r}", hint=hint)


def _refused(program: Program, dataset: Dataset | None, ctx: Context) -> str:
    """Why there is nothing to do, as far as it can be told without looking at the network."""
    if not isinstance(program.body, nn.Module):
        return "its widths are nested already: insert exits first"
    if isinstance(program.body, ExitNetwork):
        return "it has exits already"
    if ctx.task.kind == "detection":
        return "it detects: boxes come from the whole depth, an early head cannot give them"
    if dataset is None or len(dataset) < 2:
        return "no training and no calibration data to fit heads on"
    return ""


def _declined(program: Program, why: str, notes: list[Note] | None = None) -> PassResult:
    declined = (*(notes or ()), Note("model", "no exits", why))
    return PassResult(program, declined=declined)


def _material(
    program: Program, config: Config, ctx: Context, dataset: Dataset, found: Survey
) -> _Material:
    held, indices = held_back(program, ctx, dataset, _HELD_SAMPLES)
    # In their own order the first of them might be all of one class.
    shuffled = np.random.default_rng([ctx.seed, 3]).permutation(len(held))
    held = held.take(torch.from_numpy(shuffled))
    teacher = copy.deepcopy(ctx.original.body).eval()
    asked = Caller.of(ctx.original)
    answers = outputs_over(asked, teacher, held, config.batch)
    labels = not ctx.task.needs_reference and held.labels is not None
    task = ctx.task if labels or ctx.task.needs_reference else Agreement()
    truth = held.labels if labels and held.labels is not None else answers[0]
    scale = spread(answers, truth if labels else None)
    loss: Loss = Distillation(ctx.task.kind, config.alpha, config.temperature, scale=scale)
    if ctx.task.kind == "classification" and found.tail[-1:] == (("softmax", ()),):
        loss = Logarithms(loss)
    notes = [Note("data", f"train_samples={len(indices)} held_samples={len(held)}", dataset.name)]
    augment = config.augment
    if augment == "auto":
        augment, why = mirrors(asked, teacher, held, answers, ctx.task.kind)
        notes.append(Note("data", f"augment={augment}", why))
    return _Material(
        dataset=dataset,
        indices=tuple(indices),
        held=Lesson(held, answers[0]),
        judge=Judge(task, program.outputs[0], truth),
        teacher=teacher,
        is_original=program.body is ctx.original.body,
        labels=labels,
        loss=loss,
        augment=augment,
        notes=tuple(notes),
    )


def _chosen(
    program: Program,
    config: Config,
    ctx: Context,
    found: Survey,
    material: _Material,
    training: Training,
) -> tuple[tuple[Candidate, ...], float, str]:
    """Fitted heads at the best places, the quality of a constant answer, and why there are none."""
    own = outputs_over(Caller.of(program), program.body, material.held.data, config.batch)[0]
    quality, floor = material.judge.quality(own), material.judge.constant(own)
    if quality - floor <= material.judge.noise(own, own.mean(0, keepdim=True).expand_as(own)):
        return (), floor, f"it scores {quality:.4f}, a constant answer {floor:.4f}"
    names = [s.name for s in program.inputs]
    draw = np.random.default_rng([ctx.seed, 4]).permutation(np.asarray(material.indices))
    rows = [int(i) for i in draw[: config.samples]]
    data = load_tensors(material.dataset, names, rows, emit=ctx.emit, work="read samples to fit on")
    data = data if material.labels else TensorData(data.inputs, None)
    answers = outputs_over(Caller.of(ctx.original), material.teacher, data, config.batch)[0]
    low, high = _FIT_STEPS
    steps = config.fit_steps or min(high, max(low, training.steps // 4))
    how = Fitting(
        loss=material.loss,
        steps=steps,
        share=config.head_share,
        multiple=ctx.target.channel_multiple,
        batch=program.inputs[0].shape[0],
        seed=ctx.seed,
        emit=ctx.emit,
        live=lambda exits: training.fit(_network(program, exits), steps),
    )
    taps = [p.tap for p in found.places]
    tapped = TappedNetwork(program.body, names, program.outputs[0], taps).eval()
    learn = Lesson(data, answers)
    candidates = fitted(tapped, found, learn, material.held, material.judge, how)
    most = config.exits
    chosen = best_exits(candidates, macs=found.macs, quality=quality, floor=floor, most=most)
    best = max(candidates, key=lambda c: c.quality)
    why = f"the best of {len(candidates)} heads tried, {best.place.label}, scores "
    why += f"{best.quality:.4f}, a constant answer {floor:.4f}, the whole {quality:.4f}"
    return chosen, floor, why


def _training(program: Program, config: Config, ctx: Context, material: _Material) -> Training:
    batch = min(config.batch, len(material.indices))
    steps = config.steps or max(1, round(config.epochs * len(material.indices) / batch))
    names = tuple(s.name for s in program.inputs)
    normed = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in program.body.modules())
    optimizer = config.optimizer
    if optimizer == "auto":
        optimizer = "sgd" if normed else "adamw"

    def feed(steps: int) -> Feed:
        return Feed.of(
            material.dataset,
            names,
            material.indices,
            batch=batch,
            steps=steps,
            seed=ctx.seed,
            augment=material.augment,
            labels=material.labels,
            emit=ctx.emit,
        )

    return Training(
        ctx=ctx,
        forward=Caller(names, program.outputs),  # a network with exits answers in a tuple
        teacher=material.teacher,
        is_original=material.is_original,
        loss=material.loss,
        feed=feed,
        steps=steps,
        weights=config.weights,
        labels=material.labels,
        settings={**asdict(config), "optimizer": optimizer},
        held=material.held,
        judge=material.judge,
    )


def _mode(config: Config, ctx: Context, training: Training) -> Mode:
    """What was asked for; joint by itself only where there is enough to learn from."""
    mode: Literal["frozen", "joint"] = "frozen"
    if config.train == "auto":
        samples = len(ctx.data.train) if ctx.data.train is not None else 0
        if samples >= _JOINT_SAMPLES and training.steps >= _JOINT_STEPS:
            mode = "joint"
        what = f"{mode}: train_samples={samples} steps={training.steps}"
        least = f"joint needs {_JOINT_SAMPLES} samples and {_JOINT_STEPS} steps"
        training.notes.append(Note("training", what, least))
    elif config.train == "joint":
        mode = "joint"
    return mode


def _kept(
    program: Program,
    trained: ExitNetwork,
    chosen: tuple[Candidate, ...],
    training: Training,
    found: Survey,
    floor: float,
) -> tuple[Program, list[Note], tuple[Note, ...]]:
    """The program without dominated exits, what each exit gives, and which were dropped."""
    answers = training.answers(trained)
    dropped = dict(undominated(training.judge, answers, floor))
    declined = tuple(Note(chosen[k].place.label, "exit dropped", w) for k, w in dropped.items())
    for note in declined:
        training.ctx.emit(Said("info", f"insert_exits: exit {note.where} dropped: {note.why}"))
    left = [k for k in range(len(chosen)) if k not in dropped]
    if not left:
        return program, [], declined
    heads = [trained.exits[k] for k in left]
    network = trained.with_heads(heads, [trained.taps[k] for k in left])
    result = replace(program, body=network, outputs=_outputs(program, len(left)))
    macs = exit_macs(result)
    expected = found.macs + sum(chosen[k].head_macs for k in left)
    if macs[-1] != expected:
        raise PassError(
            "EB351",
            f"the network with exits counts {macs[-1]} MACs, its parts {expected}",
            hint="this is a bug; leave insert_exits out of the plan to go on",
        )
    given: list[Tensor] = [answers[k] for k in (*left, -1)]
    notes = []
    for name, cost, answer, k in zip(result.outputs, macs, given, (*left, -1), strict=True):
        quality = training.judge.quality(answer)
        what = f"{training.judge.task.metric}={quality:.4f} macs={cost} of {found.macs}"
        where = f"{chosen[k].place.label}: {chosen[k].design.label}" if k >= 0 else "the whole"
        notes.append(Note(name, what, where))
    return result, notes, declined


def _outputs(program: Program, exits: int) -> tuple[str, ...]:
    output = program.outputs[0]
    return (*(exit_name(output, k + 1) for k in range(exits)), output)


PASS = Pass(
    name="insert_exits",
    run=run,
    config=Config,
    stage="module",
    summary="add heads that answer early, at the borders of blocks",
)
