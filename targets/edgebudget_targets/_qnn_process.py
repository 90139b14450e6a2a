"""Starting NPU jobs in their own processes, and surviving whatever happens to them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgebudget_runtime.errors import ArtifactError, TargetError

COMMAND: tuple[str, ...] = (sys.executable, "-P", "-m", "edgebudget_targets._qnn_worker")
_NOT_ALL_NPU = "fallback to CPU EP has been explicitly disabled"
# Severity markers of the vendor's library and of ONNX Runtime.
_ERROR_LINE = re.compile(r"<E>\s*(.+)|\[E:[^\]]*\]\s*(.+)")


@dataclass(frozen=True, slots=True)
class Job:
    """One folder to work in and what to do there: see `_qnn_worker`."""

    folder: Path
    settings: dict[str, Any]

    def log(self) -> str:
        """What the engine said."""
        return (self.folder / "log.txt").read_text(encoding="utf-8", errors="replace")


class NotAllOnNpu(TargetError):
    """Some nodes were left to the CPU, in a session that forbids it."""


def run_jobs(jobs: Sequence[Job], limit_s: float, device: str) -> list[dict[str, Any]]:
    """Run jobs side by side, each in a process of its own, and give their results.

    Raises:
        ArtifactError: EB510, the file is no valid model.
        TargetError: EB610 a process crashed, EB611 it took longer than `limit_s` in all, EB612
            the compiler refuses the graph, EB613 the engine failed or left nodes to the CPU.
    """
    deadline = time.monotonic() + limit_s
    running: list[subprocess.Popen[bytes]] = []
    try:
        for job in jobs:
            running.append(_start(job))
        for process in running:
            process.wait(timeout=max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        raise TargetError(
            "EB611",
            f"the NPU engine for {device} gave no answer within {limit_s:.0f} s",
            hint="check fewer samples, or free the machine of other work",
        ) from None
    finally:  # also on Ctrl-C
        for process in running:
            process.kill()
            process.wait()
    return [_result(j, p.returncode, device) for j, p in zip(jobs, running, strict=True)]


def _start(job: Job) -> subprocess.Popen[bytes]:
    job.folder.mkdir(parents=True, exist_ok=True)
    (job.folder / "job.json").write_text(json.dumps(job.settings), encoding="utf-8")
    # The worker must find this package however this process did.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    with (job.folder / "log.txt").open("wb") as log:
        return subprocess.Popen(
            COMMAND,
            cwd=job.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _result(job: Job, status: int, device: str) -> dict[str, Any]:
    file = job.folder / "result.json"
    if not file.is_file():
        raise TargetError(
            "EB610",
            f"the NPU engine for {device} crashed ({_death(status)}){_last_error(job)}",
            hint="try another SoC; `edgebudget doctor` shows the versions for a report",
        )
    result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if result["ok"]:
        return result
    error = " ".join(str(result["error"]).split())
    if _NOT_ALL_NPU in error:
        raise NotAllOnNpu(
            "EB613",
            f"{device} does not take every node",
            hint="`edgebudget inspect` lists the nodes left to the CPU, and why",
        )
    if "INVALID_GRAPH" in error or "INVALID_PROTOBUF" in error:
        raise ArtifactError(
            "EB510",
            f"ONNX Runtime cannot load this model: {error}",
            hint="check the file with `edgebudget inspect`",
        )
    if "EP_FAIL" in error and "QNN graph" in error:
        raise TargetError(
            "EB612",
            f"the compiler for {device} refuses the graph: {error.rpartition('EP_FAIL : ')[2]}",
            hint="compile for a newer SoC, or replace the operators it refuses",
        )
    raise TargetError(
        "EB613",
        f"the NPU engine for {device} failed: {error}",
        hint="`edgebudget doctor` says which engines work here",
    )


def _death(status: int) -> str:
    if status < 0:
        return signal.Signals(-status).name
    return f"exit status {status}"


def _last_error(job: Job) -> str:
    found = _ERROR_LINE.findall(job.log())
    return f" after saying {(found[-1][0] or found[-1][1])!r}" if found else ""
