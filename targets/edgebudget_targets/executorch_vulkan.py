"""GPUs with Vulkan through ExecuTorch: `.pte` files made ahead of time, for the device to run.

Nothing here runs them. Counts, bytes and placement are of the file; quality is that of its graph
in the CPU engine, each value rounded to half precision where the file computes in it; latency is
unknown until `edgebudget profile` has seen a device.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from edgebudget.session import CpuSession
from edgebudget.target import Availability, Executor, Lowered, NodePlacement, Placement, TargetSpec
from edgebudget_runtime.cost import Figure
from edgebudget_runtime.errors import TargetError
from edgebudget_targets._executor import CpuExecutor
from edgebudget_targets._executorch_process import EngineRefused, Worker
from edgebudget_targets._onnx_file import read_segment, write_segment

if TYPE_CHECKING:
    from edgebudget.program import Program
    from edgebudget.workload import Array
    from edgebudget_runtime.budget import Statistic

_INSTALL = 'pip install "edgebudget[executorch]"'
_NEEDED = "1.4"
_LOWER_S = 1800.0
_GPU, _CPU = "gpu", "cpu"
_UNSEEN = "no Vulkan engine of ExecuTorch runs on a PC"


class VulkanTarget:
    """ExecuTorch's Vulkan back end, ahead of time."""

    def __init__(self, spec: TargetSpec, limit_s: float = _LOWER_S) -> None:
        self.spec = spec
        self._halves = spec.activation_dtypes[0] == "float16"
        self._limit_s = limit_s
        self._compiler: Worker | None = None

    def available(self) -> Availability:
        """Whether ExecuTorch's compiler is installed, at a version that was tried."""
        try:
            found = version("executorch")
        except PackageNotFoundError:
            why = "the package executorch is not installed"
            return Availability(ok=False, why=why, install=_INSTALL)
        if not f"{found}.".startswith(f"{_NEEDED}."):
            why = f"executorch {found} is installed, {_NEEDED} is needed"
            return Availability(ok=False, why=why, install=_INSTALL, version=found)
        return Availability(ok=True, version=found)

    def lower(self, program: Program, folder: Path, name: str) -> Lowered:
        """Write `<name>.pte` and, beside it, the float graph that it was made of.

        Raises:
            UnsupportedError: EB241 the program is no graph, EB242 it is larger than 2 GiB,
                EB243 an operator has no counterpart in torch.
            TargetError: EB601 ExecuTorch is missing, EB610 it crashed, EB611 it took too long,
                EB612 its compiler refuses the graph.
        """
        from edgebudget.segment_graph import write_description
        from edgebudget_targets._half_precision import halved

        self._require()
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{name}.pte"
        notes = [f"{_UNSEEN}: numbers are those of the graph in the CPU engine, time is unknown"]
        half = self._halves
        with tempfile.TemporaryDirectory(prefix="edgebudget-") as scratch:
            source = write_segment(program, Path(scratch), name)
            if half:
                made, note = halved(program)
                half = made is not None
                notes.append(note)
            left = self._compiled(source, file, half)
            model = read_segment(source)
        nodes = [
            NodePlacement(n.name or f"#{i}", n.op_type, _CPU if n.name in left else _GPU,
                          left.get(n.name, ""))
            for i, n in enumerate(model.graph.node)
        ]  # fmt: skip
        known = {n.name for n in nodes}
        nodes += [NodePlacement(n, n, _CPU, why) for n, why in left.items() if n not in known]
        return Lowered(file, (write_description(model, file, nodes, whole=True),), tuple(notes))

    def open(self, file: Path, *, exact: bool = False) -> Executor:
        """Load a segment's graph in the CPU engine, rounded as the file computes.

        Raises:
            ArtifactError: EB510, a file is missing or damaged.
            TargetError: EB616, `exact`: the GPU's own engine does not run here.
        """
        from edgebudget import graph as graphs
        from edgebudget.segment_graph import graph_file, read_graph
        from edgebudget_targets._half_precision import halved, rounded

        if exact:
            raise TargetError(
                "EB616",
                f"{self.spec.name}: {_UNSEEN}",
                hint="run the .pte on a device with ExecuTorch's Vulkan runtime",
            )
        model = read_graph(file)
        half = halved(graphs.program(model))[0] if self._halves else None  # as `lower` decided
        if half is None:
            return CpuExecutor(CpuSession(graph_file(file)))
        return CpuExecutor(CpuSession(rounded(half.body).SerializeToString()))

    def placement(self, file: Path) -> Placement:
        """Which nodes the GPU takes, as the compiler left them.

        Raises:
            ArtifactError: EB510, what the file was made of is not there.
        """
        from edgebudget.segment_graph import placed_nodes

        return Placement(placed_nodes(file), _GPU)

    def latency(
        self,
        file: Path,
        inputs: Mapping[str, Array],
        repeats: int,
        *,
        statistic: Statistic = "p50",
    ) -> Figure:
        """Unknown: nothing here runs the file."""
        return Figure(value=None, evidence="unknown", how=_UNSEEN, device=self.spec.device)

    def compare(self, file: Path, other: Path, inputs: Mapping[str, Array]) -> float | None:
        """None: nothing here runs the files."""
        return None

    def _compiled(self, source: Path, file: Path, half: bool) -> dict[str, str]:
        if self._compiler is None or not self._compiler.alive:
            self._compiler = Worker(self._limit_s)
        request = {"do": "lower vulkan", "graph": str(source), "out": str(file.resolve()),
                   "half": half}  # fmt: skip
        try:
            reply, _ = self._compiler.ask(request)
        except EngineRefused as e:
            raise TargetError(
                "EB612",
                f"ExecuTorch's Vulkan compiler refuses the graph: {e}",
                hint="compile for another target, or replace the operators it names",
            ) from e
        left: dict[str, str] = reply["left"]
        return left

    def _require(self) -> None:
        state = self.available()
        if not state.ok:
            raise TargetError("EB601", f"{self.spec.name}: {state.why}", hint=state.install)
