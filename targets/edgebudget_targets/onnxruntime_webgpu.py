"""GPUs through ONNX Runtime's WebGPU plug-in: half or single precision, time and energy measured.

Without a GPU the same shaders can run on software Vulkan, which shows whether they compute the
right numbers and nothing about time. A device that comes with a predictor has latency and energy
predicted wherever it is not the GPU of this machine.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgebudget import predictors
from edgebudget.energy.metering import SECONDS, told
from edgebudget.kernels import Observation
from edgebudget.latency_statistic import enough_runs, figure
from edgebudget.predictor import read
from edgebudget.session import CpuSession
from edgebudget.target import Availability, Executor, Lowered, NodePlacement, Placement, TargetSpec
from edgebudget_runtime import codec
from edgebudget_runtime.cost import UNKNOWN, Figure
from edgebudget_runtime.device_id import here
from edgebudget_runtime.errors import TargetError, UsageError
from edgebudget_targets import _webgpu_kernels
from edgebudget_targets._executor import CpuExecutor, Shape, chunks
from edgebudget_targets._executorch_process import EngineRefused, Worker
from edgebudget_targets._onnx_file import read_segment, write_segment
from edgebudget_targets._webgpu_process import NotAllOnGpu, failure, find_engine, run_job

if TYPE_CHECKING:
    import onnx

    from edgebudget.kernels import Kernel
    from edgebudget.layer_loads import NodeTimes
    from edgebudget.predictor import Predictor
    from edgebudget.program import Program
    from edgebudget.workload import Array
    from edgebudget_runtime.budget import Statistic
    from edgebudget_runtime.cost import Resource
    from edgebudget_runtime.device_id import Device

_CPU = "CPUExecutionProvider"
_OBSERVE = (sys.executable, "-P", "-m", "edgebudget_targets._webgpu_observer")
_OBSERVED_S = 0.6  # of runs for one energy in a calibration
_BOTH: tuple[Resource, ...] = ("latency_ms", "energy_mj")
_WARM_UP = 20  # the first runs compile shaders and raise the clock
_COMPARED = 50  # runs of each file
_START_S, _INPUT_S = 600.0, 900.0  # software Vulkan takes seconds where a GPU takes milliseconds


class WebGpuTarget:
    """The GPU of this machine."""

    def __init__(self, spec: TargetSpec) -> None:
        self._engine = find_engine()
        self._observer: Worker | None = None
        self._predictor = _shipped(spec.options.get("predictor", ""))
        adapter, answers = self._engine.adapter, bool(self._engine.python)
        if self._predictor is not None and adapter != spec.device:
            tells = _BOTH if self._predictor.energy else _BOTH[:1]
        else:
            self._predictor = None
            options = {k: v for k, v in spec.options.items() if k != "predictor"}
            spec = replace(spec, device=adapter or spec.device, options=options)
            measured = answers and not self._engine.software
            tells = told(_BOTH[:1], "gpu") if measured else ()
        self.spec = replace(spec, tells=tells)

    def available(self) -> Availability:
        """Whether a GPU, or software Vulkan in its place, answers here."""
        e = self._engine
        return Availability(ok=bool(e.python), why=e.why, install=e.install, version=e.version)

    def lower(self, program: Program, folder: Path, name: str) -> Lowered:
        """Write `<name>.onnx`, in half precision where that is asked for and loses nothing.

        Inputs and outputs keep their types. Half precision is compared with the float graph on
        a seeded probe; where a value leaves its range or an output moves, the file stays in
        single precision, and a note says why.

        Raises:
            UnsupportedError: EB241 the program is no graph, EB242 it is larger than 2 GiB.
        """
        file = write_segment(program, folder, name)  # refuses what is no graph
        from edgebudget_targets._half_precision import halved

        if self.spec.activation_dtypes[0] != "float16":
            return Lowered(file)
        half, note = halved(program)
        if half is not None:
            file = write_segment(half, folder, name)
        return Lowered(file, notes=(note,))

    def open(self, file: Path, *, exact: bool = False) -> Executor:
        """Load a segment: in this target's own engine if `exact`, else in the CPU engine.

        In the CPU engine, half-precision graphs are computed in single precision and every value
        is rounded; a GPU may add up in another order.

        Raises:
            ArtifactError: EB510, the CPU engine refuses the file.
            TargetError: EB601, no WebGPU engine answers here.
        """
        if exact:
            self._require()
            return _OnGpu(self, file)
        from edgebudget_targets._half_precision import is_half, rounded

        model = read_segment(file)
        if not is_half(model):
            return CpuExecutor(CpuSession(file))
        return CpuExecutor(CpuSession(rounded(model).SerializeToString()))

    def placement(self, file: Path) -> Placement:
        """Where every node of the file runs: in a session that forbids the CPU, else named.

        Raises:
            ArtifactError: EB510, the file is no valid model.
            TargetError: EB601 no engine answers, EB610 it crashed, EB611 it took too long, EB613
                it failed.
        """
        model = read_segment(file)
        nodes = [(n.name or f"#{i}", n.op_type) for i, n in enumerate(model.graph.node)]
        try:
            self.job({"action": "open"}, [file])
            return Placement(tuple(NodePlacement(n, op, "gpu") for n, op in nodes), "gpu")
        except NotAllOnGpu:
            result, _ = self.job({"action": "open", "allow_cpu": True}, [file])
        return Placement(place(nodes, result["nodes"]), "gpu")

    def latency(
        self,
        file: Path,
        inputs: Mapping[str, Array],
        repeats: int,
        *,
        statistic: Statistic = "p50",
    ) -> Figure:
        """A statistic of one run in ms, with input and output copied; unknown without a GPU.

        Of another GPU that has a predictor, the predicted usual time.

        Raises:
            ArtifactError: EB510, the file is no valid model.
            TargetError: as `placement`; EB613 also where nodes are left to the CPU.
            UsageError: EB142 an input is missing or has the wrong shape, EB144 no run is asked for.
        """
        device = self.spec.device
        if self._predictor is not None:
            if statistic in ("p50", "mean"):
                return self._predictor.figure(self.kernels(file))
            why = f"no {statistic} is predicted"
            return Figure(value=None, evidence="unknown", how=why, device=device)
        if self._engine.software:
            why = "no GPU here: software Vulkan shows numbers, not time"
            return Figure(value=None, evidence="unknown", how=why, device=device)
        (ms,) = self.times([file], inputs, enough_runs(repeats, statistic))
        p90, p99 = np.percentile(ms, [90, 99])
        how = (
            f"with copies to and from the GPU, p90 {p90:.3f} ms, p99 {p99:.3f} ms, "
            f"ONNX Runtime WebGPU plug-in {self._engine.version}"
        )
        return figure([ms], statistic, how, device)

    def compare(self, file: Path, other: Path, inputs: Mapping[str, Array]) -> float | None:
        """Latency of `file` over that of `other`: the median ratio of neighbouring runs."""
        if self._engine.software or self._predictor is not None:
            return None
        mine, theirs = self.times([file, other], inputs, _COMPARED)
        return float(np.median(mine / theirs))

    def energy(self, file: Path, inputs: Mapping[str, Array]) -> Figure:
        """Energy of one input in mJ beyond idle power: by the GPU's own counter, or predicted.

        Raises:
            ArtifactError: EB510, the file is no valid model.
            TargetError: EB610 the engine crashed, EB611 it took too long, EB613 it failed.
        """
        device = self.spec.device
        if self._predictor is not None:
            return self._predictor.energy_figure(self.kernels(file))
        if self._engine.software:
            why = "no GPU here: software Vulkan says nothing about energy"
            return Figure(value=None, evidence="unknown", how=why, device=device)
        shapes, _ = interface(read_segment(file, weights=False))
        _, found = self._observed(file, list(next(chunks(inputs, shapes)).values()), SECONDS)
        return replace(found, device=device)

    def single(self) -> WebGpuTarget:
        """The same target, whose files stay in single precision."""
        return WebGpuTarget(replace(self.spec, activation_dtypes=("float32",)))

    def device(self) -> Device:
        """The GPU with the host that feeds it, the plug-in's version, one thread."""
        host = here(self.spec.engine, self._engine.version, 1)
        return replace(host, cpu=f"{self._engine.adapter}, fed by {host.cpu}")

    def kernels(self, file: Path) -> tuple[Kernel, ...]:
        """Every kernel of one run, by rules of ours.

        Raises:
            ArtifactError: EB510, the file is no valid model.
            UnsupportedError: EB2xx, a shape or an operator of it is not known.
        """
        return tuple(k for _, k in _webgpu_kernels.kernels(read_segment(file)))

    def node_times(self, file: Path, model: onnx.ModelProto) -> NodeTimes:
        """What a predictor of the GPU says of each node.

        Raises:
            TargetError: EB653, this GPU has no predictor.
            UnsupportedError: EB2xx, a shape or an operator is not known.
        """
        named = _webgpu_kernels.kernels(model)
        if self._predictor is not None:
            return predictors.by_node(self._predictor, named)
        return predictors.node_times(self.device(), named)

    def observe(self, file: Path) -> Observation:
        """The usual time of one run in a short burst, and its energy where the GPU counts it.

        Raises:
            ArtifactError: EB510, the file cannot be loaded.
            TargetError: EB601 there is no GPU, EB610 its engine crashed, EB611 it took too long.
        """
        from edgebudget.graph import probe, specs

        self._require()
        noise = list(probe(specs(read_segment(file))).values())
        seconds = _OBSERVED_S if "energy_mj" in self.spec.tells else 0.0
        ms, energy = self._observed(file, noise, seconds)
        return Observation(float(np.median(ms)), self.kernels(file), (), energy.value)

    def _observed(
        self, file: Path, inputs: Sequence[Array], energy_s: float
    ) -> tuple[Array, Figure]:
        if self._observer is None or not self._observer.alive:
            self._observer = Worker(_START_S, _OBSERVE, "the WebGPU engine")
        request = {"file": str(file.resolve()), "energy_s": energy_s}
        try:
            reply, (ms,) = self._observer.ask(request, inputs)
        except EngineRefused as e:
            raise failure(str(e), self.spec.device) from e
        energy = reply.get("energy")
        return ms, UNKNOWN if energy is None else codec.decode(Figure, energy)

    def times(
        self, files: Sequence[Path], inputs: Mapping[str, Array], repeats: int
    ) -> list[Array]:
        """Milliseconds [repeats] of each file on the first sample of `inputs`, taking turns."""
        if repeats < 1:
            raise UsageError("EB144", f"latency of {repeats} runs", hint="measure 1 run or more")
        shapes, _ = interface(read_segment(files[0], weights=False))
        first = {k: v[None] for k, v in next(chunks(inputs, shapes)).items()}
        settings = {"action": "time", "repeats": repeats, "warm_up": _WARM_UP}
        result, _ = self.job(settings, files, first)
        return [np.asarray(ms) for ms in result["ms"]]

    def job(
        self,
        settings: Mapping[str, Any],
        files: Sequence[Path],
        pieces: Mapping[str, Array] | None = None,
        outputs: Sequence[str] = (),
    ) -> tuple[dict[str, Any], dict[str, Array]]:
        """Do one job of the engine with these files; see `run_job` for the errors."""
        self._require()
        pieces = pieces or {}
        count = len(next(iter(pieces.values()))) if pieces else 0
        limit_s = _START_S + _INPUT_S * count
        with tempfile.TemporaryDirectory(prefix="edgebudget-gpu-") as temp:
            models = [str(self._runnable(f, Path(temp) / f"{i}.onnx")) for i, f in enumerate(files)]
            return run_job(
                {**settings, "models": models},
                pieces,
                limit_s,
                self.spec.device,
                python=self._engine.python,
                outputs=outputs,
            )

    def _runnable(self, file: Path, aside: Path) -> Path:
        """The file, or what software Vulkan, which has no half precision, can run of it."""
        if not self._engine.software:
            return file.resolve()
        from edgebudget_targets._half_precision import is_half, to_single

        model = read_segment(file)
        if not is_half(model):
            return file.resolve()
        aside.write_bytes(to_single(model).SerializeToString())
        return aside

    def _require(self) -> None:
        state = self.available()
        if not state.ok:
            raise TargetError("EB601", f"{self.spec.name}: {state.why}", hint=state.install)


class _OnGpu:
    """A segment in the target's own engine; each call starts a process."""

    def __init__(self, target: WebGpuTarget, file: Path) -> None:
        self._target, self._file = target, file
        self._shapes, self._outputs = interface(read_segment(file, weights=False))

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run N samples, as many at a time as the segment's own batch."""
        parts = list(chunks(inputs, self._shapes))
        pieces = {k: np.stack([p[k] for p in parts]) for k in self._shapes}
        _, found = self._target.job({"action": "run"}, [self._file], pieces, self._outputs)
        return found


def _shipped(name: str) -> Predictor | None:
    """A predictor that comes with this package."""
    return read(Path(__file__).parent / "predictors" / name) if name else None


def interface(model: onnx.ModelProto) -> tuple[dict[str, Shape], list[str]]:
    """Input shapes by name, and output names."""
    weights = {w.name for w in model.graph.initializer}
    shapes: dict[str, Shape] = {
        v.name: tuple(d.dim_value or d.dim_param or None for d in v.type.tensor_type.shape.dim)
        for v in model.graph.input
        if v.name not in weights
    }
    return shapes, [v.name for v in model.graph.output]


def place(
    nodes: Sequence[tuple[str, str]], assigned: Sequence[Sequence[str]]
) -> tuple[NodePlacement, ...]:
    """One row for every node of the file, and for every node that the engine put on the CPU.

    Args:
        nodes: (name, operator) of each node of the file.
        assigned: (provider, operator, name) of each node that the engine runs; where it laid a
            node out anew, the name got a suffix.
    """
    known = {name for name, _ in nodes}
    on_cpu, inserted = set[str](), list[NodePlacement]()
    for provider, op, given in assigned:
        name = given if given in known else given.rpartition("_token_")[0]
        if provider != _CPU:
            continue
        if name in known:
            on_cpu.add(name)
        else:
            inserted.append(NodePlacement(given or op, op, "cpu", "inserted by the engine"))
    rows = [
        NodePlacement(name, op, "cpu", f"the WebGPU engine does not take this {op}")
        if name in on_cpu
        else NodePlacement(name, op, "gpu")
        for name, op in nodes
    ]
    return (*rows, *inserted)
