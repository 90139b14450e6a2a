"""Distorted photographs with known quality: the data of `uhd-iqa`.

Every sample is a pure function of a photograph and a line of its plan (window, distortions,
seed). Pictures are made when asked for, then kept on disk as uint8 (see `iqa_cache`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from edgebudget_models import iqa_metric, iqa_photos
from edgebudget_models.entry import Array, Split
from edgebudget_models.iqa_cache import PictureCache, default_folder
from edgebudget_models.iqa_distort import KINDS, Distortion, distort
from edgebudget_models.iqa_photos import ENLARGEMENT, GRID, Photo

CROP = 512
_FORMAT = "edgebudget-iqa-2"  # part of every key: change it with anything that changes a pixel
_SEEDS: dict[Split, int] = {"evaluation": 1, "calibration": 2, "train": 3}
# At least so many samples, and at least so many for each photograph.
_COUNTS: dict[Split, tuple[int, int]] = {
    "evaluation": (60, 1),
    "calibration": (24, 1),
    "train": (512, 4),
}
_SLOTS = len(KINDS) + 2  # of eight pictures, six have one distortion and two have two
_PAIR_GRADE = 0.7


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one sample is made of one photograph; `crop` is its corner in grid cells (y, x)."""

    photo: int
    scale: float
    x: float
    y: float
    distortions: tuple[Distortion, ...]
    seed: int
    crop: tuple[int, int] | None


class IqaData:
    """Pictures [3, 2160, 3840] (crops [3, 512, 512] for training) in [0, 1] and qualities."""

    def __init__(
        self,
        name: str,
        photos: Sequence[Photo],
        split: Split,
        cache: PictureCache,
        skipped: int = 0,
    ) -> None:
        self.name = name
        self.skipped = skipped  # photographs that could not be read or are too small
        self.photos = tuple(photos)
        self.recipes = plan(len(photos), split)
        self._cache = cache
        self._recent = lru_cache(maxsize=4)(self._find)
        self._decoded = lru_cache(maxsize=4)(lambda index: self.photos[index].pixels())

    def __len__(self) -> int:
        return len(self.recipes)

    def sample(self, index: int) -> tuple[dict[str, Array], Array | None]:
        """The picture under "image", and its quality in [0, 1]."""
        recipe = self.recipes[index]
        picture, quality = (self._recent if recipe.crop is None else self._make)(index)
        image = np.multiply(picture, np.float32(1 / 255), dtype=np.float32)
        return {"image": image}, np.asarray(quality, np.float32)

    def digest(self) -> str:
        """SHA-256 over the photographs' bytes and the plan."""
        keys = [self._key(index) for index in range(len(self))]
        return hashlib.sha256("\n".join(keys).encode()).hexdigest()

    def _key(self, index: int) -> str:
        recipe = self.recipes[index]
        photo = self.photos[recipe.photo]
        content = [_FORMAT, photo.sha256, asdict(photo.region), asdict(recipe)]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def _find(self, index: int) -> tuple[Array, float]:
        key = self._key(index)
        found = self._cache.get(key)
        if found is None:
            found = self._make(index)
            self._cache.put(key, *found)
        return found

    def _make(self, index: int) -> tuple[Array, float]:
        recipe = self.recipes[index]
        region = self.photos[recipe.photo].region
        window = iqa_photos.grid(
            self._decoded(recipe.photo), region, recipe.scale, recipe.x, recipe.y
        )
        cells = iqa_photos.as_cells(window)
        with torch.no_grad():
            if recipe.crop is None:
                reference = iqa_photos.enlarge(cells)
            else:
                reference = iqa_photos.enlarge_crop(cells, *recipe.crop, CROP, CROP)
            picture = distort(reference, recipe.distortions, recipe.seed)
            quality = iqa_metric.label(reference, picture).item()
        return (picture[0] * 255).round().to(torch.uint8).numpy(), quality


def plan(photos: int, split: Split) -> tuple[Recipe, ...]:
    """The samples of a split of `photos` photographs: kinds in turn, grades spread evenly."""
    rng = np.random.default_rng(_SEEDS[split])
    least, each = _COUNTS[split]
    count = max(least, each * photos)
    order = np.concatenate([rng.permutation(photos) for _ in range(-(-count // photos))])
    rounds = -(-count // _SLOTS)
    grades = np.stack(
        [(rng.permutation(rounds) + rng.random(rounds)) / rounds for _ in range(_SLOTS)]
    )
    recipes = []
    for index in range(count):
        distortions = _draw(index % _SLOTS, float(grades[index % _SLOTS, index // _SLOTS]), rng)
        scale, x, y = float(rng.uniform(0.85, 1.0)), float(rng.random()), float(rng.random())
        crop = None
        if split == "train":
            cells = -(-CROP // ENLARGEMENT)
            crop = (int(rng.integers(GRID[0] - cells + 1)), int(rng.integers(GRID[1] - cells + 1)))
        seed = int(rng.integers(2**31))
        recipes.append(Recipe(int(order[index]), scale, x, y, distortions, seed, crop))
    return tuple(recipes)


def _draw(slot: int, grade: float, rng: np.random.Generator) -> tuple[Distortion, ...]:
    if slot < len(KINDS):
        return (Distortion(KINDS[slot], grade),)
    first, second = rng.choice(len(KINDS), 2, replace=False)
    other = float(rng.random())
    return (
        Distortion(KINDS[first], _PAIR_GRADE * grade),
        Distortion(KINDS[second], _PAIR_GRADE * other),
    )


def iqa_data(split: Split, root: Path | None = None, cache: Path | None = None) -> IqaData:
    """The samples of a split: of the photographs below `root`, or of the built-in ones.

    Raises ValueError for a folder with fewer than three usable photographs.
    """
    pictures = PictureCache(cache or default_folder())
    if root is None:
        return IqaData(f"sample photos/{split}", iqa_photos.builtin(split), split, pictures)
    photos, skipped = iqa_photos.from_folder(root, split)
    return IqaData(f"{root.name}/{split}", photos, split, pictures, skipped)
