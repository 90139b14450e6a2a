"""One target's row of a comparison, in a process of its own: engines crash, hang and leak.

Run as ``python -m edgebudget.compare_worker FOLDER``: reads FOLDER/job.json and leaves, last of
all, FOLDER/result.json.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgebudget.comparing import Row
from edgebudget.events import ignore
from edgebudget_runtime import codec
from edgebudget_runtime.budget import Budget
from edgebudget_runtime.cost import UNKNOWN, Cost, Figure
from edgebudget_runtime.errors import EdgeBudgetError
from edgebudget_runtime.quality import Quality

if TYPE_CHECKING:
    from edgebudget.job import Job
    from edgebudget.target import Target
    from edgebudget.workload import Array

_PARENT_DIED = 1  # prctl's PR_SET_PDEATHSIG
_REPEATS = 50
_NOISE = 8  # samples that stand in for data where only costs are asked


def main(folder: Path) -> None:
    """Do the job of a folder."""
    if sys.platform == "linux":  # a killed comparison must not leave a compiler running
        ctypes.CDLL(None).prctl(_PARENT_DIED, signal.SIGKILL)
    job: dict[str, Any] = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    result: dict[str, Any]
    try:
        row, original = compared(job)
        result = {"row": codec.encode(Row, row), "original": codec.encode(Cost, original)}
    except EdgeBudgetError as e:
        result = {"error": {"code": e.code, "what": e.what, "hint": e.hint}}
    except Exception as e:  # an engine's own: dozens of unrelated types
        first = (str(e).strip().splitlines() or [""])[0]
        result = {"error": {"code": "EB613", "what": f"{type(e).__name__}: {first}", "hint": ""}}
    aside = folder / "result.json.part"
    aside.write_text(json.dumps(result), encoding="utf-8")
    aside.replace(folder / "result.json")
    sys.stdout.flush()
    os._exit(0)  # engines have crashed while cleaning up; everything is on disk


def compared(settings: Mapping[str, Any]) -> tuple[Row, Cost]:
    """The row of one target, and the original's counts.

    Raises:
        EdgeBudgetError: whatever is wrong with the model, its data or the target.
    """
    from edgebudget.energy_estimate import energy_of
    from edgebudget.job import prepare
    from edgebudget.pipeline import run_steps
    from edgebudget.planner import graph_steps
    from edgebudget.static_cost import static_cost
    from edgebudget.verify import look

    shape, weights = settings["input_shape"], settings["weights"]
    job = prepare(
        settings["model"],
        settings["target"],
        Budget(),
        None if weights is None else Path(weights),
        settings["data"],
        settings["task"],
        None if shape is None else tuple(shape),
        settings["seed"],
        ignore,
        energy_model=settings["energy_model"],
    )
    try:
        notes: tuple[str, ...] = ()
        if settings["quick"] and job.workload.data.calibration is None:
            job, notes = _on_noise(job), ("quantized on noise: these are costs alone",)
        built = run_steps(job.setting, job.start, graph_steps(job.setting, job.start.program))
        with tempfile.TemporaryDirectory(prefix="edgebudget-") as temp:
            lowered = job.target.lower(built.program, Path(temp), "main")
            seen = look(lowered, built.program, job.target)
            inputs = _inputs(job)
            latency = job.target.latency(lowered.file, inputs, _REPEATS)
            energy = energy_of(job.target, lowered.file, inputs, latency)
            quality = original = None
            if not settings["quick"]:
                quality, original = _qualities(job, lowered.file)
            row = Row(
                target=settings["target"],
                device=job.target.spec.device,
                engine=job.target.spec.engine,
                cost=replace(seen.cost, latency_ms=latency, energy_mj=energy),
                traffic_bytes=_traffic(job.target, lowered.file),
                nodes=len(seen.placement.nodes),
                quality=quality,
                original_quality=original,
                notes=(*notes, *lowered.notes),
            )
        return row, static_cost(job.graph.program, "the original graph")
    finally:
        job.setting.cache.close()


def _on_noise(job: Job) -> Job:
    """The same job with seeded noise to quantize on, under a key of its own."""
    from edgebudget.cache import key
    from edgebudget.datasets import Arrays
    from edgebudget.pipeline import Built
    from edgebudget.workload import Data

    rng = np.random.default_rng(job.setting.seed)
    drawn = {
        s.name: rng.random((_NOISE, *s.shape[1:]), dtype=np.float32).astype(s.dtype)
        for s in job.workload.program.inputs
    }
    workload = replace(job.workload, data=Data(calibration=Arrays("noise", drawn)))
    own = key({"noise": _NOISE, "of": job.setting.key})
    setting = replace(job.setting, workload=workload, key=own)
    start = Built(workload.program, (), own)
    return replace(job, workload=workload, setting=setting, start=start)


def _inputs(job: Job) -> dict[str, Array]:
    source = job.workload.data.evaluation or job.workload.data.calibration
    assert source is not None  # quantization has refused its absence
    return {k: v[None] for k, v in source.sample(0).inputs.items()}


def _traffic(target: Target, file: Path) -> Figure:
    """DRAM bytes, of a target that tells them."""
    tell = getattr(target, "traffic", None)
    return tell(file) if callable(tell) else UNKNOWN


def _qualities(job: Job, file: Path) -> tuple[Quality | None, Quality | None]:
    """Of the exported file and of the original, on the evaluation set."""
    from edgebudget import manifest_parts as parts
    from edgebudget.evaluate import predict, score
    from edgebudget.job import reference_of

    dataset, task = job.workload.data.evaluation, job.workload.task
    reference = reference_of(job)
    if dataset is None or reference is None:
        return None, None
    answers = predict(job.target.open(file).run, dataset, work="evaluate", emit=ignore)
    found = score(task, answers, reference)
    original = score(task, reference, reference)
    return parts.quality(found, ""), parts.quality(original, "")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
