"""Where the photographs of `uhd-iqa` come from, and how a 3840x2160 reference is cut from one.

A reference is a 16:9 window of a photograph, brought to 384x216 (Lanczos) and enlarged ten
times. Going through that grid gives every reference about the same fine detail, whatever the
photograph's own resolution; without it, a soft reference and a blurred one could not be told
apart and the task would have no answer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

from edgebudget_models.entry import Array, Split

GRID = (216, 384)
ENLARGEMENT = 10
_SMALLEST_WINDOW = 192
_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"})
_TRAIN_SHARE, _CALIBRATION_SHARE = 0.7, 0.1


@dataclass(frozen=True, slots=True)
class Region:
    """A rectangle of a photograph in which windows may lie, in pixels."""

    left: int
    top: int
    width: int
    height: int

    @property
    def window_width(self) -> int:
        """The width of the largest 16:9 window."""
        return min(self.width, self.height * 16 // 9)


@dataclass(frozen=True, slots=True)
class Photo:
    """A photograph and the part of it that a split may use."""

    name: str
    sha256: str
    region: Region
    path: Path | None = None  # None: one of scikit-learn's

    def pixels(self) -> Image.Image:
        """The decoded photograph, RGB."""
        if self.path is not None:
            with Image.open(self.path) as image:
                return image.convert("RGB")
        from sklearn.datasets import load_sample_image

        return Image.fromarray(load_sample_image(self.name))


def builtin(split: Split) -> list[Photo]:
    """scikit-learn's two sample photographs (640x427), cut into three parts that do not meet."""
    region = {
        "evaluation": Region(0, 0, 352, 427),
        "calibration": Region(352, 0, 288, 213),
        "train": Region(352, 213, 288, 214),
    }[split]
    photos = []
    for name in ("china.jpg", "flower.jpg"):
        photo = Photo(name, "", region)
        digest = hashlib.sha256(photo.pixels().tobytes()).hexdigest()
        photos.append(Photo(name, digest, region))
    return photos


def from_folder(root: Path, split: Split) -> tuple[list[Photo], int]:
    """The photographs of a split anywhere below `root`, and how many could not be used.

    A photograph's split follows from its file name alone, so that it is the same in every
    folder; only where that leaves a split empty does the nearest photograph move over.
    """
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder")
    usable = []
    listed = list(_list(root))
    for path in listed:
        size = _size(path)
        if size is not None and Region(0, 0, *size).window_width >= _SMALLEST_WINDOW:
            usable.append(path)
    if len(usable) < 3:
        raise ValueError(
            f"{root}: {len(usable)} usable photographs of {len(listed)} files "
            f"({', '.join(sorted(_SUFFIXES))}, at least {_SMALLEST_WINDOW} pixels wide); "
            "needed at least 3, one for each split"
        )
    photos = [_photo(path) for path in _share(usable, split)]
    good = [p for p in photos if p is not None]
    if not good:
        raise ValueError(f"{root}: none of the {len(photos)} photographs for {split} decodes")
    return good, len(listed) - len(usable) + len(photos) - len(good)


def _list(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob("*")):
        if path.suffix.lower() in _SUFFIXES and path.is_file():
            yield path


def _share(paths: list[Path], split: Split) -> list[Path]:
    ranked = sorted((_draw(path.name), path.as_posix(), path) for path in paths)
    train = sum(draw < _TRAIN_SHARE for draw, _, _ in ranked)
    seen = sum(draw < _TRAIN_SHARE + _CALIBRATION_SHARE for draw, _, _ in ranked)
    seen = min(max(seen, 2), len(ranked) - 1)
    train = min(max(train, 1), seen - 1)
    bounds = {
        "train": slice(0, train),
        "calibration": slice(train, seen),
        "evaluation": slice(seen, None),
    }
    return [path for _, _, path in ranked[bounds[split]]]


def _draw(name: str) -> float:
    digest = hashlib.sha256(f"edgebudget-photo-1/{name}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _size(path: Path) -> tuple[int, int] | None:
    try:
        with Image.open(path) as image:
            return image.size
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError):
        return None


def _photo(path: Path) -> Photo | None:
    """The photograph, if it decodes to the end."""
    try:
        with Image.open(path) as image:
            size = image.size
            image.draft("RGB", (GRID[1], GRID[0]))  # a quick look is enough
            image.load()
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError):
        return None
    return Photo(path.name, digest, Region(0, 0, *size), path)


def grid(photo: Image.Image, region: Region, scale: float, x: float, y: float) -> Array:
    """A window of a photograph on the 384x216 grid, uint8 [3, 216, 384].

    The window is `scale` times the largest that fits `region`; `x` and `y` in [0, 1] place it.
    """
    width = max(16, round(region.window_width * scale))
    height = width * 9 // 16
    left = region.left + round(x * (region.width - width))
    top = region.top + round(y * (region.height - height))
    window = photo.crop((left, top, left + width, top + height))
    small = window.resize((GRID[1], GRID[0]), Image.Resampling.LANCZOS)
    return np.ascontiguousarray(np.asarray(small).transpose(2, 0, 1))


def enlarge(cells: Tensor) -> Tensor:
    """uint8 cells of the grid [N, 3, h, w] -> a reference in [0, 1], ten times as wide and high."""
    size = (cells.shape[-2] * ENLARGEMENT, cells.shape[-1] * ENLARGEMENT)
    picture = F.interpolate(cells.float() / 255, size=size, mode="bicubic", antialias=True)
    return (picture.clamp(0, 1) * 255).round() / 255


def enlarge_crop(cells: Tensor, top: int, left: int, height: int, width: int) -> Tensor:
    """`height` x `width` pixels of the reference that `cells` [N, 3, 216, 384] enlarge to.

    `top` and `left` are in cells; four cells around are enlarged too, so that a crop is the
    same as cutting it out of the whole.
    """
    margin = 4
    y0, x0 = max(0, top - margin), max(0, left - margin)
    y1 = top + -(-height // ENLARGEMENT) + margin
    x1 = left + -(-width // ENLARGEMENT) + margin
    picture = enlarge(cells[:, :, y0:y1, x0:x1])
    y, x = (top - y0) * ENLARGEMENT, (left - x0) * ENLARGEMENT
    return picture[:, :, y : y + height, x : x + width].contiguous()


def as_cells(picture: Array) -> Tensor:
    """uint8 [3, h, w] -> [1, 3, h, w]."""
    return torch.from_numpy(picture)[None]
