"""This machine's CPU through ONNX Runtime: measured latency, every node on the CPU."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgebudget.cpu_features import cpu_features
from edgebudget.energy.metering import metered, told
from edgebudget.latency_statistic import figure
from edgebudget.session import CpuSession
from edgebudget.target import Availability, Lowered, NodePlacement, Placement, TargetSpec
from edgebudget_runtime.cost import Figure
from edgebudget_runtime.device_id import Device, here
from edgebudget_runtime.errors import UsageError
from edgebudget_targets import _ort_kernels
from edgebudget_targets._executor import CpuExecutor, chunks
from edgebudget_targets._onnx_file import read_segment, write_segment
from edgebudget_targets._timing import timed_apart

if TYPE_CHECKING:
    from edgebudget.kernels import Kernel, Observation
    from edgebudget.program import Program
    from edgebudget.workload import Array
    from edgebudget_runtime.budget import Statistic

_WARM_UP = 5
_COMPARED = 50  # runs of each file


class CpuTarget:
    """ONNX Runtime's CPU engine on this machine."""

    def __init__(self, spec: TargetSpec) -> None:
        cpu = cpu_features()
        self._threads = int(spec.options["threads"])
        self.spec = replace(
            spec,
            device=cpu.model,
            activation_dtypes=cpu.activations,
            tells=told(spec.tells, "cpu"),
            options={**spec.options, "features": " ".join(sorted(cpu.flags))},
        )

    def available(self) -> Availability:
        """Always: the engine is a dependency of edgebudget itself."""
        return Availability(ok=True, version=version("onnxruntime"))

    def lower(self, program: Program, folder: Path, name: str) -> Lowered:
        """Write `<name>.onnx`, without descriptions and metadata.

        Raises:
            UnsupportedError: EB241 the program is no graph, EB242 it is larger than 2 GiB.
        """
        return Lowered(write_segment(program, folder, name))

    def open(self, file: Path, *, exact: bool = False) -> CpuExecutor:
        """Load a segment on all cores; this engine is the target's own, `exact` or not.

        Raises:
            ArtifactError: EB510, the engine refuses the file.
        """
        return CpuExecutor(CpuSession(file, exact=False))

    def placement(self, file: Path) -> Placement:
        """Every node of the file, on the CPU: no other provider is registered.

        Raises:
            ArtifactError: EB510, the engine refuses the file.
        """
        CpuSession(file)
        nodes = read_segment(file, weights=False).graph.node
        return Placement(
            tuple(NodePlacement(n.name or f"#{i}", n.op_type, "cpu") for i, n in enumerate(nodes)),
            "cpu",
        )

    def latency(
        self,
        file: Path,
        inputs: Mapping[str, Array],
        repeats: int,
        *,
        statistic: Statistic = "p50",
    ) -> Figure:
        """A statistic of one run's time in ms, measured warm in a process of its own.

        Raises:
            ArtifactError: EB510, the engine refuses the file.
            UsageError: EB142 an input is missing or has the wrong shape, EB144 no run is asked for.
            TargetError: EB650, the process failed.
        """
        _check_runs(repeats)
        first = next(chunks(inputs, CpuSession(file, threads=self._threads).shapes))
        times = timed_apart(
            file, first, threads=self._threads, repeats=repeats, statistic=statistic
        )
        return figure(times, statistic, self._how, self.spec.device)

    def compare(self, file: Path, other: Path, inputs: Mapping[str, Array]) -> float | None:
        """Latency of `file` over that of `other`: the median ratio of neighbouring runs."""
        mine, theirs = self.chain_times([file, other], [inputs] * 2, _COMPARED)
        return float(np.median(mine / theirs))

    def energy(self, file: Path, inputs: Mapping[str, Array]) -> Figure:
        """Energy of one run in mJ beyond idle power, by the processor's counter if it has one.

        Raises:
            ArtifactError: EB510, the engine refuses the file.
            UsageError: EB142, an input is missing or has the wrong shape.
        """
        session = CpuSession(file, threads=self._threads, exact=False)
        first = next(chunks(inputs, session.shapes))

        def once() -> int:
            session.run(first)
            return 1

        return replace(metered("cpu", once), device=self.spec.device)

    def measure(
        self, files: Sequence[Path], inputs: Mapping[str, Array], repeats: int
    ) -> tuple[Figure, ...]:
        """Median time of one run of each file in ms, the files taking turns.

        Whatever slows the machine for a while then slows all files alike.
        """
        turns = f"{len(files)} files in turn" if files[1:] else "one after the other"
        how = f"median of {repeats} warm runs, {turns}, {self._how}"
        return tuple(
            Figure(
                value=float(np.median(ms)),
                evidence="measured",
                how=how,
                device=self.spec.device,
                count=repeats,
                spread=float(np.subtract(*np.percentile(ms, [75, 25])) / 2),
            )
            for ms in self.chain_times(files, [inputs] * len(files), repeats)
        )

    def device(self) -> Device:
        """This machine, ONNX Runtime's version, and the threads of a measurement."""
        return here("onnxruntime-cpu", version("onnxruntime"), self._threads)

    def kernels(self, file: Path) -> tuple[Kernel, ...]:
        """Every kernel of one run, from the engine's own profile of it.

        Raises:
            ArtifactError: EB510, the engine refuses the file.
        """
        return _ort_kernels.kernels(file, _noise(file), self._threads)

    def observe(self, file: Path) -> Observation:
        """The usual time of one run and of each kernel in it, in two short bursts.

        Raises:
            ArtifactError: EB510, the engine refuses the file.
        """
        return _ort_kernels.observe(file, _noise(file), self._threads)

    @property
    def _how(self) -> str:
        threads = f"{self._threads} thread{'s' if self._threads > 1 else ''}"
        return f"{threads}, ONNX Runtime {version('onnxruntime')}"

    def chain_times(
        self, files: Sequence[Path], inputs: Sequence[Mapping[str, Array]], repeats: int
    ) -> list[Array]:
        """Milliseconds [repeats] of each file on the first sample of its inputs, taking turns.

        Raises:
            ArtifactError: EB510, the engine refuses a file.
            UsageError: EB142 an input is missing or has the wrong shape, EB144 no run is asked for.
        """
        _check_runs(repeats)
        sessions = [CpuSession(f, threads=self._threads, exact=False) for f in files]
        first = [next(chunks(x, s.shapes)) for x, s in zip(inputs, sessions, strict=True)]
        seconds = np.empty((len(files), repeats))
        for turn in range(-_WARM_UP, repeats):
            for i, session in enumerate(sessions):
                began = time.perf_counter()
                session.run(first[i])
                if turn >= 0:
                    seconds[i, turn] = time.perf_counter() - began
        return list(seconds * 1e3)


def _check_runs(repeats: int) -> None:
    if repeats < 1:
        raise UsageError("EB144", f"latency of {repeats} runs", hint="measure 1 run or more")


def _noise(file: Path) -> dict[str, Array]:
    """Seeded noise for every input of a file; open dimensions are 1."""
    from onnx import helper

    graph = read_segment(file, weights=False).graph
    held = {t.name for t in graph.initializer}
    rng = np.random.default_rng(0)
    found: dict[str, Array] = {}
    for value in graph.input:
        if value.name in held:
            continue
        kind = value.type.tensor_type
        shape = [d.dim_value or 1 for d in kind.shape.dim]
        dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
        noise = rng.standard_normal(shape)
        found[value.name] = (noise if dtype.kind == "f" else np.abs(noise)).astype(dtype)
    return found
