"""Which places get an exit: heads fitted quickly on a still network, then dynamic programming."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from edgebudget.distill import Loss
from edgebudget.events import Advanced, Emit, Finished, Started
from edgebudget.train import TensorData
from edgebudget.workload import Task
from edgebudget_passes._exit_heads import Design, Head, build, designs
from edgebudget_passes._exit_network import Tap, TappedNetwork
from edgebudget_passes._exit_places import Place, Survey
from edgebudget_runtime.errors import UnsupportedError

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


@dataclass(frozen=True, slots=True)
class Fitting:
    """What quick fits need beside the samples.

    `live` trains convolutional heads on the still network, each given with its tap.
    """

    loss: Loss
    steps: int
    share: float  # of the model's MACs that a convolutional head may cost
    multiple: int
    batch: int  # of the program
    seed: int
    emit: Emit
    live: Callable[[Sequence[tuple[Tap, Head]]], tuple[list[Head], Sequence[Tensor]]]


def fitted(
    network: TappedNetwork,
    survey: Survey,
    learn: Lesson,
    held: Lesson,
    judge: Judge,
    how: Fitting,
) -> list[Candidate]:
    """A fitted head for every design at every place, with its quality on held-back samples.

    `network` taps the survey's places and stands still: what linear heads read of it is computed
    once. Maps are too large to be kept, and convolutions want more samples: those train live.
    """
    linear: list[tuple[Place, Design, Head]] = []
    grids: list[tuple[Place, Design, Head]] = []
    for i, place in enumerate(survey.places):
        options = designs(place, survey, share=how.share, batch=how.batch, multiple=how.multiple)
        for design in options:
            made = (place, design, build(design, place, survey, _mixed(how.seed, i)))
            (grids if design.pooling == "grid" else linear).append(made)
    known, asked = (_features(network, linear, x.data) for x in (learn, held))
    how.emit(Started("fit exits", len(linear)))
    found = []
    for (place, design, head), features, others in zip(linear, known, asked, strict=True):
        fit(head, features, learn, how)
        with torch.no_grad():
            quality = judge.quality(head.answer(others))
        found.append(Candidate(place, design, head, design.macs * how.batch, quality))
        how.emit(Advanced("fit exits", 1, f"{place.label}: {quality:.4f}"))
    how.emit(Finished("fit exits"))
    if grids:
        trained, answers = how.live([(place.tap, head) for place, _, head in grids])
        for (place, design, _), head, given in zip(grids, trained, answers, strict=True):
            quality = judge.quality(given)
            found.append(Candidate(place, design, head, design.macs * how.batch, quality))
    return found


def fit(head: Head, features: Tensor, lesson: Lesson, how: Fitting) -> None:
    """Train a linear head in place on what its pooling gives; the seed draws the samples."""
    plain = isinstance(head.trunk, nn.Identity)
    middle, spread = torch.zeros(1), torch.ones(1)
    if plain:  # features of unlike size would each want their own rate
        middle, spread = features.mean(0), features.std(0, correction=0).clamp_min(1e-6)
    head.start_at(lesson.answers.mean(0))
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
    """What the pooling of each head gives, [N, C]."""
    kept: list[list[Tensor]] = [[] for _ in heads]
    with torch.no_grad():
        for part in data.batches(_FIT_BATCH):
            tapped = dict(zip(network.taps, network(*part.inputs)[1:], strict=True))
            for rows, (place, _, head) in zip(kept, heads, strict=True):
                rows.append(head.pool(tapped[place.tap]).clone())
    return [torch.cat(rows) for rows in kept]


def _mixed(seed: int, index: int) -> int:
    return int(np.random.SeedSequence([seed, index]).generate_state(1)[0])
