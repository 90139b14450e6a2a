"""Results of finished steps, kept by the content of what produced them."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgebudget.events import Emit, Said, ignore
from edgebudget_runtime.errors import ArtifactError, UsageError
from edgebudget_runtime.integrity import sha256
from edgebudget_runtime.profile import cache_folder

_LAYOUT = "v1"
_INDEX = "entry.json"
_SUFFIXES = {".safetensors", ".onnx", ".json", ".bin", ".data"}  # never a format that runs code


@dataclass(frozen=True, slots=True)
class Entry:
    """One kept result."""

    key: str
    bytes: int
    used: float  # seconds since the epoch, of the last read or write


def key(parts: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON of everything that a result depends on."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


class Cache:
    """A folder of results. Several processes may use it at once.

    A cache never makes a compile fail: what cannot be read is a miss, what cannot be written
    is not kept, and both are said.
    """

    def __init__(self, folder: Path | None = None, emit: Emit = ignore) -> None:
        self.folder = (folder or cache_folder()) / _LAYOUT
        self._emit = emit
        self._lock: int | None = None
        self._work: dict[str, tuple[Path, int]] = {}  # key -> folder, handle that locks it
        self._scratch: list[tempfile.TemporaryDirectory[str]] = []  # work that cannot be kept
        self._writable = True

    def get(self, key: str) -> Path | None:
        """The folder kept under `key`, every file of it checked; None when there is none."""
        entry = self._entry(key)
        if not entry.is_dir() or not self._share():
            return None
        why = _damage(entry)
        if why:
            self._say(f"cache entry {key[:12]} is damaged ({why}); the step runs again")
            with suppress(OSError):
                self._drop(entry)
            return None
        with suppress(OSError):
            os.utime(entry / _INDEX)
        return entry

    def put(self, key: str, write: Callable[[Path], None]) -> Path | None:
        """Let `write` fill a folder and keep it; None when the cache cannot be written."""
        if not self._writable or not self._share():
            return None
        temporary: Path | None = None
        try:
            temporary = Path(tempfile.mkdtemp(dir=self._made(self.folder / "tmp")))
            write(temporary)
            _index(temporary)
            entry = self._entry(key)
            self._made(entry.parent)
            with suppress(FileExistsError):  # another process kept the same result first
                _rename(temporary, entry)
            return entry
        except OSError as e:
            self._writable = False
            self._say(f"nothing is cached: {self.folder}: {e.strerror or e}")
            return None
        finally:
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)

    def workdir(self, key: str) -> Path:
        """A folder for the checkpoints of the step `key`, found again after a kill.

        No other process is given it meanwhile. `done` removes it.
        """
        if key in self._work:
            return self._work[key][0]
        number = 0
        while self._writable and self._share():
            folder = self.folder / "work" / (f"{key}-{number}" if number else key)
            try:
                handle = os.open(self._made(folder), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except OSError as e:
                self._writable = False
                self._say(f"checkpoints are not kept: {folder.parent}: {e.strerror}")
                break
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # the same step runs in another process
                os.close(handle)
                number += 1
                continue
            self._work[key] = (folder, handle)
            return folder
        scratch = tempfile.TemporaryDirectory(prefix="edgebudget-work-", ignore_cleanup_errors=True)
        self._scratch.append(scratch)
        return Path(scratch.name)

    def done(self, key: str) -> None:
        """Forget the checkpoints of a finished step."""
        if key in self._work:
            folder, handle = self._work.pop(key)
            shutil.rmtree(folder, ignore_errors=True)
            os.close(handle)

    def ls(self) -> list[Entry]:
        """Every entry, the least recently used first."""
        found = []
        for folder in self.folder.glob("[0-9a-f][0-9a-f]/*"):
            with suppress(OSError):  # another process removed it meanwhile
                size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
                found.append(Entry(folder.name, size, (folder / _INDEX).stat().st_mtime))
        return sorted(found, key=lambda e: (e.used, e.key))

    def gc(
        self, *, max_bytes: int | None = None, older_than_s: float | None = None
    ) -> tuple[Entry, ...]:
        """Remove entries unused for `older_than_s`, then the oldest until `max_bytes` are left.

        What killed compiles left behind goes too, their checkpoints included.

        Raises:
            UsageError: EB123 a compile is using this cache.
            ArtifactError: EB505 the cache cannot be written.
        """
        self.close()
        if not self.folder.is_dir():
            return ()
        try:
            self._lock = self._take(fcntl.LOCK_EX)
            shutil.rmtree(self.folder / "tmp", ignore_errors=True)
            shutil.rmtree(self.folder / "work", ignore_errors=True)
            doomed = tuple(_doomed(self.ls(), max_bytes, older_than_s))
            for entry in doomed:
                self._drop(self._entry(entry.key))
            return doomed
        except BlockingIOError:
            raise UsageError(
                "EB123", f"a compile is using {self.folder}", hint="wait for it to end"
            ) from None
        except OSError as e:
            raise ArtifactError(
                "EB505",
                f"{self.folder} cannot be cleaned: {e.strerror}",
                hint="check who owns the folder, or set EDGEBUDGET_CACHE",
            ) from e
        finally:
            self.close()

    def close(self) -> None:
        """Let `gc` of other processes go ahead, and give the work folders back."""
        for _, handle in self._work.values():
            os.close(handle)
        self._work.clear()
        for scratch in self._scratch:
            scratch.cleanup()
        self._scratch.clear()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _entry(self, key: str) -> Path:
        return self.folder / key[:2] / key

    def _share(self) -> bool:
        """Hold the cache's lock with the other users, so that no `gc` runs under them."""
        if self._lock is None:
            try:
                self._lock = self._take(fcntl.LOCK_SH)
            except BlockingIOError:
                return False  # a gc is running: carry on without the cache
            except OSError as e:
                self._writable = False
                self._say(f"the cache is not used: {self.folder}: {e.strerror}")
                return False
        return True

    def _take(self, kind: int) -> int:
        path = self._made(self.folder) / "lock"
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, kind | fcntl.LOCK_NB)
        except OSError:
            os.close(handle)
            raise
        return handle

    def _drop(self, entry: Path) -> None:
        """Take an entry out of sight in one step, then delete it."""
        aside = Path(tempfile.mkdtemp(dir=self._made(self.folder / "tmp")))
        entry.rename(aside / entry.name)
        shutil.rmtree(aside, ignore_errors=True)

    def _made(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _say(self, text: str) -> None:
        self._emit(Said("warning", text))


def _index(folder: Path) -> None:
    files = sorted(f for f in folder.rglob("*") if f.is_file())
    for f in files:
        if f.suffix not in _SUFFIXES:
            raise ValueError(f"{f.name}: only {', '.join(sorted(_SUFFIXES))} may be cached")
    hashes = {f.relative_to(folder).as_posix(): sha256(f) for f in files}
    (folder / _INDEX).write_text(json.dumps({"files": hashes}, sort_keys=True) + "\n")


def _damage(entry: Path) -> str:
    """Why an entry cannot be trusted; empty when it can."""
    try:
        files = json.loads((entry / _INDEX).read_text(encoding="utf-8"))["files"]
        for name, expected in files.items():
            if sha256(entry / name) != expected:
                return f"{name} differs"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        return f"{type(e).__name__}: {e}"
    return ""


def _rename(source: Path, target: Path) -> None:
    try:
        source.rename(target)
    except OSError as e:
        if target.is_dir():
            raise FileExistsError(*e.args) from e
        raise


def _doomed(
    entries: list[Entry], max_bytes: int | None, older_than_s: float | None
) -> Iterator[Entry]:
    now, total = time.time(), sum(e.bytes for e in entries)
    for e in entries:
        old = older_than_s is not None and now - e.used > older_than_s
        if old or (max_bytes is not None and total > max_bytes):
            total -= e.bytes
            yield e
