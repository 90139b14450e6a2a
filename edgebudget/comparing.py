"""One network on several targets, side by side: what it costs there, and how that is known.

Every target works in a process of its own with a time limit, so that one whose engine crashes or
hangs is a row that says so, and the others go on.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgebudget import target_registry
from edgebudget.events import Emit, Finished, Said, Started, ignore
from edgebudget_runtime import codec
from edgebudget_runtime.cost import UNKNOWN, Cost, Figure
from edgebudget_runtime.errors import (
    ArtifactError,
    EdgeBudgetError,
    UnsupportedError,
    UsageError,
)
from edgebudget_runtime.quality import Quality

COMMAND: tuple[str, ...] = (sys.executable, "-P", "-m", "edgebudget.compare_worker")
LIMIT_S = 1800.0
# Errors about the model or its data: what is wrong there is wrong on every target.
_OF_THE_MODEL = ("EB10", "EB11", "EB13", "EB15", "EB16", "EB25", "EB53", "EB54")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One target. Where `why` says why there is nothing, the rest is unknown."""

    target: str
    device: str = ""
    engine: str = ""
    cost: Cost = field(default_factory=Cost)
    traffic_bytes: Figure = UNKNOWN  # DRAM bytes of one input
    nodes: int = 0
    quality: Quality | None = None
    original_quality: Quality | None = None
    notes: tuple[str, ...] = ()
    why: str = ""
    hint: str = ""  # what to install or change


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The rows in the order asked, and the original's own counts."""

    model: str
    original: Cost
    rows: tuple[Row, ...]


def compare(
    model: str,
    targets: Sequence[str],
    *,
    weights: Path | None = None,
    data: str | None = None,
    task: str | None = None,
    input_shape: tuple[int, ...] | None = None,
    energy_model: str | None = None,
    seed: int = 0,
    quick: bool = False,
    limit_s: float = LIMIT_S,
    emit: Emit = ignore,
) -> Comparison:
    """Export, quantize, count, place, time and (unless `quick`) evaluate `model` on each target.

    Without data, `quick` quantizes on noise: costs depend on shapes and types alone. Energies that
    nothing measures come from `energy_model`, a fitted file or a technology such as `7nm`.

    Raises:
        UsageError: EB140, no target has such a name; EB155, there are no targets.
        EdgeBudgetError: what is wrong with the model or its data, which no target can help.
    """
    if not targets:
        raise UsageError("EB155", "no targets to compare", hint="--targets cpu,npu:hexagon")
    known = {name: _refused(name) for name in targets}  # names are checked before any work
    settings = {
        "model": model,
        "weights": None if weights is None else str(weights.resolve()),
        "data": data,
        "task": task,
        "input_shape": None if input_shape is None else list(input_shape),
        "energy_model": energy_model,
        "seed": seed,
        "quick": quick,
    }
    rows, original = list[Row](), Cost()
    for name, refused in known.items():
        row = refused
        if row is None:
            emit(Started(f"compare {name}"))
            row, found = _in_process({**settings, "target": name}, limit_s)
            original = found or original
            emit(Finished(f"compare {name}", row.why))
        if row.why:
            emit(Said("warning", f"{name}: {row.why}"))
        rows.append(row)
    return Comparison(model=model, original=original, rows=tuple(rows))


def _refused(name: str) -> Row | None:
    """The row of a target that cannot do anything here; None for one that can."""
    try:
        target = target_registry.get(name)
        state = target.available()
    except UnsupportedError as e:
        return Row(target=name, why=e.what, hint=e.hint)
    except UsageError:
        raise
    except EdgeBudgetError as e:
        return Row(target=name, why=e.what, hint=e.hint)
    if state.ok:
        return None
    spec = target.spec
    return Row(target=name, device=spec.device, engine=spec.engine, why=state.why,
               hint=state.install)  # fmt: skip


def _in_process(settings: Mapping[str, Any], limit_s: float) -> tuple[Row, Cost | None]:
    """One target's row, and the original's counts where it came that far."""
    name = str(settings["target"])
    spec = target_registry.get(name).spec
    failed = Row(target=name, device=spec.device, engine=spec.engine)
    with tempfile.TemporaryDirectory(prefix="edgebudget-compare-") as temp:
        folder = Path(temp)
        (folder / "job.json").write_text(json.dumps(settings), encoding="utf-8")
        status = _run(folder, limit_s)
        file = folder / "result.json"
        if status is None:
            why = f"[EB611] no answer within {limit_s:g} s: stopped"
            return _with(failed, why, "give it more: --timeout SECONDS"), None
        if not file.is_file():
            how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
            last = _last_line(folder / "log.txt")
            return _with(failed, f"[EB610] crashed ({how}){last}", "`edgebudget doctor`"), None
        result = json.loads(file.read_text(encoding="utf-8"))
    if "error" in result:
        error = result["error"]
        if error["code"].startswith(_OF_THE_MODEL):
            kind = ArtifactError if error["code"].startswith("EB5") else UsageError
            raise kind(error["code"], error["what"], hint=error["hint"])
        return _with(failed, f"[{error['code']}] {error['what']}", error["hint"]), None
    row: Row = codec.decode(Row, result["row"])
    original: Cost = codec.decode(Cost, result["original"])
    return row, original


def _run(folder: Path, limit_s: float) -> int | None:
    """The worker's exit status; None where it was killed for its time, with all it started."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            (*COMMAND, str(folder)),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        deadline = time.monotonic() + limit_s
        try:
            return process.wait(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return None
        finally:  # also on Ctrl-C
            if process.poll() is None:
                _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (AttributeError, ProcessLookupError):  # no process groups here
        process.kill()
    process.wait()


def _with(row: Row, why: str, hint: str) -> Row:
    return Row(target=row.target, device=row.device, engine=row.engine, why=why, hint=hint)


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f" after saying {lines[-1].strip()[:200]!r}" if lines else ""
