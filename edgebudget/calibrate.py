"""Time many small networks on a device, kernel by kernel, and keep every result at once.

Networks take turns in a shuffled order, round after round, so that whatever slows the machine for
a while slows no kind of kernel in particular; of each the quietest round counts. Neighbours of a
virtual machine slow it for milliseconds and for seconds, so that many short rounds find it quiet
sooner than a few long ones. Where making a network's file takes long (`calibration_ahead`), a few
are made and get all their rounds before the next, so that a calibration cut short knows fewer
networks, and each as well. Every result is one line of a log that belongs to a device, an engine
and its version: a run that was killed goes on where it was.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgebudget import registry
from edgebudget.datasets import Arrays
from edgebudget.events import Advanced, Emit, Finished, Said, Started
from edgebudget.kernels import Kernel, Observation
from edgebudget.program import Context, Program, TensorSpec
from edgebudget.target import Halves
from edgebudget.tasks import make
from edgebudget.workload import Data
from edgebudget_runtime.budget import Budget
from edgebudget_runtime.errors import EdgeBudgetError, TargetError
from edgebudget_runtime.profile import cache_folder

if TYPE_CHECKING:
    from edgebudget.target import CalibratedTarget, Target
    from edgebudget_runtime.device_id import Device

SCHEMA = 1
NETWORKS = 450  # in both forms each
ROUNDS = 4
_LEAST_UNITS = 60  # networks below which nothing is fitted
_WORK = "calibrate"
_GRAPH_STEPS = ("clean_graph", "rewrite_for_target", "quantize_int8")


@dataclass(frozen=True, slots=True)
class Unit:
    """One network to time: its number, its form, and whether it is a chain.

    `reduced`: in integers, or in half precision on a target that computes with floats.
    """

    number: int
    reduced: bool
    chain: bool = False

    @property
    def name(self) -> str:
        """A short name for the log: 12f, 12q, c12f."""
        return f"{'c' if self.chain else ''}{self.number}{'q' if self.reduced else 'f'}"


Part = list[Unit]  # timed one after another: each as often as it is missing


@dataclass(slots=True)
class Log:
    """What is known about a device: each unit's quietest round, and its energy."""

    best: dict[str, Observation] = field(default_factory=dict)
    rounds: dict[str, int] = field(default_factory=dict)  # how often a unit was timed
    refused: dict[str, str] = field(default_factory=dict)  # unit -> what the engine said
    skipped: int = 0  # lines that could not be read

    def add(self, name: str, seen: Observation) -> None:
        """Take in one round of a unit: each time the smallest seen, energy the mean of both."""
        self.rounds[name] = self.rounds.get(name, 0) + 1
        old = self.best.get(name)
        if old is None or old.kernels != seen.kernels:
            self.best[name] = seen
            return
        fastest = tuple(map(min, old.kernel_us, seen.kernel_us))
        energies = [o.energy_mj for o in (old, seen) if o.energy_mj is not None]
        energy = sum(energies) / len(energies) if energies else None  # idle power errs both ways
        self.best[name] = Observation(
            min(old.total_ms, seen.total_ms), seen.kernels, fastest, energy
        )


def log_file(device: Device) -> Path:
    """Where results about this device and engine are kept, in the user's cache folder."""
    return cache_folder() / "calibration" / f"{device.fingerprint}.jsonl"


def read_log(file: Path) -> Log:
    """Every whole line of a log; what is damaged or cut short is skipped and counted."""
    log = Log()
    if not file.is_file():
        return log
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            raw = json.loads(line)
            if "device" in raw:
                continue
            name = str(raw["unit"])
            if "refused" in raw:
                log.refused[name] = str(raw["refused"])
                continue
            log.add(name, _observation(raw))
        except (ValueError, KeyError, TypeError, RecursionError, EdgeBudgetError):
            log.skipped += 1
    return log


def _observation(raw: Mapping[str, Any]) -> Observation:
    kernels = tuple(Kernel.from_list(k) for k in raw["kernels"])
    times = tuple(float(us) for us in raw["us"])
    total = float(raw["ms"])
    energy = None if raw.get("mj") is None else float(raw["mj"])
    told = len(times) in (0, len(kernels)) and all(u >= 0 for u in times)
    if not told or not kernels or not total > 0 or not (energy is None or energy > 0):
        raise ValueError("not an observation")
    return Observation(total, kernels, times, energy)


def calibrate(
    target: CalibratedTarget,
    *,
    networks: int | None = None,
    rounds: int | None = None,
    limit_s: float = 1080.0,
    seed: int = 0,
    emit: Emit,
) -> Log:
    """Time what the log does not know yet, for `limit_s` seconds at most, and give all of it.

    `networks` None takes the target's own number (its option `calibration_networks`), which is
    smaller where a network takes long to lower; `rounds` None its `calibration_rounds`. To each
    network belong as many chains of one kernel as the target's option `calibration_chains` says:
    some, where the engine tells whole runs alone.

    Raises:
        TargetError: EB651, too little could be measured to fit anything.
    """
    deadline = time.monotonic() + limit_s
    device = target.device()
    file = log_file(device)
    log = read_log(file)
    if log.skipped:
        emit(Said("warning", f"{log.skipped} damaged lines of {file.name} are skipped"))
    options = target.spec.options
    many = networks or int(options.get("calibration_networks", NETWORKS))
    chains = many * int(options.get("calibration_chains", 0))
    ahead = int(options.get("calibration_ahead", 0))
    rounds = rounds or int(options.get("calibration_rounds", ROUNDS))
    todo = _todo(log, many, chains, rounds, seed, ahead)
    emit(Started(_WORK, sum(map(len, todo))))
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="edgebudget-") as name, file.open("a") as out:
        if file.stat().st_size and not _ends_with_newline(file):
            out.write("\n")  # after a line that a kill cut short
        _append(out, {"schema": SCHEMA, "device": asdict(device)})
        for unit, lowered in _prepared(target, todo, Path(name), ahead):
            if unit.name in log.refused:
                continue
            if time.monotonic() > deadline:
                emit(Said("warning", "the time limit has passed: fitted on what was measured"))
                break
            try:
                seen = target.observe(lowered())
            except EdgeBudgetError as e:
                log.refused[unit.name] = e.what
                _append(out, {"unit": unit.name, "refused": e.what})
                emit(Said("warning", f"network {unit.name} is left out: {e.what}"))
                continue
            log.add(unit.name, seen)
            _append(out, {
                "unit": unit.name, "ms": round(seen.total_ms, 6),
                "us": [round(u, 3) for u in seen.kernel_us], "mj": seen.energy_mj,
                "kernels": [k.as_list() for k in seen.kernels],
            })  # fmt: skip
            emit(Advanced(_WORK, note=f"{len(log.best)} networks"))
    emit(Finished(_WORK, f"{len(log.best)} networks, {len(log.refused)} refused"))
    if len(log.best) < _LEAST_UNITS:
        raise TargetError(
            "EB651",
            f"{len(log.best)} networks were timed on this device, {_LEAST_UNITS} are needed",
            hint="run the same command again: it goes on where it ended",
        )
    return log


def _todo(log: Log, networks: int, chains: int, rounds: int, seed: int, ahead: int) -> list[Part]:
    """What is missing, `ahead` units at a time, or all at once: rounds in shuffled order."""
    each = [(i, False) for i in range(networks)] + [(i, True) for i in range(chains)]
    units = [Unit(i, reduced, chain) for i, chain in each for reduced in (False, True)]
    drawn = np.random.default_rng(seed).permutation(len(units))
    found = []
    for start in range(0, len(units), ahead or len(units)):
        some = drawn[start : start + (ahead or len(units))]
        part = [
            units[i]
            for turn in range(rounds)
            for i in np.random.default_rng([seed, turn]).permutation(some)
            if log.rounds.get(units[i].name, 0) <= turn
        ]
        found.append([unit for unit in part if unit.name not in log.refused])
    return found


def _prepared(
    target: CalibratedTarget, parts: Sequence[Part], folder: Path, ahead: int
) -> Iterator[tuple[Unit, Callable[[], Path]]]:
    """Each unit to time, and what gives its file or raises why there is none.

    With `ahead`, a part's files are made first, by as many of the target's compilers as there are
    cores: nothing is timed meanwhile.
    """
    if not ahead:
        yield from ((u, partial(_lowered, target, u, folder)) for part in parts for u in part)
        return
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        for part in parts:
            jobs = {u: pool.submit(_lowered, target, u, folder) for u in dict.fromkeys(part)}
            wait(jobs.values())
            yield from ((u, jobs[u].result) for u in part)
    finally:
        pool.shutdown(cancel_futures=True)


def _lowered(target: CalibratedTarget, unit: Unit, folder: Path) -> Path:
    """The unit's file as this target would export it; made once."""
    for suffix in (".onnx", ".pte"):
        if (file := folder / f"{unit.name}{suffix}").is_file():
            return file
    from edgebudget.calibration_chains import chain
    from edgebudget.calibration_nets import network

    times = float(target.spec.options.get("calibration_times", 1.0))
    body = (chain if unit.chain else network)(unit.number, times)
    shape = tuple(d.dim_value for d in body.graph.input[0].type.tensor_type.shape.dim)
    program = Program("graph", body, (TensorSpec("x", shape),), ("y",))
    if not target.spec.integers and not unit.reduced and isinstance(target, Halves):
        target = target.single()
    integer = unit.reduced and target.spec.integers
    return target.lower(as_exported(program, target, integer), folder, unit.name).file


def as_exported(program: Program, target: Target, integer: bool, samples: int = 4) -> Program:
    """A graph after the clean-up, rewrites and quantization of a compile, ranges from noise."""
    rng = np.random.default_rng(0)
    noise = {
        s.name: rng.standard_normal((samples * s.shape[0], *s.shape[1:])).astype(np.float32)
        for s in program.inputs
    }
    for name in _GRAPH_STEPS if integer else _GRAPH_STEPS[:-1]:
        step = registry.get(name)
        settings: dict[str, Any] = {}
        if name == "quantize_int8":
            settings = {"range_method": "minmax", "samples": samples, "bias_correct": False,
                        "label_bias": "off", "mixed": "off"}  # fmt: skip
        context = Context(
            budget=Budget(), target=target.spec, task=make("agreement"),
            data=Data(calibration=Arrays("noise", noise)), original=program, seed=0, rng=rng,
            workdir=Path(), emit=lambda _: None,
        )  # fmt: skip
        program = step.run(program, step.config(**settings), context).program
    return program


def _ends_with_newline(file: Path) -> bool:
    with file.open("rb") as f:
        f.seek(-1, 2)
        return f.read(1) == b"\n"


def _append(out: Any, line: Mapping[str, Any] | Sequence[Any]) -> None:
    out.write(json.dumps(line, separators=(",", ":"), allow_nan=False) + "\n")
    out.flush()
