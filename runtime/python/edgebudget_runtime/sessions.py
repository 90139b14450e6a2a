"""Loaded segments: opened when first needed, the longest unused one closed when memory is short."""

from __future__ import annotations

import posixpath
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

from edgebudget_runtime import engine, executorch_program, integrity
from edgebudget_runtime.errors import ArtifactError, EdgeBudgetError, UsageError, first_line
from edgebudget_runtime.manifest import File, Manifest, Segment

_RETRY_S = 10.0  # a segment that could not be opened is not tried again sooner


class Sessions:
    """The segments of one artifact, for many threads at once.

    Only opening waits for a lock, one for each segment; a session that is evicted while it runs
    ends its run. A segment's memory is taken to be the bytes of its files.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        *,
        verify: bool,
        providers: Sequence[str],
        options: Mapping[str, str] | None,
        threads: int | None,
        limit_bytes: int | None,
        clock: Callable[[], float] = time.monotonic,
        traces: Path | None = None,
    ) -> None:
        self._folder, self._verify, self._clock = folder, verify, clock
        self._providers, self._options, self._threads = providers, options, threads
        self._limit = limit_bytes
        self._traces = traces  # a folder for the engine's own profiles
        self._manifest = manifest
        self._segments = {s.id: s for s in manifest.segments}
        self._opening = {s.id: Lock() for s in manifest.segments}
        self._open: OrderedDict[str, Any] = OrderedDict()
        self._failed: dict[str, tuple[float, EdgeBudgetError]] = {}
        self._lock = Lock()
        self._closed = False
        self.damaged: Mapping[str, ArtifactError] = self._damaged() if verify else {}
        self.evictions = 0

    def get(self, id: str) -> tuple[Any, bool]:
        """The engine's session of a segment, and whether it had to be opened.

        Raises:
            UsageError: EB174 closed, EB175 a provider is not here, EB186 the segment alone is
                larger than the memory limit.
            ArtifactError: EB502 to EB504 a file is not the one that was compiled, EB509 the
                engine refuses it or finds no memory for it.
        """
        session = self._known(id)
        if session is not None:
            return session, False
        with self._opening[id]:
            session = self._known(id)  # another thread may have opened it meanwhile
            if session is not None:
                return session, True
            try:
                session = self._load(self._segments[id])
            except EdgeBudgetError as e:
                self._remember(id, e)
                raise
            except Exception as e:  # memory and the file system fail in many ways
                error = _unopened(id, e)
                self._remember(id, error)
                raise error from e
            self._keep(id, session)
        return session, True

    @property
    def troubled(self) -> bool:
        """Whether any segment has failed to open."""
        return bool(self.damaged or self._failed)

    @property
    def all_fit(self) -> bool:
        """Whether every segment can be open at once."""
        return self._limit is None or sum(map(self._bytes, self._segments)) <= self._limit

    def failure(self, id: str) -> EdgeBudgetError | None:
        """Why a segment cannot be used now, or None as far as is known."""
        with self._lock:
            return self._why_not(id)

    def close(self) -> None:
        """Drop every session. Runs in progress end normally."""
        with self._lock:
            self._closed = True
            self._open.clear()

    @property
    def open_ids(self) -> tuple[str, ...]:
        """The segments that are loaded, the longest unused one first."""
        with self._lock:
            return tuple(self._open)

    def _known(self, id: str) -> Any:
        with self._lock:
            if self._closed:
                raise UsageError(
                    "EB174", "this runner is closed", hint="open the artifact again with Runner"
                )
            session = self._open.get(id)
            if session is not None:
                self._open.move_to_end(id)
                return session
            error = self._why_not(id)
        if error is not None:
            raise error
        return None

    def _why_not(self, id: str) -> EdgeBudgetError | None:
        if id in self.damaged:
            return _fresh(self.damaged[id])
        if id not in self._failed:
            return None
        when, error = self._failed[id]
        if 0.0 <= self._clock() - when < _RETRY_S:
            return _fresh(error)
        del self._failed[id]
        return None

    def _remember(self, id: str, error: EdgeBudgetError) -> None:
        with self._lock:
            self._failed[id] = (self._clock(), _fresh(error))

    def _keep(self, id: str, session: Any) -> None:
        with self._lock:
            if self._closed:
                return
            self._open[id] = session
            self._evict(keep=id, room=0)

    def _evict(self, keep: str, room: int) -> None:
        """Close the longest unused sessions until the rest and `room` more bytes fit."""
        if self._limit is None:
            return
        for other in list(self._open):
            if sum(map(self._bytes, self._open)) + room <= self._limit:
                return
            if other != keep:
                del self._open[other]
                self.evictions += 1

    def _bytes(self, id: str) -> int:
        return sum(f.bytes for f in self._segments[id].files())

    def _load(self, segment: Segment) -> Any:
        needed = self._bytes(segment.id)
        if self._limit is not None and needed > self._limit:
            raise UsageError(
                "EB186",
                f"segment {segment.id} takes {needed} bytes, more than memory_limit_bytes="
                f"{self._limit}",
                hint=f"allow at least {needed} bytes, or a smaller sub-network",
            )
        with self._lock:
            self._evict(keep="", room=needed)  # before, so that both are never held at once
        session = self._started(segment)
        _check_names(segment, session)
        return session

    def _started(self, segment: Segment) -> Any:
        instead = executorch_program.stand_in(self._manifest, segment)
        if instead is not None:
            return self._started_instead(segment, instead)
        if segment.file.endswith(executorch_program.SUFFIX):
            return self._started_program(segment)
        path = integrity.locate(self._folder, segment.file)
        settings: dict[str, Any] = {
            "providers": self._providers,
            "options": self._options,
            "threads": self._threads,
            "trace": None if self._traces is None else self._traces / segment.id,
            "exact": self._manifest.target.engine != engine.CPU_TARGET,
        }
        if self._providers[0] != engine.CPU:  # a compiled context finds its files by its own path
            if self._verify:
                for file in segment.files():
                    integrity.check(self._folder, file)
            return engine.open_session(path, **settings)
        model, *extra = (
            integrity.read(self._folder, f, verify=self._verify) for f in segment.files()
        )
        base = posixpath.dirname(segment.file)
        names = [posixpath.relpath(f.file, base) for f in segment.extra]
        weights = dict(zip(names, extra, strict=True))
        return engine.open_session(path, model=model, weights=weights, **settings)

    def _started_instead(self, segment: Segment, graph: File) -> Any:
        """The graph that a device's file was made of, in the CPU engine."""
        if self._providers[0] != engine.CPU:
            raise UsageError(
                "EB175",
                f"{segment.file} needs its device; only the CPU engine can stand in, not "
                f"{self._providers[0]!r}",
                hint="leave providers out",
            )
        model = integrity.read(self._folder, graph, verify=self._verify)
        path = integrity.locate(self._folder, graph.file)
        return engine.open_session(
            path, model=model, providers=self._providers, threads=self._threads, exact=True
        )

    def _started_program(self, segment: Segment) -> Any:
        if self._providers[0] != engine.CPU:
            raise UsageError(
                "EB175",
                f"{segment.file} runs in ExecuTorch, which has no provider {self._providers[0]!r}",
                hint="leave providers out",
            )
        file, *_ = segment.files()
        data = integrity.read(self._folder, file, verify=self._verify)
        return executorch_program.open_program(data, segment, self._threads)

    def _damaged(self) -> dict[str, ArtifactError]:
        """Segments with a file that is not the one that was compiled."""
        found: dict[File, ArtifactError | None] = {}
        for segment in self._segments.values():
            for file in segment.files():
                if file not in found:
                    found[file] = _problem(self._folder, file)
        errors = {
            s.id: next((e for f in s.files() if (e := found[f]) is not None), None)
            for s in self._segments.values()
        }
        return {id: e for id, e in errors.items() if e is not None}


def _unopened(id: str, e: Exception) -> ArtifactError:
    return ArtifactError(
        "EB509",
        f"segment {id} cannot be opened: {type(e).__name__} {first_line(e)}",
        hint="free memory, or give a smaller budget so that a smaller sub-network is chosen",
    )


def _fresh(e: EdgeBudgetError) -> EdgeBudgetError:
    """The same error without the frames that raised it, which would keep the model's bytes."""
    return type(e)(e.code, e.what, hint=e.hint)


def _problem(folder: Path, file: File) -> ArtifactError | None:
    try:
        integrity.check(folder, file)
    except ArtifactError as e:
        return e
    return None


def _check_names(segment: Segment, session: Any) -> None:
    for kind, described, found in (
        ("inputs", segment.inputs, session.get_inputs()),
        ("outputs", segment.outputs, session.get_outputs()),
    ):
        if {t.name for t in described} != {f.name for f in found}:
            raise ArtifactError(
                "EB509",
                f"{segment.file} has the {kind} {', '.join(f.name for f in found)}, "
                f"manifest.json says {', '.join(t.name for t in described)}",
                hint="the artifact is damaged or was changed; compile again",
            )
