"""Which places get an exit: heads fitted quickly on a still network, then dynamic programming."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from edgebudget.distill import Loss
from edgebudget.events import Advanced, Emit, Finished, Started
from edgebudget.train import TensorData
from edgebudget.workload import Task
from edgebudget_passes._exit_heads import Design, Head, build, designs
from edgebudget_passes._exit_network import TappedNetwork
from edgebudget_passes._exit_places import Place, Survey
from edgebudget_runtime.errors import UnsupportedError

_FEATURE_BYTES = 8e8
_FIT_BATCH = 64
_FIT_RATE = 0.01
_EARN = 0.005  # of the whole area: below, an exit is not worth a segment of its own
_FOLDS, _FOLD_SAMPLES = 8, 8


@dataclass(frozen=True, slots=True)
class Judge:
    """Scores answers as the task does; `truth` are labels, or the original's answers."""

    task: Task
    output: str
    truth: Tensor

    def quality(self, answers: Tensor) -> float:
        """The task's metric of answers [N, ...]."""
        given = self.truth.numpy()
        wanted = {self.output: given} if self.task.needs_reference else given
        return self.task.quality({self.output: answers.numpy()}, wanted).value

    def constant(self, answers: Tensor) -> float:
        """What the mean of all answers would score as the answer to everything."""
        return self.quality(answers.mean(0, keepdim=True).expand_as(answers).contiguous())

    def noise(self, a: Tensor, b: Tensor) -> float:
        """Standard error of the difference in quality of two sets of answers to the same inputs."""
        count = min(_FOLDS, len(a) // _FOLD_SAMPLES)
        if count < 2:
            return 0.0
        try:
            gaps = [
                part.quality(a[i::count]) - part.quality(b[i::count])
                for i in range(count)
                for part in [Judge(self.task, self.output, self.truth[i::count])]
            ]
        except UnsupportedError:  # the metric is not defined on so few
            return 0.0
        return float(np.std(gaps, ddof=1) / np.sqrt(count))

    def take(self, rows: Tensor) -> Judge:
        """The judge of some of the samples."""
        return Judge(self.task, self.output, self.truth[rows])


@dataclass(frozen=True, slots=True)
class Candidate:
    """A fitted head at a place; MACs are for one run of the program."""

    place: Place
    design: Design
    head: Head
    head_macs: int
    quality: float


@dataclass(frozen=True, slots=True)
class Lesson:
    """Samples with the original's answers to them."""

    data: TensorData
    answers: Tensor

    def take(self, rows: Tensor) -> Lesson:
        """Some of the samples."""
        return Lesson(self.data.take(rows), self.answers[rows])


@dataclass(frozen=True, slots=True)
class Fitting:
    """What quick fits need beside the samples."""

    loss: Loss
    steps: int
    share: float  # of the model's MACs that a convolutional head may cost
    multiple: int
    batch: int  # of the program
    seed: int
    emit: Emit


def fitted(
    network: TappedNetwork,
    survey: Survey,
    learn: Lesson,
    held: Lesson,
    judge: Judge,
    how: Fitting,
) -> list[Candidate]:
    """A fitted head for every design at every place, with its quality on held-back samples.

    `network` taps the survey's places. The network stands still, so its features are kept.
    """
    heads: list[tuple[Place, Design, Head]] = []
    for i, place in enumerate(survey.places):
        options = designs(place, survey, share=how.share, batch=how.batch, multiple=how.multiple)
        for design in options:
            heads.append((place, design, build(design, place, survey, _mixed(how.seed, i))))
    rows = _affordable(network, [(p, h) for p, _, h in heads], learn.data)
    learn = learn.take(_spaced(len(learn.data), rows))
    few = _spaced(len(held.data), max(1, rows // 2))
    held, judge = held.take(few), judge.take(few)
    known = _features(network, heads, learn.data)
    asked = _features(network, heads, held.data)
    how.emit(Started("fit exits", len(heads)))
    found = []
    for i, (place, design, head) in enumerate(heads):
        fit(head, known[i], learn, how)
        with torch.no_grad():
            answers = head.answer(asked[i])
        quality = judge.quality(answers)
        found.append(Candidate(place, design, head, design.macs * how.batch, quality))
        how.emit(Advanced("fit exits", 1, f"{place.label}: {quality:.4f}"))
    how.emit(Finished("fit exits"))
    return found


def fit(head: Head, features: Tensor, lesson: Lesson, how: Fitting) -> None:
    """Train a head in place on what its pooling gives; samples are drawn from the seed."""
    plain = isinstance(head.trunk, nn.Identity)
    middle, spread = torch.zeros(1), torch.ones(1)
    if plain:  # features of unlike size would each want their own rate
        middle, spread = features.mean(0), features.std(0, correction=0).clamp_min(1e-6)
    head.start_at(lesson.answers.mean(0))
    for m in head.modules():
        m.training = isinstance(m, nn.modules.batchnorm._BatchNorm)
    optimizer = torch.optim.AdamW(head.parameters(), lr=_FIT_RATE, weight_decay=1e-3)
    draw = np.random.default_rng([how.seed, 5])
    order: list[int] = []
    size = min(_FIT_BATCH, len(features))
    with torch.enable_grad():
        for step in range(how.steps):
            for group in optimizer.param_groups:
                group["lr"] = _FIT_RATE * (1.0 - step / how.steps)
            while len(order) < size:
                order += draw.permutation(len(features)).tolist()
            rows, order = torch.tensor(order[:size]), order[size:]
            labels = None if lesson.data.labels is None else lesson.data.labels[rows]
            x = (features[rows] - middle) / spread if plain else features[rows]
            loss = how.loss.loss((head.answer(x),), (lesson.answers[rows],), labels)
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            optimizer.step()
    head.eval()
    optimizer.zero_grad(set_to_none=True)
    if plain:
        with torch.no_grad():
            head.linear.weight.div_(spread)
            head.linear.bias.sub_(head.linear.weight @ middle)


def best_exits(
    found: Sequence[Candidate], *, macs: int, quality: float, floor: float, most: int
) -> tuple[Candidate, ...]:
    """At most `most` candidates whose curve of quality over cost has the largest area.

    The curve is flat from one exit's cost to the next one's; qualities count from `floor`, that
    of a constant answer. Every head on the way is paid by all that comes after it. Because a head
    adds the same to all later costs, the area is a sum over neighbours, which dynamic programming
    solves exactly.
    """
    order = sorted(found, key=lambda c: (c.place.macs, c.head_macs))
    whole = quality - floor
    toll = [whole * (c.head_macs + _EARN * macs) for c in order]
    # best[n][j]: the largest area right of exit j, itself included, with at most n exits after it
    worth = [c.quality - floor for c in order]
    ends = [worth[j] * (macs - c.place.macs) - toll[j] for j, c in enumerate(order)]
    best: list[list[tuple[float, tuple[int, ...]]]] = [[(e, (j,)) for j, e in enumerate(ends)]]
    for _ in range(most - 1):
        row = []
        for j, c in enumerate(order):
            top: tuple[float, tuple[int, ...]] = (ends[j], (j,))
            for k in range(j + 1, len(order)):
                gap = order[k].place.macs - c.place.macs
                if gap <= 0:
                    continue
                after, chain = best[-1][k]
                area = worth[j] * (gap + order[k].head_macs) - toll[j] + after
                if area > top[0]:
                    top = (area, (j, *chain))
            row.append(top)
        best.append(row)
    area, chain = max(best[-1], key=lambda t: t[0], default=(0.0, ()))
    return tuple(order[j] for j in chain) if area > 0 else ()


def _features(
    network: TappedNetwork, heads: Sequence[tuple[Place, Design, Head]], data: TensorData
) -> list[Tensor]:
    """What the pooling of each head gives, [N, ...]; heads that pool alike share memory."""
    kinds = [(p.tap, d.pooling, d.block) for p, d, _ in heads]
    kept: dict[object, list[Tensor]] = {k: [] for k in kinds}
    first = {k: i for i, k in reversed(list(enumerate(kinds)))}
    with torch.no_grad():
        for part in data.batches(_FIT_BATCH):
            tapped = dict(zip(network.taps, network(*part.inputs)[1:], strict=True))
            for kind, i in first.items():
                place, _, head = heads[i]
                kept[kind].append(head.pool(tapped[place.tap]).clone())
    joined = {k: torch.cat(v) for k, v in kept.items()}
    return [joined[k] for k in kinds]


def _affordable(
    network: TappedNetwork, heads: Sequence[tuple[Place, Head]], data: TensorData
) -> int:
    """How many samples' features fit in memory, the half that judges included."""
    with torch.no_grad():
        tapped = dict(zip(network.taps, network(*data.part(0, 1).inputs)[1:], strict=True))
        size = sum(head.pool(tapped[place.tap]).numel() * 4 for place, head in heads)
    return max(_FIT_BATCH, min(len(data), int(_FEATURE_BYTES / 1.5 / max(1, size))))


def _spaced(count: int, wanted: int) -> Tensor:
    return torch.arange(min(count, wanted))


def _mixed(seed: int, index: int) -> int:
    return int(np.random.SeedSequence([seed, index]).generate_state(1)[0])
