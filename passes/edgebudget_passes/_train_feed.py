"""The samples of a training run: which, in which order, turned how; all from the seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgebudget.events import Emit
from edgebudget.program import Context, Note, Program
from edgebudget.train import (
    Caller,
    TensorData,
    Tensors,
    bytes_of_sample,
    load_tensors,
    outputs_over,
)
from edgebudget.workload import Dataset, TaskKind

_MEMORY_BYTES = 1e9
_HELD_SAMPLES = 512
_HELD_BYTES = 4e8
_MIRROR_BATCH = 64
_SAME_CLASS = 0.85  # below, mirrored pictures are something else to the original
_SAME_NUMBERS = 0.05
_CROP_PAD = 4  # pixels at most, for pictures of 32 and more


@dataclass(frozen=True, slots=True)
class Feed:
    """Batches by step number, so that a resumed run sees what an uninterrupted one would."""

    dataset: Dataset
    names: tuple[str, ...]
    order: Tensor  # [steps, batch] sample numbers of the data set
    memory: TensorData | None  # the samples in use, where they fit
    rows: dict[int, int]  # sample number -> row of `memory`
    seed: int
    augment: str
    labels: bool

    @staticmethod
    def of(
        dataset: Dataset,
        names: tuple[str, ...],
        indices: Sequence[int],
        *,
        batch: int,
        steps: int,
        seed: int,
        augment: str,
        labels: bool,
        emit: Emit,
    ) -> Feed:
        """Draw the order of all steps, and read the samples it uses once if they fit in memory."""
        order = _order(indices, batch * steps, seed).reshape(steps, batch)
        used = sorted(set(order.flatten().tolist()))
        memory = None
        if len(used) * bytes_of_sample(dataset) <= _MEMORY_BYTES:
            memory = load_tensors(dataset, names, used, emit=emit, work="read training samples")
        rows = {sample: row for row, sample in enumerate(used)}
        return Feed(dataset, names, order, memory, rows, seed, augment, labels)

    def batch(self, step: int) -> TensorData:
        """The samples of one step, augmented."""
        wanted = self.order[step].tolist()
        if self.memory is not None:
            data = self.memory.take(torch.tensor([self.rows[i] for i in wanted]))
        else:
            data = load_tensors(self.dataset, self.names, wanted)
        if not self.labels:
            data = TensorData(data.inputs, None)
        if self.augment == "none":
            return data
        draw = np.random.default_rng([self.seed, 1, step])
        crops = self.augment == "flip-crop"
        inputs = tuple(_moved(x, draw, crops) if x.dim() == 4 else x for x in data.inputs)
        return TensorData(inputs, data.labels)


def _order(indices: Sequence[int], number: int, seed: int) -> Tensor:
    """Permutations of all indices, one after the other, cut to `number`."""
    draw = np.random.default_rng([seed, 0])
    rounds = -(-number // len(indices))
    order = np.concatenate([draw.permutation(np.asarray(indices)) for _ in range(rounds)])
    return torch.from_numpy(order[:number].astype(np.int64))


def _moved(x: Tensor, draw: np.random.Generator, crops: bool) -> Tensor:
    """Mirror half of the pictures [N, C, H, W]; shift each by up to an eighth of its side."""
    mirror = torch.from_numpy(draw.random(len(x)) < 0.5)
    x = torch.where(mirror[:, None, None, None], x.flip(-1), x)
    height, width = x.shape[2:]
    crop = min(_CROP_PAD, height // 8, width // 8)
    if not crops or crop == 0:
        return x
    top, left = (torch.from_numpy(draw.integers(0, 2 * crop + 1, len(x))) for _ in range(2))
    padded = F.pad(x, (crop, crop, crop, crop))
    rows = (top[:, None] + torch.arange(height))[:, None, :, None]
    columns = (left[:, None] + torch.arange(width))[:, None, None, :]
    samples = torch.arange(len(x))[:, None, None, None]
    channels = torch.arange(x.shape[1])[None, :, None, None]
    return padded[samples, channels, rows, columns]


def training_data(ctx: Context) -> tuple[Dataset | None, list[Note]]:
    """What there is to learn from: training data, else calibration data, said in a note."""
    if ctx.data.train is not None and len(ctx.data.train):
        return ctx.data.train, []
    if ctx.data.calibration is not None and len(ctx.data.calibration):
        why = "no training data: expect less recovery than from a larger set"
        return ctx.data.calibration, [Note("data", "trained on calibration samples", why)]
    return None, []


def held_back(
    program: Program, ctx: Context, train: Dataset, most: int = _HELD_SAMPLES
) -> tuple[TensorData, list[int]]:
    """Samples to judge on, and the indices to learn from; both out of the training data.

    Calibration samples would flatter the start: earlier passes were fitted to them.
    """
    room = max(1, int(_HELD_BYTES // max(1, bytes_of_sample(train))))
    count = min(most, room, max(1, len(train) // 8))
    # Drawn, not evenly spaced: a data set may repeat its classes at any even spacing.
    drawn = np.random.default_rng([ctx.seed, 2]).permutation(len(train))
    rows = sorted(int(i) for i in drawn[:count])
    rest = sorted(set(range(len(train))) - set(rows)) or rows
    names = [s.name for s in program.inputs]
    return load_tensors(train, names, rows, emit=ctx.emit, work="read held-back samples"), rest


def mirrors(
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
