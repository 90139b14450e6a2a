"""Times of an artifact's nodes from a file: what `edgebudget profile` or ONNX Runtime wrote."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebudget_runtime.errors import ArtifactError

if TYPE_CHECKING:
    from edgebudget_runtime.manifest import Manifest

_MOST_BYTES = 256_000_000
_KERNEL = "_kernel_time"
# What ONNX Runtime appends to the name of a node that it fused or moved to another layout.
_SUFFIX = re.compile(r"(?:_nchwc|_token_\d+|_fused|_quant)+$")
_AGAIN = "`edgebudget profile ARTIFACT --out FILE` writes one"


@dataclass(frozen=True, slots=True)
class Times:
    """Milliseconds by segment and node, how they were found, and on which processor."""

    ms: Mapping[tuple[str, str], float]
    how: str
    cpu: str = ""  # empty: the file does not say


def read(file: Path, manifest: Manifest, artifact: str) -> Times:
    """Read a profile of this artifact (`artifact`: the SHA-256 of its manifest).

    Raises:
        ArtifactError: EB580 it cannot be read or has no layers, EB581 it is of another artifact.
    """
    try:
        if file.stat().st_size > _MOST_BYTES:
            raise ArtifactError("EB580", f"{file} is larger than 256 MB", hint=_AGAIN)
        found = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as e:
        why = e.strerror if isinstance(e, OSError) and e.strerror else "not JSON"
        raise ArtifactError("EB580", f"{file} cannot be read: {why}", hint=_AGAIN) from e
    try:
        times = _raw(found, manifest) if isinstance(found, list) else _own(found, artifact)
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        what = f"{file} is no profile with layers: {type(e).__name__} {e}"
        raise ArtifactError("EB580", what, hint=_AGAIN) from e
    if not times.ms:
        raise ArtifactError("EB580", f"{file} times no layer", hint=_AGAIN)
    return times


def _own(found: Any, artifact: str) -> Times:
    """What `edgebudget profile` wrote."""
    if found["artifact"] != artifact:
        raise ArtifactError(
            "EB581", "the profile is of another artifact", hint="profile this one again"
        )
    device, layers = found["device"], (found.get("detail") or {}).get("layers") or []
    ms: dict[tuple[str, str], float] = {}
    for layer in layers:
        if layer.get("added"):
            continue  # the engine's own node: the file has none of this name
        key = str(layer["segment"]), str(layer["name"])
        ms[key] = ms.get(key, 0.0) + _positive(layer["ms"])
    cpu = str(device["cpu"])
    threads = device["threads"]
    how = f"ONNX Runtime's profiler on {cpu}, {threads} thread{'s' if threads != 1 else ''}"
    return Times(ms, how, cpu)


def _raw(events: list[Any], manifest: Manifest) -> Times:
    """ONNX Runtime's own file, of an artifact of one segment; the first run is left out."""
    if len(manifest.segments) > 1:
        raise ArtifactError(
            "EB580",
            "ONNX Runtime's profile does not say which of several segments it is of",
            hint=_AGAIN,
        )
    runs: dict[str, list[float]] = {}
    for event in events:
        name = str(event.get("name", ""))
        if event.get("cat") == "Node" and name.endswith(_KERNEL):
            node = _SUFFIX.sub("", name.removesuffix(_KERNEL))
            runs.setdefault(node, []).append(_positive(event["dur"]) / 1e3)
    id = manifest.segments[0].id
    ms = {(id, k): statistics.median(v[1:] or v) for k, v in runs.items()}
    return Times(ms, "ONNX Runtime's profiler, on the device that wrote the file")


def _positive(value: Any) -> float:
    number = float(value)
    if not 0.0 <= number < float("inf"):
        raise ValueError(f"time {value}")
    return number
