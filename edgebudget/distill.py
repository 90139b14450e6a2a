"""Losses that pull a changed network back towards its original."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from edgebudget.workload import TaskKind


class Loss(Protocol):
    """What a training loop makes smaller."""

    def loss(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor], labels: Tensor | None
    ) -> Tensor:
        """Mean loss of a batch; outputs are [N, ...] each, labels [N, ...] or None."""
        ...


@dataclass(frozen=True, slots=True)
class Distillation:
    """How to weigh teacher against labels.

    `alpha` is the teacher's share (1 where there are no labels), `temperature` softens class
    scores, `rank` adds a penalty on pairs that a regressor puts in another order than the labels,
    `scale` is the spread of the numbers that a regressor answers (see `spread`).
    """

    kind: TaskKind
    alpha: float = 0.5
    temperature: float = 2.0
    rank: float = 0.0
    scale: float = 1.0

    def loss(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor], labels: Tensor | None
    ) -> Tensor:
        """Mean loss of a batch; outputs are [N, ...] each, labels [N, ...] or None.

        Source: "Distilling the Knowledge in a Neural Network", 2015:
        (1 - alpha) CE + alpha T^2 KL for classes; the same mixture of Huber losses for numbers.
        """
        if self.kind == "classification":
            return self._classes(student[0], teacher[0], labels)
        if self.kind == "regression":
            return self._numbers(student[0], teacher[0], labels)
        parts = [_relative(s, t) for s, t in zip(student, teacher, strict=True)]
        return torch.stack(parts).mean()

    def _classes(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        student, teacher = student.flatten(0, -2), teacher.flatten(0, -2)
        t = self.temperature
        soft = F.kl_div(
            F.log_softmax(student / t, -1),
            F.log_softmax(teacher / t, -1),
            reduction="batchmean",
            log_target=True,
        )
        if labels is None:
            return t * t * soft
        hard = F.cross_entropy(student, labels.flatten().long())
        return (1 - self.alpha) * hard + self.alpha * t * t * soft

    def _numbers(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        s, t = student.flatten(1) / self.scale, teacher.flatten(1) / self.scale
        soft = F.huber_loss(s, t)
        if labels is None:
            return soft
        y = labels.to(s.dtype).reshape(s.shape) / self.scale
        loss = (1 - self.alpha) * F.huber_loss(s, y) + self.alpha * soft
        if self.rank > 0:
            loss = loss + self.rank * _disorder(s, y)
        return loss


@dataclass(frozen=True, slots=True)
class EveryExit:
    """The weighted mean of one loss over all exits, each taught by the teacher's last output.

    `weights` has one number for each of the student's outputs, early exits first.
    Source: "BranchyNet: Fast Inference via Early Exiting from Deep Neural Networks", 2016.
    """

    one: Loss
    weights: tuple[float, ...]

    def loss(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor], labels: Tensor | None
    ) -> Tensor:
        """Mean loss of a batch, as of a single answer."""
        parts = [
            weight * self.one.loss((answer,), teacher[-1:], labels)
            for weight, answer in zip(self.weights, student, strict=True)
            if weight > 0
        ]
        return torch.stack(parts).sum() / sum(self.weights)


def spread(answers: Sequence[Tensor], labels: Tensor | None) -> float:
    """Standard deviation of a regressor's labels, or of the original's answers without them."""
    values = answers[0] if labels is None else labels
    found = float(values.double().std(correction=0))
    return found if found > 1e-6 else 1.0


def _relative(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error as a share of the teacher's power, so that outputs weigh alike."""
    if not student.is_floating_point():
        return torch.zeros((), requires_grad=True)
    return F.mse_loss(student, teacher) / teacher.square().mean().clamp_min(1e-12)


def _disorder(s: Tensor, y: Tensor) -> Tensor:
    """Logistic loss on the difference of every pair whose labels differ ("RankNet", 2005)."""
    ds, dy = s.T - s, y.T - y
    apart = dy.abs() > 1e-6
    if not bool(apart.any()):
        return s.sum() * 0.0
    return F.softplus(-ds[apart] * dy[apart].sign()).mean()
