"""The artifact's table of contents and its proof. Written by the compiler, read everywhere."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from edgebudget_runtime import codec
from edgebudget_runtime.budget import Statistic
from edgebudget_runtime.cost import Cost, Figure, Resource
from edgebudget_runtime.elastic import Certificate, Exit, OperatingPoint, Sharing
from edgebudget_runtime.errors import ArtifactError
from edgebudget_runtime.quality import Quality

# One import for whoever reads or writes manifests.
__all__ = [
    "Baseline",
    "Candidate",
    "Certificate",
    "Exit",
    "FallbackNode",
    "File",
    "Layer",
    "Manifest",
    "Note",
    "OperatingPoint",
    "PassEntry",
    "Placement",
    "ProvenLimit",
    "ProvenQuality",
    "Provenance",
    "Quality",
    "Segment",
    "Sharing",
    "SubNetwork",
    "TargetInfo",
    "Tensor",
    "WorkloadInfo",
]
SCHEMA = 1
FILE = "manifest.json"
MAX_BYTES = 16_000_000
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_AGAIN = "the artifact is damaged; copy it again or compile again"


@dataclass(frozen=True, slots=True)
class Tensor:
    """An input or output. None in a shape is a size the caller chooses; dtypes are numpy's."""

    name: str
    shape: tuple[int | None, ...]
    dtype: str

    def __post_init__(self) -> None:
        if any(d is not None and d < 0 for d in self.shape):
            raise ValueError("sizes of 0 or more")


@dataclass(frozen=True, slots=True)
class File:
    """A file of the artifact; `file` is relative to the artifact's folder."""

    file: str
    sha256: str
    bytes: int

    def __post_init__(self) -> None:
        _check_file(self.file, self.sha256, self.bytes)


@dataclass(frozen=True, slots=True)
class Segment:
    """One executable file, and files that go with it (a compiled context, shared weights)."""

    id: str
    file: str
    sha256: str
    bytes: int
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    extra: tuple[File, ...] = ()
    macs: float = 0.0  # multiply-accumulates of one run, counted on the file
    max_batch: int = 1  # inputs of the stated shapes that one run may take, stacked

    def __post_init__(self) -> None:
        _check_file(self.file, self.sha256, self.bytes)
        if self.max_batch < 1:
            raise ValueError("a max_batch of 1 or more")

    def files(self) -> tuple[File, ...]:
        """Every file of this segment, the executable first."""
        return (File(self.file, self.sha256, self.bytes), *self.extra)


@dataclass(frozen=True, slots=True)
class SubNetwork:
    """A path through segments, with what it costs and how good it is.

    `choices` says what sets it apart: {"exit": "2 of 5", "width": "0.75", "resolution": "0.8"}.
    """

    id: str
    path: tuple[str, ...]
    cost: Cost
    quality: Quality | None  # None: no labelled evaluation data
    original_quality: Quality | None  # the untouched model on the same data
    choices: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ProvenLimit:
    """One limit that was asked for, and what was found on the exported file."""

    resource: Resource
    bound: float
    statistic: Statistic
    proven: Figure
    holds: bool

    def __post_init__(self) -> None:
        if self.holds and (self.proven.value is None or self.proven.value > self.bound):
            raise ValueError("a limit that holds only where the proven value is within it")


@dataclass(frozen=True, slots=True)
class ProvenQuality:
    """One limit on quality. `value` is the relative drop, or the quality; None: not known."""

    kind: Literal["max_drop", "min_quality"]
    bound: float
    value: float | None
    holds: bool
    how: str = ""

    def __post_init__(self) -> None:
        if self.holds and self.value is None:
            raise ValueError("a limit that holds only where its value is known")


@dataclass(frozen=True, slots=True)
class FallbackNode:
    """A node that does not run on the target's processor, and the engine's reason."""

    name: str
    op: str
    processor: str
    why: str = ""


@dataclass(frozen=True, slots=True)
class Placement:
    """How many nodes run where."""

    processor: str  # the target's own
    counts: Mapping[str, int]  # processor -> nodes
    fallback: tuple[FallbackNode, ...] = ()


@dataclass(frozen=True, slots=True)
class Note:
    """One thing a pass did, or declined to do, and why."""

    where: str
    what: str
    why: str = ""


@dataclass(frozen=True, slots=True)
class PassEntry:
    """What one step of the plan did. Times are left out: equal builds give equal bytes."""

    name: str
    config: Mapping[str, Any]  # plain JSON
    seed: int
    before: Cost
    after: Cost
    did: tuple[Note, ...] = ()
    declined: tuple[Note, ...] = ()
    undone: str = ""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A point the planner looked at: its MACs and its quality on calibration data."""

    label: str
    macs: float
    quality: float | None
    chosen: bool = False


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer's share of the cost, for one input."""

    name: str
    op: str
    macs: float
    params: float
    dtype: str


@dataclass(frozen=True, slots=True)
class TargetInfo:
    """Where the artifact is meant to run."""

    name: str
    engine: str
    device: str


@dataclass(frozen=True, slots=True)
class WorkloadInfo:
    """What was compiled. `digest` is the SHA-256 of the original's weights and structure."""

    model: str
    task: str
    metric: str
    digest: str


@dataclass(frozen=True, slots=True)
class Baseline:
    """The original model on the same target."""

    cost: Cost
    quality: Quality | None = None


@dataclass(frozen=True, slots=True)
class Provenance:
    """What it takes to build the same bytes again."""

    versions: Mapping[str, str]  # package -> version
    seed: int
    data: Mapping[str, str] = field(default_factory=dict)  # role -> SHA-256 of the samples


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """All that an artifact says about itself."""

    name: str
    target: TargetInfo
    workload: WorkloadInfo
    preprocessing: Mapping[str, Any]  # plain JSON, see `edgebudget_runtime.preprocess`
    segments: tuple[Segment, ...]
    subnetworks: tuple[SubNetwork, ...]
    limits: tuple[ProvenLimit, ...]
    quality_limits: tuple[ProvenQuality, ...]
    placement: Placement | None  # None: the engine does not tell
    baseline: Baseline
    passes: tuple[PassEntry, ...]
    candidates: tuple[Candidate, ...]
    layers_before: tuple[Layer, ...]
    layers_after: tuple[Layer, ...]
    provenance: Provenance
    notes: tuple[str, ...] = ()
    exits: tuple[Exit, ...] = ()
    operating_points: tuple[OperatingPoint, ...] = ()
    sharing: Sharing | None = None  # None: a single sub-network
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        ids = [s.id for s in self.segments]
        if len(set(ids)) != len(ids):
            raise ValueError("segments with different ids")
        names = [s.id for s in self.subnetworks]
        if not names or len(set(names)) != len(names):
            raise ValueError("at least one sub-network, with different ids")
        for sub in self.subnetworks:
            if not sub.path or not set(sub.path) <= set(ids):
                raise ValueError(f"sub-network {sub.id!r} to be a path of known segments")
        for exit in self.exits:
            if exit.segment not in ids:
                raise ValueError(f"the exit {exit.segment!r} to be a known segment")
        signals = {e.segment for e in self.exits}
        for point in self.operating_points:
            if not point.path or not set(point.path) <= set(ids):
                raise ValueError(f"operating point {point.id!r} to have a path of known segments")
            if not set(point.thresholds) <= signals & set(point.path):
                raise ValueError(f"operating point {point.id!r} to leave at exits of its path")

    @property
    def holds(self) -> bool:
        """Whether every limit that was asked for is proven."""
        return all(x.holds for x in self.limits) and all(x.holds for x in self.quality_limits)

    def segment(self, id: str) -> Segment:
        """The segment with this id."""
        return next(s for s in self.segments if s.id == id)

    def encode(self) -> bytes:
        """Canonical JSON: equal manifests give equal bytes.

        Raises:
            ValueError: a figure is NaN or infinite.
        """
        plain = codec.encode(Manifest, self)
        text = json.dumps(plain, indent=1, sort_keys=True, allow_nan=False)
        return (text + "\n").encode("ascii")

    def save(self, folder: Path) -> None:
        """Write manifest.json after checking that every runtime will be able to read it back.

        Raises:
            ArtifactError: EB500 or EB507 the manifest is not one that `load` would take.
        """
        data = self.encode()
        Manifest.decode(data)
        (folder / FILE).write_bytes(data)

    @staticmethod
    def decode(data: bytes) -> Manifest:
        """Read a manifest; anything unexpected is refused.

        Raises:
            ArtifactError: EB500 not a JSON object, too large or too deep, EB501 unknown schema,
                EB503 a path leaves the folder, EB507 a field is not what it must be.
        """
        raw = _plain(data)
        schema = raw.get("schema")
        if type(schema) is int and schema != SCHEMA:
            raise ArtifactError(
                "EB501",
                f"manifest.json has schema {schema}, this runtime reads {SCHEMA}",
                hint="install the edgebudget that wrote it, or compile again",
            )
        manifest: Manifest = codec.decode(Manifest, raw)
        return manifest

    @staticmethod
    def load(folder: Path) -> Manifest:
        """Read `folder`/manifest.json. The files it lists are checked by `integrity.verify`.

        Raises:
            ArtifactError: as `decode`, and EB500 there is no readable manifest.json.
        """
        path = folder / FILE
        try:
            with path.open("rb") as f:
                data = f.read(MAX_BYTES + 1)
        except OSError as e:
            raise ArtifactError(
                "EB500",
                f"{path}: {e.strerror or e}",
                hint="give the folder that `edgebudget compile --out` wrote",
            ) from e
        return Manifest.decode(data)


def _plain(data: bytes) -> dict[str, Any]:
    if len(data) > MAX_BYTES:
        raise _unreadable(f"is larger than {MAX_BYTES // 1_000_000} MB")
    try:
        raw = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_no_duplicates,
            parse_constant=_finite,
            parse_float=_finite,
        )
    except UnicodeDecodeError:
        raise _unreadable("is not UTF-8 text") from None
    except RecursionError:
        raise _unreadable("is nested too deeply") from None
    except ValueError as e:
        raise _unreadable(f"is not valid JSON: {e}") from None
    if not isinstance(raw, dict):
        raise _unreadable("is not a JSON object")
    return raw


def _unreadable(what: str) -> ArtifactError:
    return ArtifactError("EB500", f"manifest.json {what}", hint=_AGAIN)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a number")
    return number


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a field appears twice")
    return found


def _check_file(file: str, sha256: str, size: int) -> None:
    parts = file.split("/")
    if not all(_PART.fullmatch(p) for p in parts):
        raise ArtifactError(
            "EB503",
            f"manifest.json names the file {file!r}, which is not a plain relative path",
            hint="do not use this artifact: its files must lie inside its own folder",
        )
    if not _SHA256.fullmatch(sha256):
        raise ValueError("a SHA-256 of 64 hexadecimal digits")
    if size < 0:
        raise ValueError("a size of 0 bytes or more")
