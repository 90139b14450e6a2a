"""The training loop over a nested network: several sub-networks learn in every step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from edgebudget.nested import Linked, Nested
from edgebudget.train import TensorData
from edgebudget_passes._fine_tune import FineTune

# Losses are averaged, and variants start far from their goal: on the digits, 250 steps at twice the
# rate of `recover` left the whole and every variant with less loss than at that rate itself.
_RATE_GAIN = 2.0


@dataclass(slots=True, kw_only=True)
class Sandwich(FineTune):
    """Each step: the whole, the smallest, and others drawn between them, `together` in all.

    The whole learns from the teacher (and labels), the others from the whole's answer of the same
    step. Their losses are averaged.
    Source: "Universally Slimmable Networks and Improved Training Techniques", 2019 (sandwich rule,
    in-place distillation); "SortedNet", 2023 (the mean over nested networks).
    """

    together: int
    linked: list[Linked] = field(init=False)

    def __post_init__(self) -> None:
        assert isinstance(self.student, Nested)
        self.linked = [self.student.link(v) for v in self.student.variants]

    def _usual_rate(self) -> float:
        return _RATE_GAIN * FineTune._usual_rate(self)

    def _set_modes(self, frozen: bool) -> None:
        FineTune._set_modes(self, frozen)
        for linked in self.linked[1:]:
            for m in linked.body.modules():
                m.training = not frozen and isinstance(m, nn.modules.batchnorm._BatchNorm)

    def _learn(self, data: TensorData) -> float:
        """Gradients of the mean loss of the drawn sub-networks; one graph is held at a time."""
        assert self.teacher is not None
        with torch.no_grad():
            taught = self.forward(self.teacher, data.inputs)
        chosen = self._drawn()
        self.optimizer.zero_grad(set_to_none=True)
        share = 1.0 / (len(chosen) + 1)
        with torch.enable_grad():
            answers = self.forward(self.linked[0].body, data.inputs)
            total = self._backward(answers, taught, data.labels, share)
            taught = tuple(y.detach() for y in answers)
            del answers
            for number in chosen:
                if not math.isfinite(total):
                    break
                with self.linked[number].bound() as body:
                    total += self._backward(self.forward(body, data.inputs), taught, None, share)
        return total

    def _backward(
        self,
        answers: Sequence[Tensor],
        taught: Sequence[Tensor],
        labels: Tensor | None,
        share: float,
    ) -> float:
        loss = share * self.loss.loss(answers, taught, labels)
        value = float(loss.detach())
        if math.isfinite(value):
            torch.autograd.backward(loss)
        return value

    def _drawn(self) -> list[int]:
        """Numbers of the variants of this step besides the whole; from the seed and the step."""
        assert isinstance(self.student, Nested)
        variants = self.student.variants
        if len(variants) == 1:
            return []
        smallest = min(range(1, len(variants)), key=lambda i: variants[i].macs)
        others = [i for i in range(1, len(variants)) if i != smallest]
        draw = np.random.default_rng([self.feed.seed, 3, self.step])
        count = min(len(others), max(0, self.together - 2))
        between = draw.permutation(len(others))[:count]
        return [*sorted(others[int(i)] for i in between), smallest]
