"""Are the files of an artifact the ones its manifest describes?"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from edgebudget_runtime.errors import ArtifactError
from edgebudget_runtime.manifest import File, Manifest

_CHUNK = 1 << 20


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while chunk := f.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def described(folder: Path, path: Path) -> File:
    """What a manifest says about one file of `folder`."""
    return File(path.relative_to(folder).as_posix(), sha256(path), path.stat().st_size)


def locate(folder: Path, file: str) -> Path:
    """The real path of one of the artifact's files.

    Raises:
        ArtifactError: EB503 a symbolic link leads out of the folder, EB504 no such file.
    """
    path = folder / file
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError) as e:  # RuntimeError: links in a circle
        raise ArtifactError(
            "EB504",
            f"{file} is listed in manifest.json but is not there",
            hint="the artifact was copied in part; copy the whole folder again",
        ) from e
    if not real.is_relative_to(folder.resolve()):
        raise ArtifactError(
            "EB503",
            f"{file} is a link that leads out of the artifact",
            hint="do not use this artifact: its files must lie inside its own folder",
        )
    if not real.is_file():
        raise ArtifactError("EB504", f"{file} is not a file", hint="copy the whole folder again")
    return path


def verify(folder: Path, manifest: Manifest) -> None:
    """Check that every file of every segment is there, inside the folder, with its hash.

    Raises:
        ArtifactError: EB502 a file's bytes differ, EB503 a file lies outside the folder,
            EB504 a file is missing.
    """
    for expected in _files(manifest):
        check(folder, expected)


def check(folder: Path, expected: File) -> None:
    """Check that one file is there, inside the folder, with its hash.

    Raises:
        ArtifactError: as `verify`.
    """
    path = locate(folder, expected.file)
    size = path.stat().st_size
    if size != expected.bytes:
        raise _differs(expected.file, f"{size} bytes, not {expected.bytes}")
    _compare(expected, sha256(path))


def read(folder: Path, expected: File, *, verify: bool = True) -> bytes:
    """The bytes of one file, which are the ones that were checked.

    Raises:
        ArtifactError: as `verify`.
    """
    try:
        data = locate(folder, expected.file).read_bytes()
    except OSError as e:
        raise ArtifactError(
            "EB504",
            f"{expected.file} cannot be read: {e.strerror or e}",
            hint="copy the whole folder again",
        ) from e
    if verify:
        _compare(expected, hashlib.sha256(data).hexdigest())
    return data


def _compare(expected: File, found: str) -> None:
    if found != expected.sha256:
        raise _differs(expected.file, f"SHA-256 {found[:12]}…, not {expected.sha256[:12]}…")


def _files(manifest: Manifest) -> Iterator[File]:
    seen: set[File] = set()
    for segment in manifest.segments:
        for file in segment.files():
            if file not in seen:
                seen.add(file)
                yield file


def _differs(file: str, how: str) -> ArtifactError:
    return ArtifactError(
        "EB502",
        f"{file} is not the file that was compiled: {how}",
        hint="the artifact is damaged or was changed; copy it again or compile again",
    )
