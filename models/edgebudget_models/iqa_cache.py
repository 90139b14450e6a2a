"""Made pictures kept on disk, so that a second evaluation need not make them again."""

from __future__ import annotations

import contextlib
import math
import os
import struct
import threading
import zlib
from pathlib import Path

import numpy as np

from edgebudget_models.entry import Array

LIMIT_BYTES = 2_500_000_000
# Magic, three extents, label, CRC-32 of the picture; then the picture, uint8, row by row.
_HEADER = struct.Struct("<8s3IfI")
_MAGIC = b"EBPICT01"


def default_folder() -> Path:
    """`$EDGEBUDGET_CACHE/pictures`, or `~/.cache/edgebudget/pictures`."""
    root = os.environ.get("EDGEBUDGET_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "edgebudget") / "pictures"


class PictureCache:
    """uint8 pictures with their labels by key; the longest unused go when it grows too large.

    It only ever saves work: what cannot be read or written is treated as absent.
    """

    def __init__(self, folder: Path, limit_bytes: int = LIMIT_BYTES) -> None:
        self._folder = folder
        self._limit_bytes = limit_bytes

    def get(self, key: str) -> tuple[Array, float] | None:
        """The picture and label stored under `key`, if they are there and whole."""
        path = self._path(key)
        try:
            with path.open("rb") as file:
                magic, *extents, label, checksum = _HEADER.unpack(file.read(_HEADER.size))
                picture = np.fromfile(file, np.uint8)
            os.utime(path)
        except (OSError, struct.error):
            return None
        whole = magic == _MAGIC and picture.size == math.prod(extents)
        if not whole or zlib.crc32(picture.data) != checksum:
            return None
        return picture.reshape(extents), label

    def put(self, key: str, picture: Array, label: float) -> None:
        """Store a picture [C, H, W]; the name appears only once the file is whole."""
        path = self._path(key)
        aside = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.part")
        header = _HEADER.pack(_MAGIC, *picture.shape, label, zlib.crc32(picture.data))
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._make_room(len(header) + picture.nbytes)
            with aside.open("wb") as file:
                file.write(header)
                picture.tofile(file)
            aside.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.picture"

    def _make_room(self, needed_bytes: int) -> None:
        files = [(s.st_mtime_ns, s.st_size, p) for p in self._folder.iterdir() for s in [p.stat()]]
        excess = sum(size for _, size, _ in files) + needed_bytes - self._limit_bytes
        for _, size, path in sorted(files, key=lambda f: f[0]):
            if excess <= 0:
                return
            path.unlink(missing_ok=True)
            excess -= size
