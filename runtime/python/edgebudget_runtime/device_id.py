"""Which device is this? Latencies that were measured on one say nothing about another."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

_CPU_INFO = Path("/proc/cpuinfo")
_CPU_KEYS = ("model name", "hardware", "cpu model", "cpu part")  # by architecture
# Virtual machines call unlike processors by one name ("AMD EPYC"); these tell them apart.
_CPU_DETAILS = ("cpu family", "model", "stepping")
_MOST_BYTES = 1_000_000


@dataclass(frozen=True, slots=True)
class Device:
    """What a latency depends on, besides the artifact and the load of the machine."""

    cpu: str
    cores: int  # that this process may use
    arch: str
    system: str
    engine: str
    engine_version: str
    threads: int

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that differ between devices, engines and their versions."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def here(engine: str, engine_version: str, threads: int) -> Device:
    """This device, with the engine that is going to run the segments."""
    return Device(
        cpu=_cpu(),
        cores=_cores(),
        arch=platform.machine(),
        system=platform.system(),
        engine=engine,
        engine_version=engine_version,
        threads=threads,
    )


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@cache
def _cpu() -> str:
    try:
        with _CPU_INFO.open(encoding="utf-8", errors="replace") as f:
            lines = f.read(_MOST_BYTES).splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    values: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        values.setdefault(key.strip().lower(), value.strip())
    found = (values[k] for k in _CPU_KEYS if values.get(k))
    name = next(found, platform.processor() or platform.machine())
    details = [f"{k.removeprefix('cpu ')} {values[k]}" for k in _CPU_DETAILS if values.get(k)]
    return f"{name}, {', '.join(details)}" if details else name
