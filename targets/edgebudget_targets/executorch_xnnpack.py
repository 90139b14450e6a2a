"""This machine's CPU through ExecuTorch and XNNPACK: `.pte` files, measured latency."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgebudget import predictors
from edgebudget.cpu_features import cpu_features
from edgebudget.energy.metering import metered, told
from edgebudget.kernels import Kernel, Observation
from edgebudget.latency_statistic import enough_runs, figure
from edgebudget.target import Availability, Lowered, NodePlacement, Placement, TargetSpec
from edgebudget_runtime.cost import Figure
from edgebudget_runtime.device_id import Device, here
from edgebudget_runtime.errors import ArtifactError, TargetError, UnsupportedError, UsageError
from edgebudget_targets._executor import chunks
from edgebudget_targets._executorch_process import EngineRefused, Worker, opened
from edgebudget_targets._executorch_worker import WARM_UP
from edgebudget_targets._onnx_file import write_segment

if TYPE_CHECKING:
    import onnx

    from edgebudget.layer_loads import NodeTimes
    from edgebudget.program import Program
    from edgebudget.workload import Array
    from edgebudget_runtime.budget import Statistic
    from edgebudget_targets._graph_kernels import NodeKernel

_INSTALL = 'pip install "edgebudget[executorch]"'
_NEEDED = (("executorch", "1.4"), ("torchao", ""))  # and the version they must begin with
_LOWER_S, _RUN_S = 1800.0, 600.0
_COMPARED = 50  # runs of each file
_METERED = 100  # runs between two looks at an energy counter
_ONLY = "forward"
_OWN, _OTHER = "xnnpack", "portable"
_BATCH_GAP = 1e-4  # of an output's largest magnitude: float kernels add up in another order


class XnnpackTarget:
    """ExecuTorch's XNNPACK back end on this machine."""

    def __init__(self, spec: TargetSpec) -> None:
        self._threads = int(spec.options["threads"])
        self.spec = replace(spec, device=cpu_features().model, tells=told(spec.tells, "cpu"))
        self._compilers = threading.local()  # one a thread: several may lower at once
        self._loaded: tuple[Path, Worker] | None = None  # by `placement`, for `open`
        self._observer: Worker | None = None

    def available(self) -> Availability:
        """Whether ExecuTorch is installed, at a version that was tried."""
        for package, wanted in _NEEDED:
            try:
                found = version(package)
            except PackageNotFoundError:
                why = f"the package {package} is not installed"
                return Availability(ok=False, why=why, install=_INSTALL)
            if wanted and not f"{found}.".startswith(f"{wanted}."):
                why = f"{package} {found} is installed, {wanted} is needed"
                return Availability(ok=False, why=why, install=_INSTALL, version=found)
        return Availability(ok=True, version=version(_NEEDED[0][0]))

    def in_batches(self, most: int) -> XnnpackTarget:
        """The same target, whose files take 1 to `most` samples at a time."""
        options = {**self.spec.options, "max_batch": str(most)}
        return XnnpackTarget(replace(self.spec, options=options))

    def lower(self, program: Program, folder: Path, name: str) -> Lowered:
        """Write `<name>.pte` and, beside it, the graph that it was made of.

        A file for several samples at a time is run on noise: as many as it takes, and one by one.

        Raises:
            UnsupportedError: EB241 the program is no graph, EB242 it is larger than 2 GiB,
                EB243 an operator has no counterpart in torch, EB244 the graph takes one sample.
            TargetError: EB601 ExecuTorch is missing, EB610 it crashed, EB611 it took too long,
                EB612 its compiler refuses the graph, EB618 several samples at a time get other
                answers.
        """
        from edgebudget.segment_graph import write_description
        from edgebudget_targets._onnx_file import read_segment

        self._require()
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{name}.pte"
        with tempfile.TemporaryDirectory(prefix="edgebudget-") as scratch:
            source = write_segment(program, Path(scratch), name)
            left = self._compiled({_ONLY: source}, file)[_ONLY]
            model = read_segment(source)
        nodes = [
            NodePlacement(n.name or f"#{i}", n.op_type, _OTHER if n.name in left else _OWN,
                          left.get(n.name, ""))
            for i, n in enumerate(model.graph.node)
        ]  # fmt: skip
        known = {n.name for n in nodes}
        nodes += [NodePlacement(n, n, _OTHER, why) for n, why in left.items() if n not in known]
        extra = (write_description(model, file, nodes),)
        if self.spec.max_batch > 1:
            self._check_batch(file, program)
        return Lowered(file, extra, max_batch=self.spec.max_batch)

    def pack(self, programs: Mapping[str, Program], files: Mapping[str, Path], into: Path) -> None:
        """Write programs as the methods of one file, which stores equal tensors once.

        `files` are the same programs lowered one by one: each method must answer as its file does,
        bit for bit, on noise.

        Raises:
            TargetError: as `lower`; EB615, a method answers otherwise than its file.
        """
        from edgebudget.graph import probe

        self._require()
        with tempfile.TemporaryDirectory(prefix="edgebudget-") as scratch:
            self._compiled(
                {k: write_segment(p, Path(scratch), k) for k, p in programs.items()}, into
            )
        names = list(programs)
        worker = opened([into] * len(names), _all_cores(), _RUN_S, names)
        alone = opened([files[n] for n in names], _all_cores(), _RUN_S)
        try:
            for i, name in enumerate(names):
                noise = list(probe(programs[name].inputs).values())
                ask = {"do": "run", "index": i, "pieces": 1}
                pairs = zip(worker.ask(ask, noise)[1], alone.ask(ask, noise)[1], strict=True)
                if not all(np.array_equal(a, b, equal_nan=True) for a, b in pairs):
                    into.unlink()
                    raise TargetError(
                        "EB615",
                        f"method {name} of {into.name} answers otherwise than {files[name].name}",
                        hint="report this: the two come from one graph",
                    )
        except EngineRefused as e:
            raise _failed(str(e)) from e
        finally:
            worker.close()
            alone.close()

    def open(self, file: Path, *, exact: bool = False) -> PteExecutor:
        """Load a segment on all cores; this engine is the target's own, `exact` or not.

        Raises:
            ArtifactError: EB510, the file is missing, damaged, or made for another engine.
            TargetError: EB601, ExecuTorch is missing.
        """
        self._require()
        spare, self._loaded = self._loaded, None
        if spare is not None and spare[0] == file and spare[1].alive:
            return PteExecutor(file, spare[1])
        return PteExecutor(file, opened([file], _all_cores(), _RUN_S))

    def placement(self, file: Path) -> Placement:
        """Which nodes XNNPACK took, and which portable kernels run, as the compiler left them.

        Raises:
            ArtifactError: EB510, the file cannot be loaded, or what it was made of is not there.
            TargetError: EB601, ExecuTorch is missing.
        """
        from edgebudget.segment_graph import placed_nodes

        self._require()
        self._loaded = (file, opened([file], _all_cores(), _RUN_S))
        return Placement(placed_nodes(file), _OWN)

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
            ArtifactError: EB510, the file cannot be loaded.
            TargetError: EB601 ExecuTorch is missing, EB610 it crashed, EB611 it took too long.
            UsageError: EB142 an input is missing or has the wrong shape, EB144 no run is asked for.
        """
        (ms,) = self.chain_times([file], [inputs], enough_runs(repeats, statistic))
        threads = f"{self._threads} thread{'s' if self._threads > 1 else ''}"
        how = f"{threads}, ExecuTorch {version('executorch')} with XNNPACK"
        return figure([ms], statistic, how, self.spec.device)

    def compare(self, file: Path, other: Path, inputs: Mapping[str, Array]) -> float | None:
        """Latency of `file` over that of `other`: the median ratio of neighbouring runs."""
        mine, theirs = self.chain_times([file, other], [inputs] * 2, _COMPARED)
        return float(np.median(mine / theirs))

    def energy(self, file: Path, inputs: Mapping[str, Array]) -> Figure:
        """Energy of one run in mJ beyond idle power, by the processor's counter if it has one.

        Raises:
            ArtifactError: EB510, the file cannot be loaded.
            TargetError: EB601 ExecuTorch is missing, EB610 it crashed, EB611 it took too long.
            UsageError: EB142, an input is missing or has the wrong shape.
        """
        self._require()
        first = list(next(chunks(inputs, _shapes(file))).values())
        worker = opened([file], self._threads, _RUN_S)

        def some() -> int:
            worker.ask({"do": "time", "repeats": _METERED, "counts": [len(first)]}, first)
            return _METERED + WARM_UP

        try:
            return replace(metered("cpu", some), device=self.spec.device)
        except EngineRefused as e:
            raise _failed(str(e)) from e
        finally:
            worker.close()

    def device(self) -> Device:
        """This machine, ExecuTorch's version, and the threads of a measurement."""
        return here("executorch-xnnpack", version("executorch"), self._threads)

    def kernels(self, file: Path) -> tuple[Kernel, ...]:
        """Every kernel of one run, as XNNPACK fuses the graph that the file was made of.

        Raises:
            ArtifactError: EB510, the graph beside the file is missing or damaged.
            UnsupportedError: EB2xx, a shape or an operator of it is not known.
        """
        from edgebudget.segment_graph import read_graph

        return tuple(k for _, k in _by_node(file, read_graph(file)))

    def node_times(self, file: Path, model: onnx.ModelProto) -> NodeTimes:
        """What this machine's predictor says of each node; the engine does not time them.

        Raises:
            TargetError: EB653, this machine has no predictor.
            UnsupportedError: EB2xx, a shape or an operator is not known.
        """
        return predictors.node_times(self.device(), _by_node(file, model))

    def observe(self, file: Path) -> Observation:
        """The usual time of one run in a short burst; the engine does not tell its kernels'.

        Raises:
            ArtifactError: EB510, the file cannot be loaded.
            TargetError: EB601 ExecuTorch is missing, EB610 it crashed, EB611 it took too long.
        """
        from edgebudget.graph import probe, specs
        from edgebudget.segment_graph import read_graph

        self._require()
        if self._observer is None or not self._observer.alive:
            self._observer = opened([], self._threads, _RUN_S)
        noise = list(probe(specs(read_graph(file))).values())
        request = {"do": "observe", "file": str(file.resolve())}
        try:
            _, (ms,) = self._observer.ask(request, noise)
        except EngineRefused as e:
            raise ArtifactError(
                "EB510",
                f"ExecuTorch cannot run {file.name}: {e}",
                hint="compile the model again",
            ) from e
        return Observation(float(np.median(ms)), self.kernels(file), ())

    def chain_times(
        self, files: Sequence[Path], inputs: Sequence[Mapping[str, Array]], repeats: int
    ) -> list[Array]:
        """Milliseconds [repeats] of each file on the first sample of its inputs, taking turns.

        Raises:
            As `latency`.
        """
        if repeats < 1:
            raise UsageError("EB144", f"latency of {repeats} runs", hint="measure 1 run or more")
        self._require()
        first = [
            list(next(chunks(x, _shapes(f))).values()) for f, x in zip(files, inputs, strict=True)
        ]
        request = {"do": "time", "repeats": repeats, "counts": [len(x) for x in first]}
        worker = opened(files, self._threads, _RUN_S)
        try:
            _, (found,) = worker.ask(request, [array for x in first for array in x])
        except EngineRefused as e:
            raise _failed(str(e)) from e
        finally:
            worker.close()
        return list(found)

    def _compiled(self, sources: Mapping[str, Path], file: Path) -> dict[str, dict[str, str]]:
        compiler: Worker | None = getattr(self._compilers, "worker", None)
        if compiler is None or not compiler.alive:
            self._compilers.worker = compiler = Worker(_LOWER_S)
        paths = {k: str(v) for k, v in sources.items()}
        request = {
            "do": "lower",
            "graphs": paths,
            "out": str(file.resolve()),
            "max_batch": self.spec.max_batch,
        }
        try:
            reply, _ = compiler.ask(request)
        except EngineRefused as e:
            raise TargetError(
                "EB612",
                f"ExecuTorch's compiler refuses the graph: {e}",
                hint="compile for another target, or replace the operators it names",
            ) from e
        left: dict[str, dict[str, str]] = reply["left"]
        return left

    def _check_batch(self, file: Path, program: Program) -> None:
        from edgebudget.graph import probe

        many = self.spec.max_batch
        wide = [replace(s, shape=(many * s.shape[0], *s.shape[1:])) for s in program.inputs]
        noise = list(probe(wide).values())
        worker = opened([file], _all_cores(), _RUN_S)
        try:
            # The largest first, as the runtime does: XNNPACK answers wrongly where inputs grow
            # beyond all that it has seen.
            together, each = (
                worker.ask({"do": "run", "index": 0, "pieces": n}, noise)[1] for n in (1, many)
            )
        except EngineRefused as e:
            file.unlink()
            raise UnsupportedError(
                "EB244",
                f"the graph cannot take 1 to {many} samples at a time: {e}",
                hint="try another --max-batch, or compile without",
            ) from e
        finally:
            worker.close()
        for a, b in zip(together, each, strict=True):
            gap = float(np.abs(a.astype(np.float64) - b).max(initial=0.0))
            if a.shape != b.shape or not gap <= _BATCH_GAP * float(np.abs(b).max(initial=0.0)):
                file.unlink()
                raise TargetError(
                    "EB618",
                    f"{file.name} answers {many} samples at a time otherwise than one by one, by "
                    f"{gap:.3g}",
                    hint="compile without --max-batch",
                )

    def _require(self) -> None:
        state = self.available()
        if not state.ok:
            raise TargetError("EB601", f"{self.spec.name}: {state.why}", hint=state.install)


class PteExecutor:
    """A segment in ExecuTorch's runtime, in a process of its own."""

    def __init__(self, file: Path, worker: Worker) -> None:
        from edgebudget.segment_graph import read_graph

        self._outputs = tuple(o.name for o in read_graph(file).graph.output)
        self._shapes = _shapes(file)
        self._worker = worker

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run N samples, as many at a time as the segment's own batch.

        Raises:
            UsageError: EB142, an input is missing or has the wrong shape.
            TargetError: EB610 the engine crashed, EB611 it took too long, EB613 it failed.
        """
        parts = list(chunks(inputs, self._shapes))
        whole = [np.concatenate([p[k] for p in parts]) for k in self._shapes]
        try:
            _, values = self._worker.ask({"do": "run", "index": 0, "pieces": len(parts)}, whole)
        except EngineRefused as e:
            raise _failed(str(e)) from e
        return dict(zip(self._outputs, values, strict=True))


def _by_node(file: Path, model: onnx.ModelProto) -> list[NodeKernel]:
    from edgebudget.segment_graph import placed_nodes
    from edgebudget_targets import _xnnpack_kernels

    left = {n.name for n in placed_nodes(file) if n.processor != _OWN}
    return _xnnpack_kernels.kernels(model, left)


def _all_cores() -> int:
    return os.cpu_count() or 1


def _shapes(file: Path) -> dict[str, tuple[int | str | None, ...]]:
    from edgebudget import graph as graphs
    from edgebudget.segment_graph import read_graph

    return {s.name: s.shape for s in graphs.specs(read_graph(file))}


def _failed(what: str) -> TargetError:
    return TargetError(
        "EB613",
        f"ExecuTorch failed while running: {what}",
        hint="`edgebudget doctor` says which engines work here",
    )
