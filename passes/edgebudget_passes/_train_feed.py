"""The batches of a training run: which samples, in which order, turned how; all from the seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from edgebudget.events import Emit
from edgebudget.train import TensorData, bytes_of_sample, load_tensors
from edgebudget.workload import Dataset

_MEMORY_BYTES = 1e9
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
