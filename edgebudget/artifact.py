"""Writing an artifact: aside, synced, renamed. A half-written one never has the final name."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edgebudget_runtime import integrity
from edgebudget_runtime.errors import ArtifactError, UsageError
from edgebudget_runtime.manifest import Manifest

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DENIED = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EEXIST}


@contextmanager
def writing(out: Path, *, force: bool = False) -> Iterator[Path]:
    """Give a temporary folder beside `out`; when the block ends well it becomes `out`.

    Enter it before the expensive work: it finds out at once whether `out` can be written, and
    keeps other compiles away from it. The block leaves a whole artifact in the folder, whose
    files are checked against its manifest before the rename. When the block raises, `out`
    stays as it was.

    Raises:
        UsageError: EB120 another compile is writing `out`, EB121 `out` is something else than
            an artifact, EB122 `out` is an artifact and `force` is not set.
        ArtifactError: EB505 the place cannot be written, EB506 the disk is full.
    """
    out = out.resolve()
    with _mapped(out), _locked(out):
        _restore(out)
        _refuse(out, force)
        temporary = Path(tempfile.mkdtemp(prefix=_prefix(out), dir=out.parent))
        try:
            temporary.chmod(0o755)  # mkdtemp makes it private; the artifact is not
            yield temporary
            integrity.verify(temporary, Manifest.load(temporary))
            _sync(temporary)
            _move_in(temporary, out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def is_artifact(folder: Path) -> bool:
    """Whether a folder holds a readable manifest, of whatever schema version."""
    try:
        Manifest.load(folder)
    except ArtifactError as e:
        return e.code == "EB501"
    return True


def _refuse(out: Path, force: bool) -> None:
    if not out.exists():
        return
    if not out.is_dir() or (any(out.iterdir()) and not is_artifact(out)):
        raise UsageError(
            "EB121",
            f"{out} exists and is not an edgebudget artifact",
            hint="give --out a new folder, or remove this one yourself",
        )
    if any(out.iterdir()) and not force:
        raise UsageError(
            "EB122",
            f"{out} already holds an artifact",
            hint="add --force to replace it, or give --out a new folder",
        )


def _move_in(temporary: Path, out: Path) -> None:
    """Rename into place; an older artifact is renamed aside first and deleted last."""
    old = _aside(out)
    if out.exists():
        out.rename(old)
    temporary.rename(out)
    _sync_folder(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def _restore(out: Path) -> None:
    """Clear what a killed compile left behind. Only the holder of the lock may do this."""
    old = _aside(out)
    if old.exists() and not out.exists():
        old.rename(out)  # killed between the two renames: the older artifact is still whole
    for stale in out.parent.glob(f"{_escaped(_prefix(out))}*"):
        shutil.rmtree(stale, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold the lock of `out`. The system drops it when the process dies, however it dies."""
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = out.parent / f".{out.name}.edgebudget-lock"
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _same(handle, lock):
                break
        except BlockingIOError:
            os.close(handle)
            raise UsageError(
                "EB120",
                f"another compile is writing {out}",
                hint="wait for it to end, or give --out another folder",
            ) from None
        os.close(handle)  # its last holder deleted it between our open and our lock
    try:
        yield
    finally:
        with suppress(OSError):
            lock.unlink()
        os.close(handle)


def _same(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def _mapped(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        error = explained(e, out)
        if error is None:
            raise
        raise error from e


def explained(e: OSError, out: Path) -> ArtifactError | None:
    """The typed error for a failure to write near `out`; None when it is about something else."""
    if e.errno in _FULL:
        where = next(p for p in (out, *out.parents) if p.exists())
        free = shutil.disk_usage(where).free
        return ArtifactError(
            "EB506",
            f"{out}: {e.strerror}; {free / 1e6:.1f} MB are free there",
            hint="free some space, or give --out a folder on another disk",
        )
    if isinstance(e.filename, str) and _refused(e.errno, Path(e.filename), out):
        return ArtifactError(
            "EB505",
            f"{e.filename} cannot be written: {e.strerror}",
            hint="give --out a folder that you may write to",
        )
    return None


def _refused(number: int | None, path: Path, out: Path) -> bool:
    """Whether `path` is one that writing `out` creates, or above it, and was not allowed."""
    lock = out.parent / f".{out.name}.edgebudget-lock"
    if number == errno.ENOENT and (path == lock or path in out.parents):
        return True  # a file system that takes no files or folders
    if number not in _DENIED:
        return False
    if path == out or path in out.parents:
        return True
    inside = path.relative_to(out.parent).parts if path.is_relative_to(out.parent) else ("",)
    return inside[0].startswith((out.name, f".{out.name}.edgebudget-"))


def _prefix(out: Path) -> str:
    return f".{out.name}.edgebudget-tmp-"


def _aside(out: Path) -> Path:
    return out.parent / f".{out.name}.edgebudget-old"


def _escaped(text: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in text)


def _sync(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        else:
            _sync_folder(path)
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
