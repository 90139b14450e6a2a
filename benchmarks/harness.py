"""What benchmarks share: the machine's description, interleaved timing, and where results go."""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from edgebudget_runtime.device_id import here

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[1]


def data_folder() -> Path:
    """EDGEBUDGET_DATA, or `data/` beside the project."""
    return Path(os.environ.get("EDGEBUDGET_DATA", ROOT / "data"))


def machine() -> dict[str, Any]:
    """What a reader needs to judge a figure."""
    names = ("torch", "onnx", "onnxruntime", "onnxruntime-qnn", "torch-pruning", "executorch")
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    cpu = here("", "", 1).cpu
    return {"cpu": cpu, "cores": os.cpu_count(), "system": platform.system(), **versions}


def interleaved(
    runs: Mapping[str, Callable[[], object]], *, rounds: int = 30, warmup: int = 3
) -> dict[str, dict[str, float]]:
    """Time several callables in turn, A B C A B C ..., in milliseconds.

    Returns median, quartiles and count of each: ratios within one call are what to quote.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + warmup):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if i >= warmup:
                times[name].append((time.perf_counter() - start) * 1e3)
    found = {}
    for name, values in times.items():
        low, mid, high = statistics.quantiles(values, n=4)
        found[name] = {"median_ms": mid, "q1_ms": low, "q3_ms": high, "count": len(values)}
    return found


@dataclass(frozen=True)
class Compiled:
    """What one run of the command line gave, and what it took."""

    summary: dict[str, Any]  # of `--json`
    manifest: dict[str, Any]
    seconds: float
    peak_bytes: int


def compiled_afresh(*arguments: str) -> Compiled | None:
    """`edgebudget compile` in a process of its own, with an empty cache; None where it fails."""
    with tempfile.TemporaryDirectory(prefix="edgebudget-") as name:
        folder = Path(name)
        environment = {**os.environ, "EDGEBUDGET_CACHE": str(folder / "cache")}
        command = [str(Path(sys.executable).parent / "edgebudget"), "compile", *arguments]
        command += ["--json", "--out", str(folder / "out")]
        began = time.monotonic()
        done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
        seconds = time.monotonic() - began
        if done.returncode:
            sys.stderr.write(f"exit {done.returncode}: {done.stderr[-2000:]}\n")
            return None
        manifest = json.loads((folder / "out" / "manifest.json").read_text())
    # Linux counts in KiB: the largest of the processes that were waited for.
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return Compiled(json.loads(done.stdout), manifest, seconds, peak)


def save(name: str, result: Mapping[str, Any]) -> Path:
    """Write one benchmark's result with the machine it was seen on."""
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{name}.json"
    content = {"benchmark": name, "machine": machine(), **result}
    file.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return file
