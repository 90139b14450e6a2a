"""Timing a file in processes of their own: nothing that this one holds or does is in the figure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgebudget.latency_statistic import least_runs
from edgebudget_runtime.errors import TargetError

if TYPE_CHECKING:
    from edgebudget.workload import Array
    from edgebudget_runtime.budget import Statistic

COMMAND: tuple[str, ...] = (sys.executable, "-P", "-m", "edgebudget_targets._timing_worker")
_TAIL_PROCESSES = 2  # where memory falls differs between processes, and moves the slow runs
_TAIL_RUNS = 300
_TAIL_MOST, _TAIL_S = 3000, 3.0  # more runs than needed, where they take little time
_LIMIT_S = 3600.0


def timed_apart(
    file: Path, inputs: Mapping[str, Array], *, threads: int, repeats: int, statistic: Statistic
) -> list[Array]:
    """Milliseconds of warm runs, an array for each process; `repeats` of them or more.

    Percentiles above the median take two processes, and as many runs as bound them.

    Raises:
        TargetError: EB650, the process failed or gave no answer.
    """
    tail = statistic in ("p90", "p95", "p99", "max")
    least = max(repeats, least_runs(statistic), _TAIL_RUNS if tail else 1)
    job: dict[str, Any] = {
        "names": list(inputs),
        "file": str(file.absolute()),
        "threads": threads,
        "least": least,
        "most": max(least, _TAIL_MOST) if tail else least,
        "seconds": _TAIL_S if tail else 0.0,
    }
    return [_one(job, inputs) for _ in range(_TAIL_PROCESSES if tail else 1)]


def _one(job: Mapping[str, Any], inputs: Mapping[str, Array]) -> Array:
    # The worker must find these packages however this process did.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    with tempfile.TemporaryDirectory(prefix="edgebudget-") as name:
        folder = Path(name)
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        np.savez(folder / "inputs.npz", *(inputs[k] for k in job["names"]))
        why = ""
        try:
            done = subprocess.run(
                [*COMMAND, name],
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=_LIMIT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            why = f"gave no answer within {_LIMIT_S:.0f} s"
        else:
            if done.returncode == 0:
                times: Array = np.load(folder / "times.npy", allow_pickle=False)
                return times
            said = folder / "error.txt"
            why = said.read_text(encoding="utf-8") if said.is_file() else _last(done)
        raise TargetError(
            "EB650",
            f"the process that times {Path(job['file']).name} failed: {why}",
            hint="free memory, or run `edgebudget doctor`",
        )


def _last(done: subprocess.CompletedProcess[bytes]) -> str:
    lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
    return f"status {done.returncode}{': ' + lines[-1] if lines else ''}"
