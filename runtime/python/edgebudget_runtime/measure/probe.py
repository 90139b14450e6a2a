"""The measuring program: `python -m edgebudget_runtime.measure.probe JOB`, JOB being JSON.

It tells what it finds as it finds it, one JSON object on a line, so that whoever listens keeps
what was measured until the device is lost: `device`, `state`, `warm`, `times`, `memory`,
`layers`, `idle`, `energy`, `note`, and at last `end` or `error`.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from edgebudget_runtime import codec, engine
from edgebudget_runtime.cost import Figure
from edgebudget_runtime.device_id import here
from edgebudget_runtime.errors import EdgeBudgetError, first_line
from edgebudget_runtime.manifest import Manifest
from edgebudget_runtime.measure import battery, conditions, layers, meter, rapl, samples
from edgebudget_runtime.measure.counters import Counter
from edgebudget_runtime.measure.job import Job
from edgebudget_runtime.measure.timing import Paths
from edgebudget_runtime.planner import free_inputs
from edgebudget_runtime.sessions import Sessions
from edgebudget_runtime.walk import Segments

Tell = Callable[..., None]
_TRACED = 20  # runs under the engine's profiler
_TRACED_S = 3.0
_LEAST_S = 2.5  # for energy: some counters move ten times a second


def measure(job: Job, tell: Tell) -> None:
    """Do all that the job asks for.

    Raises:
        EdgeBudgetError: the artifact cannot be read or run.
    """
    memory = conditions.Memory()
    folder = Path(job.folder)
    manifest = Manifest.load(folder)
    threads = job.threads or engine.default_threads()
    tell("device", device=asdict(here(job.provider, engine.VERSION, threads)))
    sessions = _sessions(job, folder, manifest, None)
    paths = _paths(manifest, sessions)
    _state(tell, "before")
    for id in paths.paths:
        tell("warm", path=id, runs=paths.warm(id))
        memory.look()
    for found in paths.times(job.seconds, job.runs):
        tell("times", paths=found.paths, segments=found.segments)
    tell("memory", figure=_plain(memory.high_water()))
    _state(tell, "after")
    if job.layers:
        _layers(job, folder, manifest, paths, tell)
    if job.energy:
        _energy(job, paths, tell)
    sessions.close()


def _sessions(job: Job, folder: Path, manifest: Manifest, traces: Path | None) -> Sessions:
    return Sessions(
        folder,
        manifest,
        verify=traces is None,
        providers=(job.provider,),
        options=None,
        threads=job.threads,
        limit_bytes=None,
        traces=traces,
    )


def _paths(manifest: Manifest, sessions: Sessions) -> Paths:
    segments = Segments(manifest, sessions, time.perf_counter)
    ways = {s.id: s.path for s in manifest.subnetworks}
    inputs = {
        id: samples.make(free_inputs([segments.by_id[s] for s in path]))
        for id, path in ways.items()
    }
    return Paths(segments, ways, inputs)


def _layers(job: Job, folder: Path, manifest: Manifest, timed: Paths, tell: Tell) -> None:
    """Sessions of their own: the profiler slows runs down, and the timed ones never see it."""
    with tempfile.TemporaryDirectory(prefix="edgebudget-") as name:
        sessions = _sessions(job, folder, manifest, Path(name))
        paths = Paths(Segments(manifest, sessions, time.perf_counter), timed.paths, timed.inputs)
        for id in paths.paths:
            ended = time.perf_counter() + _TRACED_S / len(paths.paths)
            for run in range(_TRACED):
                if run > 1 and time.perf_counter() > ended:
                    break
                paths.run(id)
        for segment in dict.fromkeys(s for path in paths.paths.values() for s in path):
            session, _ = sessions.get(segment)
            if not hasattr(session, "end_profiling"):
                tell("note", text=f"{segment}: its engine does not time single nodes")
                continue
            kernels = layers.read(Path(session.end_profiling()))
            tell("layers", segment=segment, kernels=[asdict(k) for k in kernels])
        sessions.close()


def _energy(job: Job, paths: Paths, tell: Tell) -> None:
    counter, why = find_counter(job.family, job.counters)
    if counter is None:
        tell("idle", figure=_plain(conditions.unknown(why)))
        return
    counter.start()
    try:
        began = time.perf_counter()
        if job.family == "gpu":
            time.sleep(meter.GPU_SETTLE_S)
        idle = meter.idle_power(counter, _LEAST_S)
        tell("idle", figure=_plain(idle))
        meter.warm(partial(paths.once, next(iter(paths.paths))), time.perf_counter() - began)
        each = max(job.seconds / len(paths.paths), _LEAST_S)
        for id in paths.paths:
            found = meter.inference(counter, partial(paths.once, id), idle, each)
            tell("energy", path=id, net=_plain(found.net_mj), gross=_plain(found.gross_mj))
    finally:
        counter.stop()


def find_counter(family: str, further: Sequence[str] = ()) -> tuple[Counter | None, str]:
    """The first counter that works for this kind of processor, or None and why none does.

    `further` are tried first: "module:function", which takes the kind and answers as this does.
    """
    reasons: list[str] = []
    for place in further:
        module, _, function = place.partition(":")
        try:
            found, why = getattr(importlib.import_module(module), function)(family)
        except Exception as e:  # another library's, on hardware that may not be there
            found, why = None, f"{place}: {first_line(e)}"
        if found is not None:
            return found, ""
        reasons.append(why)
    if family == "cpu":
        for find in (rapl.find, battery.find):
            counter, why = find()
            if counter is not None:
                return counter, ""
            reasons.append(why)
    return None, "; ".join(r for r in reasons if r) or f"no energy counter for a {family}"


def _state(tell: Tell, when: str) -> None:
    tell("state", figures={k: _plain(f) for k, f in conditions.state(when).items()})


def _plain(figure: Figure) -> Any:
    return codec.encode(Figure, figure)


def _teller(out: TextIO) -> Tell:
    def tell(kind: str, **what: Any) -> None:
        out.write(json.dumps({"kind": kind, **what}) + "\n")
        out.flush()

    return tell


def _alone() -> TextIO:
    """Our own stdout; whatever else the process prints goes to stderr."""
    own = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return own


def main(arguments: list[str]) -> int:
    """Measure; the exit code is that of the error, if any."""
    tell = _teller(_alone())
    try:
        measure(Job.decode(arguments[0] if arguments else ""), tell)
    except EdgeBudgetError as e:
        tell("error", code=e.code, what=e.what, hint=e.hint)
        return e.exit_code
    tell("end")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
