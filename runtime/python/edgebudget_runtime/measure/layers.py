"""What each node takes: runs of their own under ONNX Runtime's profiler, read from its JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MOST_BYTES = 256_000_000
_KERNEL = "_kernel_time"


@dataclass(frozen=True, slots=True)
class Kernel:
    """One node as the engine runs it, under the engine's own name."""

    name: str
    op: str
    provider: str
    ms: float  # of one run


def read(file: Path) -> list[Kernel]:
    """Every node in the order it ran; the first run, which allocates, is left out.

    The engine writes whole microseconds, too coarse for a median: a time is the mean of the
    middle half of the runs. A file that is cut short or not what was expected gives nothing.
    """
    try:
        if file.stat().st_size > _MOST_BYTES:
            return []
        events = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return []
    return _kernels(events) if isinstance(events, list) else []


def _kernels(events: list[Any]) -> list[Kernel]:
    found: dict[tuple[str, str], list[float]] = {}
    what: dict[tuple[str, str], tuple[str, str]] = {}
    for event in events:
        if not isinstance(event, Mapping) or event.get("cat") != "Node":
            continue
        name, args = event.get("name"), event.get("args")
        us = event.get("dur")
        if not isinstance(name, str) or not name.endswith(_KERNEL) or not isinstance(args, Mapping):
            continue
        if not isinstance(us, int | float) or us < 0:
            continue
        key = (name.removesuffix(_KERNEL), str(args.get("node_index", "")))
        found.setdefault(key, []).append(us / 1e3)
        what[key] = (str(args.get("op_name", "")), str(args.get("provider", "")))
    return [Kernel(key[0], *what[key], _middle_mean(ms[1:] or ms)) for key, ms in found.items()]


def _middle_mean(values: list[float]) -> float:
    ordered = sorted(values)
    cut = len(ordered) // 4
    return statistics.fmean(ordered[cut : len(ordered) - cut])
