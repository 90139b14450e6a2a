"""The vendor's NPU compiler and emulator: compile, place, estimate and run one file."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgebudget_runtime.errors import TargetError
from edgebudget_targets._executor import Shape, chunks
from edgebudget_targets._hexagon_limits import checked_knobs, culprits, instead
from edgebudget_targets._onnx_file import read_segment
from edgebudget_targets._qnn_process import Job, NotAllOnNpu, run_jobs
from edgebudget_targets._qnn_report import mark_nodes, place, read_estimate, refusals

if TYPE_CHECKING:
    from edgebudget.target import NodePlacement, TargetSpec
    from edgebudget.workload import Array


@dataclass(frozen=True, slots=True)
class Limits:
    """How long the engine may take, and how many processes share the inputs."""

    start_s: float = 600.0  # loading and compiling the graph
    input_s: float = 900.0  # one input of the segment's own batch
    workers: int = 2  # each uses one to two cores; two were 18 % faster than one on two cores


@dataclass(frozen=True, slots=True)
class Emulator:
    """One SoC of the vendor's compiler and emulator.

    Quantization at the graph's edges runs on the NPU: by default the engine moves it to the CPU.
    """

    spec: TargetSpec
    limits: Limits = Limits()

    def run(self, file: Path, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run N samples; see `run_jobs` for the errors, and `chunks` for EB142."""
        shapes, outputs = _interface(file)
        pieces = list(chunks(inputs, shapes))
        with tempfile.TemporaryDirectory(prefix="edgebudget-npu-") as temp:
            folder = Path(temp)
            for i, name in enumerate(shapes):
                np.save(folder / f"input{i}.npy", np.stack([p[name] for p in pieces]))
            cuts = np.linspace(0, len(pieces), min(self.limits.workers, len(pieces)) + 1)
            ends = [int(c) for c in cuts]
            jobs = [self._job(folder / f"part{i}", file, "run") for i in range(len(ends) - 1)]
            for job, first, last in zip(jobs, ends, ends[1:], strict=False):
                job.settings.update(inputs=temp, names=list(shapes), first=first, last=last)
            self._do(*jobs, file=file, inputs=len(pieces))
            return {
                name: np.concatenate([np.load(j.folder / f"output{i}.npy") for j in jobs])
                for i, name in enumerate(outputs)
            }

    def place(self, file: Path) -> tuple[NodePlacement, ...]:
        """Where every node of the file runs; see `run_jobs` for the errors."""
        model = read_segment(file)
        named = [(n.name or f"#{i}", n.op_type) for i, n in enumerate(model.graph.node)]
        mark_nodes(model)
        with tempfile.TemporaryDirectory(prefix="edgebudget-npu-") as temp:
            marked = Path(temp) / "model.onnx"
            marked.write_bytes(model.SerializeToString())
            job = self._job(Path(temp) / "strict", marked, "open", record=True)
            try:
                (result,) = self._do(job, file=file)
                reasons: dict[int, str] = {}
            except NotAllOnNpu:
                job = self._job(Path(temp) / "free", marked, "open", record=True)
                job.settings.update(allow_cpu=True, verbose=True)
                (result,) = self._do(job, file=file)
                reasons = refusals(job.log(), [name for name, _ in named])
        return place(named, [(p, op, name) for p, op, name in result["nodes"]], reasons)

    def estimate(self, file: Path, knobs: Mapping[str, int] | None = None) -> dict[str, float]:
        """The compiler's own time (us) and DRAM traffic (bytes); empty where there is none.

        Raises:
            UsageError: EB145, there is no such knob or value; else see `run_jobs`.
        """
        chosen = checked_knobs(knobs or {})
        with tempfile.TemporaryDirectory(prefix="edgebudget-npu-") as temp:
            job = self._job(Path(temp), file, "open")
            job.settings["options"] |= {
                "profiling_level": "basic",
                "profiling_file_path": "estimate.csv",
                **chosen,
            }
            self._do(job, file=file)
            return read_estimate(job.folder / "estimate.csv")

    def compile(
        self,
        file: Path,
        context: Path,
        *,
        knobs: Mapping[str, int] | None = None,
        socs: Mapping[str, str] | None = None,
    ) -> None:
        """Write the compiled form of `file`, checked by loading it in a fresh process.

        `socs` (number -> generation) puts several SoCs into one file (without knobs), which the
        emulator cannot load: it holds no code for a PC. The engine puts the model's path into the
        context: a fixed name keeps the bytes equal.
        """
        chosen = checked_knobs(knobs or {})
        if socs:
            chosen |= {"soc_model": ",".join(socs), "htp_arch": ",".join(socs.values())}
        with tempfile.TemporaryDirectory(prefix="edgebudget-npu-") as temp:
            folder = Path(temp)
            (folder / "model.onnx").write_bytes(read_segment(file).SerializeToString())
            job = self._job(folder, "model.onnx", "open")
            job.settings["context"] = "context.onnx"
            job.settings["options"] |= chosen
            self._do(job, file=file)
            made = folder / "context.onnx"
            if not made.is_file():
                raise TargetError(
                    "EB614",
                    f"the engine made no compiled context of {file.name}",
                    hint="deploy the .onnx itself: the device compiles it on first use",
                )
            if socs:
                _check_several(made)
            else:
                self._do(self._job(folder / "again", made, "open"), file=file)
            aside = context.with_name(f".{context.name}.part")
            aside.write_bytes(made.read_bytes())
            aside.replace(context)

    def _job(self, folder: Path, model: Path | str, action: str, *, record: bool = False) -> Job:
        options = {
            "soc_model": self.spec.options["soc_model"],
            "offload_graph_io_quantization": "0",
        }
        # The worker runs in its own folder: a plain name is a file of that folder.
        where = model if isinstance(model, str) else str(model.resolve())
        settings = {"action": action, "model": where, "options": options, "record": record}
        return Job(folder, settings)

    def _do(self, *jobs: Job, file: Path, inputs: int = 0) -> list[dict[str, Any]]:
        limit_s = self.limits.start_s + self.limits.input_s * inputs
        try:
            return run_jobs(jobs, limit_s, self.spec.device)
        except TargetError as e:
            found = _refused(file, self.spec) if e.code == "EB612" else []
            if not found:
                raise
            ops = sorted({op for _, op in found})
            raise TargetError(
                e.code,
                e.what,
                hint=f"it refuses {', '.join(ops)}: {instead(ops[0])}",
            ) from None


def _interface(file: Path) -> tuple[dict[str, Shape], list[str]]:
    """Input shapes by name, and output names."""
    graph = read_segment(file, weights=False).graph
    weights = {w.name for w in graph.initializer}
    shapes: dict[str, Shape] = {
        v.name: tuple(d.dim_value or d.dim_param or None for d in v.type.tensor_type.shape.dim)
        for v in graph.input
        if v.name not in weights
    }
    return shapes, [v.name for v in graph.output]


def _refused(file: Path, spec: TargetSpec) -> list[tuple[str, str]]:
    """Nodes of this file that are known to make the SoC's compiler fail."""
    return culprits(read_segment(file, weights=False), spec)


def _check_several(context: Path) -> None:
    """A context of several SoCs says so, and is all there is in the graph."""
    nodes = read_segment(context).graph.node
    several = [a.i for n in nodes for a in n.attribute if a.name == "is_multi_soc_ep_context"]
    if [n.op_type for n in nodes] != ["EPContext"] or several != [1]:
        raise TargetError(
            "EB614",
            "the engine made no compiled context for several SoCs",
            hint="compile for one SoC at a time",
        )
