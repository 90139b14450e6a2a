"""CIFAR-10 pictures as training sees them: numbered views that every network shares.

View `v` of the training set is drawn from a seed on the CPU, so teachers and students can look
at the same pictures in different runs. Each picture is moved, mirrored at random, sometimes loses
a square, sometimes is mixed with another one ("Improved Regularization of Convolutional Neural
Networks with Cutout", DeVries and Taylor, 2017; "mixup: Beyond Empirical Risk Minimization",
Zhang et al., 2018).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from edgebudget_models import cifar
from edgebudget_models.entry import Split
from edgebudget_models.image_folder import FolderData

SIZE = 32  # pixels a side
SHIFT = 4  # pixels at most
SQUARE, WITH_SQUARE = 12, 0.5  # pixels a side, share of the pictures
MIXED = 0.5  # share of the pictures; the greater part is uniform in 0.5 to 1


@dataclass(frozen=True, slots=True)
class Pictures:
    """`pixels` [N, 32, 32, 3], normalised, and `labels` [N]."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, slots=True)
class View:
    """`pixels` [N, 32, 32, 3]; picture i is `share[i]` of itself, the rest is `other[i]`."""

    pixels: Tensor
    other: Tensor
    share: Tensor


def load_pictures(root: Path, split: Split, kept_back: int, device: torch.device) -> Pictures:
    """The pictures of a split; `kept_back` training pictures are the calibration split."""
    data = FolderData(root, split, cifar.CLASSES, cifar.recipe(SIZE), kept_back)
    pixels, labels = data.raw()
    mean, std = (torch.tensor(v, device=device) for v in (cifar.MEAN, cifar.STD))
    scaled = torch.from_numpy(pixels).to(device).float() / 255
    return Pictures((scaled - mean) / std, torch.from_numpy(labels).to(device))


def view(pictures: Pictures, number: int) -> View:
    """View `number` of all pictures, in their order."""
    count, device = len(pictures), pictures.pixels.device
    generator = torch.Generator().manual_seed(number)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator).to(device)

    moved = _moved(pictures.pixels, draw(2, count, 1), draw(count, 1) < 0.5)
    line = torch.arange(SIZE, device=device)
    centre = draw(2, count, 1) * SIZE
    inside = (line - centre).abs() < SQUARE / 2
    square = inside[0][:, :, None] & inside[1][:, None, :]
    square &= (draw(count) < WITH_SQUARE)[:, None, None]
    moved = moved.masked_fill(square[..., None], 0.0)
    other = torch.randperm(count, generator=generator).to(device)
    share = torch.where(draw(count) < MIXED, 0.5 + 0.5 * draw(count), 1.0)
    weight = share[:, None, None, None]
    return View(weight * moved + (1 - weight) * moved[other], other, share)


def targets(pictures: Pictures, seen: View) -> Tensor:
    """Class shares [N, 10] of a view."""
    exact = F.one_hot(pictures.labels, len(cifar.CLASSES)).float()
    share = seen.share[:, None]
    return share * exact + (1 - share) * exact[seen.other]


def _moved(pixels: Tensor, corner: Tensor, mirrored: Tensor) -> Tensor:
    padded = F.pad(pixels, (0, 0, SHIFT, SHIFT, SHIFT, SHIFT))
    line = torch.arange(SIZE, device=pixels.device)
    rows, columns = (corner * (2 * SHIFT + 1)).long() + line
    columns = torch.where(mirrored, columns.flip(1), columns)
    index = torch.arange(len(pixels), device=pixels.device)[:, None, None]
    return padded[index, rows[:, :, None], columns[:, None, :]]
