"""Training on numbered views, with or without teachers, as one CUDA graph a step.

Teachers answer every view once; their answers are kept, and students learn from them whenever
the view comes round ("Distilling the Knowledge in a Neural Network", Hinton et al., 2015; the
same view for teacher and student: "Knowledge distillation: A good teacher is patient and
consistent", Beyer et al., 2022).
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgebudget_models.entry import Array
from edgebudget_models.recipes.cifar_views import SIZE, Pictures, targets, view

TEMPERATURE = 2.0
FROM_TEACHERS = 0.9  # share of the loss where there are teachers
_WARM_UP_STEPS = 3  # before a graph is captured, at rate 0
_SHOWN_EVERY = 20  # epochs
_EVALUATED = 500  # pictures at once
_OWN_VIEWS = 1_000_000  # views of a seed without teachers: none that teachers answer


@dataclass(frozen=True, slots=True)
class Settings:
    """`weights` are those of the outputs' losses, in order; `adam` chooses AdamW over SGD."""

    epochs: int
    batch: int
    rate: float
    decay: float
    weights: tuple[float, ...] = (1.0,)
    adam: bool = False
    warm_up: float = 0.05


class Teachers:
    """Mean scores of several networks over numbered views."""

    def __init__(self, files: Sequence[Path], device: torch.device) -> None:
        """`files` hold float16 [views, N, classes] each; ValueError where there are none."""
        if not files:
            raise ValueError("no teachers' answers: train teachers first")
        total = np.load(files[0], allow_pickle=False).astype(np.float32)
        for file in files[1:]:
            total += np.load(file, allow_pickle=False)
        self._scores = torch.from_numpy((total / len(files)).astype(np.float16)).to(device)

    def __len__(self) -> int:
        """How many views."""
        return len(self._scores)

    def scores(self, number: int) -> Tensor:
        """float32 [N, classes] for view `number`, which come round again and again."""
        return self._scores[number % len(self)].float()


class _Step:
    """One step of the optimizer on inputs that stay where they are; a CUDA graph on a GPU."""

    def __init__(
        self, model: nn.Module, settings: Settings, device: torch.device, taught: bool
    ) -> None:
        self.model, self.settings, self.taught = model, settings, taught
        self.rate = torch.zeros((), device=device)
        self.pixels = torch.zeros(settings.batch, SIZE, SIZE, 3, device=device)
        self.exact = torch.full((settings.batch, 10), 0.1, device=device)
        self.teacher = torch.zeros(settings.batch, 10, device=device)
        self.optimizer = _optimizer(model, settings, self.rate)
        self._graph = self._captured() if device.type == "cuda" else None
        self.loss: Tensor = self._loss if self._graph else torch.zeros(())

    def __call__(self, rate: float) -> None:
        self.rate.fill_(rate)
        if self._graph is None:
            self._run()
            self.loss = self._loss
        else:
            self._graph.replay()

    def _captured(self) -> torch.cuda.CUDAGraph:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_STEPS):
                self._run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._run()
        return graph

    def _run(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.pixels.device.type, torch.bfloat16, cache_enabled=False):
            answers = self.model(self.pixels.permute(0, 3, 1, 2))
        answers = answers if isinstance(answers, tuple) else (answers,)
        weighted = zip(answers, self.settings.weights, strict=True)
        losses = [weight * self._of(answer.float()) for answer, weight in weighted]
        loss = torch.stack(losses).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self._loss = loss.detach()

    def _of(self, scores: Tensor) -> Tensor:
        loss = F.cross_entropy(scores, self.exact)
        if not self.taught:
            return loss
        theirs = F.softmax(self.teacher / TEMPERATURE, 1)
        soft = F.cross_entropy(scores / TEMPERATURE, theirs) * TEMPERATURE**2
        return FROM_TEACHERS * soft + (1 - FROM_TEACHERS) * loss


def train(
    model: nn.Module,
    pictures: Pictures,
    settings: Settings,
    seed: int,
    teachers: Teachers | None = None,
) -> None:
    """Fit `model` in place and leave it in eval mode.

    Every epoch is a view of its own, with teachers one of those that they answered, in turn.
    """
    device = pictures.pixels.device
    model.train()
    step = _Step(model, settings, device, teachers is not None)
    per_epoch = len(pictures) // settings.batch
    generator = torch.Generator().manual_seed(seed)
    started = time.monotonic()
    for epoch in range(settings.epochs):
        number = epoch % len(teachers) if teachers else _OWN_VIEWS * (seed + 1) + epoch
        seen = view(pictures, number)
        exact = targets(pictures, seen)
        theirs = teachers.scores(number) if teachers else exact
        order = torch.randperm(len(pictures), generator=generator).to(device)
        for index in range(per_epoch):
            batch = order[index * settings.batch : (index + 1) * settings.batch]
            for source, place in (
                (seen.pixels, step.pixels),
                (exact, step.exact),
                (theirs, step.teacher),
            ):
                torch.index_select(source, 0, batch, out=place)
            done = (epoch + index / per_epoch) / settings.epochs
            step(settings.rate * _share_of_rate(done, settings.warm_up))
        if epoch % _SHOWN_EVERY == 0 or epoch + 1 == settings.epochs:
            elapsed = time.monotonic() - started
            sys.stderr.write(f"epoch {epoch + 1}, {elapsed:.1f} s, loss {step.loss.item():.3f}\n")
    model.eval()


def scores(model: nn.Module, pixels: Tensor) -> Tensor:
    """float32 [outputs, N, classes] in the arithmetic that is set, without gradients."""
    parts: list[Tensor] = []
    with torch.no_grad():
        for start in range(0, len(pixels), _EVALUATED):
            answers = model(pixels[start : start + _EVALUATED].permute(0, 3, 1, 2))
            parts.append(torch.stack(answers if isinstance(answers, tuple) else (answers,)).float())
    return torch.cat(parts, 1)


def answer_views(model: nn.Module, pictures: Pictures, views: int) -> Array:
    """A teacher's scores over views 0 to `views`: float16 [views, N, classes]."""
    found = []
    for number in range(views):
        with torch.autocast(pictures.pixels.device.type, torch.bfloat16):
            found.append(scores(model, view(pictures, number).pixels)[-1].half().cpu().numpy())
    return np.stack(found)


def _optimizer(model: nn.Module, settings: Settings, rate: Tensor) -> torch.optim.Optimizer:
    learnt = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in learnt if p.ndim > 1], "weight_decay": settings.decay},
        {"params": [p for p in learnt if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if settings.adam:
        on_gpu = rate.device.type == "cuda"
        return torch.optim.AdamW(groups, rate, fused=True, capturable=on_gpu)
    return torch.optim.SGD(groups, rate, momentum=0.9, nesterov=True, fused=True)


def _share_of_rate(done: float, warm_up: float) -> float:
    if done < warm_up:
        return done / warm_up
    return 0.5 * (1 + math.cos(math.pi * (done - warm_up) / (1 - warm_up)))
