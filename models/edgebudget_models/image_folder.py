"""Folders of labelled pictures: `root/{train,test}/<class>/*` or `root/<class>/*`."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from edgebudget_models.entry import Array, Split

CALIBRATION_COUNT = 512
_EVALUATION_FROM = 0.8
_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp"})
_TEST_FOLDERS = ("test", "val", "validation")
_CACHE_BYTES = 1 << 30
_SEED = "edgebudget-image-folder-1"


@dataclass(frozen=True, slots=True)
class PictureRecipe:
    """From a decoded picture to a network's input: resize, centre crop, scale, normalise."""

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def resized(self, picture: Image.Image) -> Array:
        """uint8 [size, size, 3]."""
        picture = picture.convert("RGB")
        short = min(picture.size)
        if short != self.size:
            width, height = (max(self.size, round(s * self.size / short)) for s in picture.size)
            picture = picture.resize((width, height), Image.Resampling.BILINEAR)
        left, top = ((s - self.size) // 2 for s in picture.size)
        return np.asarray(picture.crop((left, top, left + self.size, top + self.size)))

    def normalised(self, picture: Array) -> Array:
        """uint8 [..., 3] -> float32 with channels first: [..., 3, H, W]."""
        mean: Array = np.array(self.mean, np.float32)
        std: Array = np.array(self.std, np.float32)
        scaled = (picture.astype(np.float32) / np.float32(255) - mean) / std
        return np.ascontiguousarray(np.moveaxis(scaled, -1, -3))


class FolderData:
    """One split of a folder of pictures; read on first use, decoded pictures kept in memory.

    Pictures that cannot be read are left out and counted in `skipped`. A folder that leaves no
    picture, or pictures of one class only, raises ValueError. `kept_back` is how many training
    pictures are for calibration.
    """

    def __init__(
        self,
        root: Path,
        split: Split,
        classes: tuple[str, ...],
        recipe: PictureRecipe,
        kept_back: int = CALIBRATION_COUNT,
    ) -> None:
        self.name = f"{root.name}/{split}"
        self.recipe = recipe
        self._root = root
        self._listed = list_split(root, split, classes, kept_back)

    def __len__(self) -> int:
        return len(self._readable)

    @property
    def skipped(self) -> int:
        """How many pictures could not be read."""
        return len(self._listed) - len(self._readable)

    def sample(self, index: int) -> tuple[dict[str, Array], Array | None]:
        """The picture as [3, size, size] under "image", and its class."""
        item = self._readable[index]
        picture = self._pictures.get(item.path)
        if picture is None:
            picture = self.recipe.resized(Image.open(io.BytesIO(item.path.read_bytes())))
        return {"image": self.recipe.normalised(picture)}, np.asarray(item.label, np.int64)

    def raw(self) -> tuple[Array, Array]:
        """All pictures uint8 [N, H, W, 3] and labels int64 [N], for training in one piece."""
        pictures = [
            self._pictures[i.path]
            if i.path in self._pictures
            else self.recipe.resized(Image.open(i.path))
            for i in self._readable
        ]
        return np.stack(pictures), np.asarray([i.label for i in self._readable], np.int64)

    def digest(self) -> str:
        """SHA-256 over names, bytes, labels and pre-processing."""
        total = hashlib.sha256(repr(self.recipe).encode())
        for item in self._readable:
            name = item.path.relative_to(self._root).as_posix()
            total.update(f"{name}\0{item.label}\0{item.sha256}\0".encode())
        return total.hexdigest()

    @cached_property
    def _scan(self) -> tuple[tuple[_Item, ...], dict[Path, Array]]:
        items: list[_Item] = []
        pictures: dict[Path, Array] = {}
        room = _CACHE_BYTES
        with ThreadPoolExecutor(4) as pool:
            for item in pool.map(partial(_read, recipe=self.recipe), self._listed, chunksize=64):
                if item is None:
                    continue
                found, picture = item
                items.append(found)
                if picture.nbytes <= room:
                    room -= picture.nbytes
                    pictures[found.path] = picture
        labels = {i.label for i in items}
        if len(labels) < 2:
            raise ValueError(
                f"{self._root}: {len(items)} readable pictures of {len(labels)} classes in the "
                f"{self.name} split ({len(self._listed) - len(items)} unreadable); "
                "needed at least two classes"
            )
        return tuple(items), pictures

    @property
    def _readable(self) -> tuple[_Item, ...]:
        return self._scan[0]

    @property
    def _pictures(self) -> dict[Path, Array]:
        return self._scan[1]


@dataclass(frozen=True, slots=True)
class _Item:
    path: Path
    label: int
    sha256: str


def list_split(
    root: Path, split: Split, classes: tuple[str, ...], kept_back: int = CALIBRATION_COUNT
) -> list[tuple[Path, int]]:
    """The files of a split with their labels, in a fixed order.

    With `train` and `test` folders, evaluation is `test`, and calibration (`kept_back` pictures)
    is taken out of `train`; without, each file falls into a split by the hash of its name
    (20 % evaluation). A larger `kept_back` keeps the same pictures back and more.
    """
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder")
    test = next((root / n for n in _TEST_FOLDERS if (root / n).is_dir()), None)
    if test is not None and (root / "train").is_dir():
        if split == "evaluation":
            return _some(test, list(_labelled(test, classes)))
        pool = list(_labelled(root / "train", classes))
        return _some(root, _part_of_training(pool, root / "train", split, kept_back))
    everything = list(_labelled(root, classes))
    if split == "evaluation":
        return _some(root, [i for i in everything if _draw(i[0], root) >= _EVALUATION_FROM])
    rest = [i for i in everything if _draw(i[0], root) < _EVALUATION_FROM]
    return _some(root, _part_of_training(rest, root, split, kept_back))


def _part_of_training(
    pool: list[tuple[Path, int]], root: Path, split: Split, kept_back: int
) -> list[tuple[Path, int]]:
    by_draw = sorted(pool, key=lambda item: _draw(item[0], root))
    # Small folders keep most pictures for training.
    count = min(kept_back, max(1, len(pool) // 4)) if pool else 0
    return sorted(by_draw[:count] if split == "calibration" else by_draw[count:])


def _labelled(folder: Path, classes: tuple[str, ...]) -> Iterator[tuple[Path, int]]:
    found = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    unknown = [name for name in found if name not in classes]
    if unknown:
        raise ValueError(f"{folder}: class folder {unknown[0]!r} is none of {', '.join(classes)}")
    for name in found:
        for path in sorted((folder / name).rglob("*")):
            if path.suffix.lower() in _SUFFIXES and path.is_file():
                yield path, classes.index(name)


def _some(root: Path, items: list[tuple[Path, int]]) -> list[tuple[Path, int]]:
    if not items:
        raise ValueError(f"{root}: no pictures ({', '.join(sorted(_SUFFIXES))}) in class folders")
    return items


def _draw(path: Path, root: Path) -> float:
    """A number in [0, 1) that depends only on the file's name inside `root`."""
    name = f"{_SEED}/{path.relative_to(root).as_posix()}"
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48


def _read(listed: tuple[Path, int], recipe: PictureRecipe) -> tuple[_Item, Array] | None:
    path, label = listed
    try:
        data = path.read_bytes()
        picture = recipe.resized(Image.open(io.BytesIO(data)))
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError):
        return None
    return _Item(path, label, hashlib.sha256(data).hexdigest()), picture
