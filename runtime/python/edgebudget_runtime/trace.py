"""Requests over time as JSON lines: what was asked, what the device was like, what was done.

The first line is {"schema": 1, "kind": "edgebudget trace"}; each further line is one `Request`,
with the fields that are known. A trace of a real application can be replayed with
`edgebudget simulate`, and a made one has the same form.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, BinaryIO

from edgebudget_runtime import codec
from edgebudget_runtime.errors import ArtifactError, UsageError

SCHEMA = 1
KIND = "edgebudget trace"
MOST_REQUESTS = 5_000_000
_LONGEST_LINE = 65_536
_HINT = "give a file that a Runner or `edgebudget simulate --make` wrote"


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """What a runner did for a request."""

    ran: tuple[str, ...]  # segments
    latency_ms: float
    energy_mj: float | None = None
    broke: tuple[str, ...] = ()  # resources
    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request. Mappings may name some sub-networks or segments only."""

    at_s: float  # since the trace began
    input: str = ""
    latency_ms: float | None = None  # the deadline, from the arrival
    energy_mj: float | None = None  # the allowance
    slowdown: float = 1.0  # of the device at that time: 2 where everything takes twice as long
    quality: Mapping[str, float] = field(default_factory=dict)  # sub-network -> of its answer
    confidence: Mapping[str, float] = field(default_factory=dict)  # segment -> its exit's signal
    done: Done | None = None

    def __post_init__(self) -> None:
        if not self.at_s >= 0:
            raise ValueError("a time of 0 s or more")
        if not 1e-3 <= self.slowdown <= 1e3:
            raise ValueError("a slowdown from 0.001 to 1000")
        for limit in (self.latency_ms, self.energy_mj):
            if limit is not None and not limit >= 0:
                raise ValueError("limits of 0 or more")


_DEFAULTS = {
    f.name: codec.encode(codec.hints(Request)[f.name], getattr(Request(at_s=0.0), f.name))
    for f in fields(Request)
}
_DONE_DEFAULTS: dict[str, Any] = {"energy_mj": None, "broke": [], "why": ""}


def line(request: Request) -> bytes:
    """One line of a trace, without what says nothing.

    Raises:
        ValueError: a number is NaN or infinite.
    """
    plain: dict[str, Any] = codec.encode(Request, request)
    kept = {k: v for k, v in plain.items() if k == "at_s" or v != _DEFAULTS[k]}
    return json.dumps(kept, separators=(",", ":"), allow_nan=False).encode("ascii") + b"\n"


def read(file: Path) -> Iterator[Request]:
    """The requests of a trace, in order, one at a time.

    Raises:
        UsageError: EB183 the file cannot be opened.
        ArtifactError: EB582 a line is not what it must be, or there are too many of them.
    """
    try:
        with file.open("rb") as f:
            yield from _requests(f, file)
    except OSError as e:
        raise UsageError(
            "EB183", f"the trace {file} cannot be read: {e.strerror or e}", hint=_HINT
        ) from e


class Writer:
    """Appends requests to a trace. One writer may serve many threads.

    A trace never makes a request fail: what cannot be written, or would make the file longer
    than `most_bytes`, is dropped and counted.

    Raises:
        UsageError: EB183 the file cannot be made.
    """

    def __init__(self, file: Path, *, most_bytes: int = 100_000_000) -> None:
        header = json.dumps({"schema": SCHEMA, "kind": KIND}).encode("ascii") + b"\n"
        self.dropped = 0
        self._lock = Lock()
        self._left = most_bytes - len(header)
        try:
            self._file: BinaryIO = file.open("wb")
            self._file.write(header)
        except OSError as e:
            raise UsageError(
                "EB183",
                f"the trace {file} cannot be written: {e.strerror or e}",
                hint="name another",
            ) from e

    def write(self, request: Request) -> None:
        """Append one request."""
        with self._lock:
            try:
                text = line(request)
                if len(text) > min(self._left, _LONGEST_LINE):
                    raise ValueError("too long")
                self._file.write(text)
                self._left -= len(text)
            except (OSError, ValueError):  # also: the file is closed, a figure is infinite
                self.dropped += 1

    def close(self) -> None:
        """Write what is still in memory."""
        with self._lock:
            try:
                self._file.close()
            except OSError:
                self.dropped += 1

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Counters:
    """What has happened so far, in numbers that grow with nothing. For many threads."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._counts: Counter[str] = Counter()

    def add(self, name: str, count: int = 1) -> None:
        """Count something else."""
        with self._lock:
            self._counts[name] += count

    def add_done(self, ran: Sequence[str], broke: Sequence[str], *, degraded: bool = False) -> None:
        """Count one answered request, the segments that ran for it, and the limits it broke."""
        with self._lock:
            self._counts["requests"] += 1
            self._counts["ran " + "+".join(ran)] += 1
            for resource in broke:
                self._counts["broke " + resource] += 1
            if degraded:
                self._counts["degraded"] += 1

    def counts(self) -> dict[str, int]:
        """A copy, sorted by name."""
        with self._lock:
            return dict(sorted(self._counts.items()))


def _requests(f: BinaryIO, file: Path) -> Iterator[Request]:
    _check_header(f.readline(_LONGEST_LINE + 1), file)
    last_s, number = 0.0, 1
    while text := f.readline(_LONGEST_LINE + 1):
        number += 1
        if number - 1 > MOST_REQUESTS:
            raise _wrong(file, number, f"more than {MOST_REQUESTS} requests")
        if len(text) > _LONGEST_LINE:
            raise _wrong(file, number, f"longer than {_LONGEST_LINE} bytes")
        request = _request(text, file, number)
        if request.at_s < last_s:
            raise _wrong(file, number, f"at_s {request.at_s:g} is before the line above")
        last_s = request.at_s
        yield request


def _request(text: bytes, file: Path, number: int) -> Request:
    raw = _object(text, file, number)
    done = raw.get("done")
    if isinstance(done, dict):
        raw["done"] = {**_DONE_DEFAULTS, **done}
    defaults = {k: v for k, v in _DEFAULTS.items() if k != "at_s"}
    try:
        request: Request = codec.decode(Request, {**defaults, **raw})
    except ArtifactError as e:
        raise _wrong(file, number, e.what.removeprefix("manifest.json ")) from None
    return request


def _check_header(text: bytes, file: Path) -> None:
    raw = _object(text, file, 1)
    if raw != {"schema": SCHEMA, "kind": KIND}:
        raise _wrong(file, 1, f"not the header of a trace of schema {SCHEMA}")


def _object(text: bytes, file: Path, number: int) -> dict[str, Any]:
    try:
        raw = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError):
        raise _wrong(file, number, "not JSON") from None
    if not isinstance(raw, dict):
        raise _wrong(file, number, "not a JSON object")
    return raw


def _wrong(file: Path, number: int, what: str) -> ArtifactError:
    return ArtifactError("EB582", f"{file} line {number}: {what}", hint=_HINT)
