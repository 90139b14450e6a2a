"""Folders of pictures as data sets, decoded once and kept as bytes."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgebudget.preprocessing import Preprocessing
from edgebudget.workload import Array, Sample
from edgebudget_runtime.errors import ArtifactError

if TYPE_CHECKING:
    from edgebudget.program import TensorSpec

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".gif"})
CACHE_BYTES = 1 << 30  # decoded pictures beyond this are decoded again at every read
_CHUNK = 256  # pictures decoded between two looks at whether there are enough


@dataclass(frozen=True, slots=True)
class _Picture:
    path: Path
    label: int | None
    pixels: Array | None


class FolderDataset:
    """Picture files as samples. They are read at the first use; unreadable ones are skipped."""

    def __init__(
        self,
        name: str,
        root: Path,
        files: Sequence[tuple[Path, int | None]],
        preprocessing: Preprocessing,
        spec: TensorSpec,
        *,
        limit: int | None = None,
    ) -> None:
        """`limit`: stop after this many readable pictures."""
        self.name = name
        self._root, self._files, self._limit = root, tuple(files), limit
        self._how, self._spec = preprocessing, spec

    def __len__(self) -> int:
        return len(self._read[0])

    @property
    def skipped(self) -> int:
        """How many of the pictures looked at could not be read."""
        return len(self._read[1])

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should know about these pictures."""
        bad = self._read[1]
        if not bad:
            return ()
        named = ", ".join(p.relative_to(self._root).as_posix() for p in bad[:3])
        more = ", ..." if len(bad) > 3 else ""
        return (f"{self.name}: skipped {len(bad)} unreadable pictures ({named}{more})",)

    def sample(self, index: int) -> Sample:
        """Picture number `index`, pre-processed, with its class if folders name classes."""
        item = self._read[0][index]
        pixels = item.pixels
        if pixels is None:
            pixels = _decode(item.path.read_bytes(), self._how)
        target = None if item.label is None else np.asarray(item.label, np.int64)
        return Sample({self._spec.name: self._how.tensor(pixels, self._spec.dtype)}, target)

    def digest(self) -> str:
        """SHA-256 over names, bytes, labels and the pre-processing."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        sha = hashlib.sha256(json.dumps(self._how.to_json(), sort_keys=True).encode())
        # A whole folder is known by its bytes; decoding all of it may never be needed.
        files = self._files if self._limit is None else [(p.path, p.label) for p in self._read[0]]
        for path, label in files:
            name = path.relative_to(self._root).as_posix()
            sha.update(f"\0{name}\0{label}\0".encode())
            sha.update(hashlib.sha256(path.read_bytes()).digest())
        return sha.hexdigest()

    @cached_property
    def _read(self) -> tuple[list[_Picture], list[Path]]:
        good: list[_Picture] = []
        bad: list[Path] = []
        room = CACHE_BYTES
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            for start in range(0, len(self._files), _CHUNK):
                if self._limit is not None and len(good) >= self._limit:
                    break
                part = self._files[start : start + _CHUNK]
                for (path, _), found in zip(part, pool.map(self._load, part), strict=True):
                    if found is None:
                        bad.append(path)
                        continue
                    assert found.pixels is not None, "just decoded"
                    room -= found.pixels.nbytes
                    good.append(found if room >= 0 else replace(found, pixels=None))
        if not good:
            raise empty(self._root, f"none of its {len(bad)} pictures can be read")
        return good[: self._limit], bad

    def _load(self, listed: tuple[Path, int | None]) -> _Picture | None:
        path, label = listed
        try:
            pixels = _decode(path.read_bytes(), self._how)
        except Exception:  # image decoders raise a dozen unrelated types on broken files
            return None
        return _Picture(path, label, pixels)


def _decode(data: bytes, how: Preprocessing) -> Array:
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        return how.picture(image)


def pictures_in(folder: Path) -> list[Path]:
    """Picture files anywhere below `folder`, sorted."""
    return sorted(_walk(folder))


def has_pictures(folder: Path) -> bool:
    """Whether there is any picture file below `folder`."""
    return next(_walk(folder), None) is not None


def class_folders(folder: Path) -> list[Path]:
    """Folders directly in `folder` that hold pictures, sorted by name: label 0, 1, ..."""
    found = [p for p in sorted(folder.iterdir()) if p.is_dir() and not p.name.startswith(".")]
    return [p for p in found if has_pictures(p)]


def empty(root: Path, why: str) -> ArtifactError:
    """The error for a folder that yields no sample."""
    return ArtifactError(
        "EB545",
        f"{root}: {why}",
        hint="expected DIR/{train,test}/<class>/*.jpg, DIR/<class>/*.jpg, or DIR/*.jpg",
    )


def _walk(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        if path.suffix.lower() in SUFFIXES and not path.name.startswith("."):
            yield path
