"""Arm Ethos-U NPUs through ExecuTorch and Arm's compiler Vela.

No simulator runs on a PC: numbers come from the TOSA reference model, which computes the graph that
Vela compiles, and time from Vela's own model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from edgebudget.layer_loads import NodeTimes, Roof
from edgebudget.session import CpuSession
from edgebudget.target import (
    Availability,
    Executor,
    Lowered,
    NodePlacement,
    Placement,
    TargetSpec,
)
from edgebudget_runtime.cost import Figure
from edgebudget_runtime.errors import TargetError
from edgebudget_targets import _vela
from edgebudget_targets._executor import CpuExecutor
from edgebudget_targets._executorch_process import EngineRefused, Worker
from edgebudget_targets._onnx_file import read_segment, write_segment
from edgebudget_targets._tosa_executor import TosaExecutor
from edgebudget_targets._vela import Estimate, Setting

if TYPE_CHECKING:
    import onnx

    from edgebudget.program import Program
    from edgebudget.workload import Array
    from edgebudget_runtime.budget import Statistic

_INSTALL = 'pip install "edgebudget[ethos-u]"'
_NEEDED = (("executorch", "1.4"), ("torchao", ""), ("ethos-u-vela", "5."), ("tosa-tools", ""))
_NPU, _CPU = "npu", "cpu"
_EDGES = frozenset({"QuantizeLinear", "DequantizeLinear"})


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds that a process may take before it is killed."""

    lower: float = 1800.0
    vela: float = 300.0
    run: float = 1800.0


class EthosUTarget:
    """One Ethos-U configuration in one system."""

    def __init__(self, spec: TargetSpec, limits: Limits | None = None) -> None:
        self.spec = spec
        self._limits = limits or Limits()
        self._setting = Setting.of(spec.options)
        self._compiler: Worker | None = None

    def available(self) -> Availability:
        """Whether ExecuTorch and Vela are installed, at versions that were tried."""
        for package, wanted in _NEEDED:
            try:
                found = version(package)
            except PackageNotFoundError:
                why = f"the package {package} is not installed"
                return Availability(ok=False, why=why, install=_INSTALL)
            if not found.startswith(wanted):
                why = f"{package} {found} is installed, {wanted.rstrip('.')} is needed"
                return Availability(ok=False, why=why, install=_INSTALL, version=found)
        engine = version(_NEEDED[0][0])
        return Availability(ok=True, version=f"{engine}, Vela {version('ethos-u-vela')}")

    def lower(self, program: Program, folder: Path, name: str) -> Lowered:
        """Write `<name>.pte`, the integer graph it was made of, and what Vela compiled.

        The .pte takes and gives integers: rounding at the graph's edges is left to the caller,
        with the steps that `<name>.graph.onnx` holds.

        Raises:
            UnsupportedError: EB241 the program is no graph, EB242 it is larger than 2 GiB,
                EB243 an operator has no counterpart in torch.
            TargetError: EB601 an engine is missing, EB610 it crashed, EB611 it took too long,
                EB612 the compiler refuses the graph.
        """
        from edgebudget.segment_graph import write_description

        self._require()
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{name}.pte"
        tosa = file.with_suffix(".tosa")
        tosa.unlink(missing_ok=True)
        with tempfile.TemporaryDirectory(prefix="edgebudget-") as scratch:
            source = write_segment(program, Path(scratch), name)
            model = read_segment(source)
            self._check_refused(model)
            left = self._compiled(source, file)
        nodes = _placed(model, left)
        graph = write_description(model, file, nodes, whole=True)
        if not tosa.is_file():
            note = "the NPU gets several pieces or none: Vela's figures and its numbers are unknown"
            return Lowered(file, (graph,), (note,))
        found = _vela.estimate(tosa, self._setting, self._limits.vela)
        memory = Figure(
            value=float(found.sram_bytes + found.dram_bytes + found.off_chip_flash_bytes
                        + found.on_chip_flash_bytes),
            evidence="simulated",
            how=f"Vela: {_memory_words(found)}",
            device=self.spec.device,
        )  # fmt: skip
        return Lowered(file, (graph, tosa), (self._words(found),), memory)

    def open(self, file: Path, *, exact: bool = False) -> Executor:
        """Load a segment: in the TOSA reference model if `exact`, else in the CPU engine.

        The CPU engine runs the graph that `rounded_as_npu` makes: bit for bit the same where
        8-bit integers are summed; tables (sigmoid, softmax) may be rounded differently.

        Raises:
            ArtifactError: EB510, a file is missing or damaged.
            TargetError: EB601 an engine is missing, EB617 the TOSA model cannot run it, since the
                NPU gets pieces of it alone.
        """
        from edgebudget import graph as graphs
        from edgebudget.segment_graph import read_graph
        from edgebudget_targets._npu_rounding import rounded_as_npu

        if exact:
            self._require()
            left = self.placement(file).fallback
            if left and not file.with_suffix(".tosa").is_file():
                raise TargetError(
                    "EB617",
                    f"{len(left)} nodes of {file.name} run outside the NPU, as {left[0].name!r}",
                    hint="take them out of the network: the TOSA model runs whole graphs alone",
                )
            return TosaExecutor(file, self._limits.run)
        model = graphs.canonical_bytes(rounded_as_npu(read_graph(file)))
        return CpuExecutor(CpuSession(model))

    def placement(self, file: Path) -> Placement:
        """Which nodes the NPU takes, as the compiler left them.

        Raises:
            ArtifactError: EB510, what the file was made of is not there.
        """
        from edgebudget.segment_graph import placed_nodes

        return Placement(placed_nodes(file), _NPU)

    def latency(
        self,
        file: Path,
        inputs: Mapping[str, Array],
        repeats: int,
        *,
        statistic: Statistic = "p50",
    ) -> Figure:
        """Vela's estimate in ms, or unknown where the NPU does not take all; nothing is run.

        Raises:
            TargetError: EB601 Vela is missing, EB610 it failed, EB611 it took too long.
        """
        device = self.spec.device
        if statistic not in ("p50", "mean"):
            why = f"the compiler's estimate has no {statistic}"
            return Figure(value=None, evidence="unknown", how=why, device=device)
        if not file.with_suffix(".tosa").is_file():
            left = len(self.placement(file).fallback)
            why = f"{left} nodes run outside the NPU, whose time the compiler does not estimate"
            return Figure(value=None, evidence="unknown", how=why, device=device)
        found = self.estimate(file)
        return Figure(value=found.ms, evidence="simulated", how=self._words(found), device=device)

    def compare(self, file: Path, other: Path, inputs: Mapping[str, Array]) -> float | None:
        """Estimated latency of `file` over that of `other`; None where one is unknown."""
        mine, theirs = (self.latency(f, inputs, 1).value for f in (file, other))
        return mine / theirs if mine is not None and theirs else None

    def estimate(self, file: Path, setting: Setting | None = None) -> Estimate:
        """Vela's report; `setting` asks for another NPU of the same kind (U55 and U65, or U85).

        Raises:
            ArtifactError: EB510, the .tosa file is missing.
            TargetError: EB601 Vela is missing, EB610 it failed, EB611 it took too long.
        """
        self._require()
        tosa = file.with_suffix(".tosa")
        return _vela.estimate(tosa, setting or self._setting, self._limits.vela)

    def node_times(self, file: Path, model: onnx.ModelProto) -> NodeTimes:
        """What Vela's cycles say of each node that it schedules as the graph has it.

        Raises:
            ArtifactError: EB510, the .tosa file is missing.
            TargetError: EB601 Vela is missing, EB610 it failed, EB611 it took too long.
        """
        found = self.estimate(file)
        device, macs = self.spec.device, int(self._setting.accelerator.rpartition("-")[2])
        how = f"of {self._setting.accelerator} at {found.clock_hz / 1e6:.0f} MHz, by design"
        figures = (
            Figure(value=v, evidence="simulated", how=how, device=device)
            for v in (macs * found.clock_hz, found.sram_bytes_per_s)
        )
        ms = _vela.by_node(found, model)
        return NodeTimes(ms, "simulated", self._words(found), Roof(*figures))

    def _words(self, found: Estimate) -> str:
        return (
            f"Vela {version('ethos-u-vela')}'s estimate for {self._setting.system_config}, "
            f"{self._setting.memory_mode}: {found.cycles:.0f} cycles at "
            f"{found.clock_hz / 1e6:.0f} MHz, {_memory_words(found)}, "
            f"{found.off_chip_traffic_bytes} B moved off chip; not compared with silicon"
        )

    def _check_refused(self, model: onnx.ModelProto) -> None:
        refused = set(self.spec.options.get("refuses", "").split())
        for node in model.graph.node:
            if node.op_type in refused:
                raise TargetError(
                    "EB612",
                    f"{self.spec.device} refuses node {node.name!r}: its compiler fails on "
                    f"{node.op_type}",
                    hint=f"take {node.op_type} out of the model and do it after the inference",
                )

    def _compiled(self, source: Path, file: Path) -> dict[str, str]:
        if self._compiler is None or not self._compiler.alive:
            self._compiler = Worker(self._limits.lower)
        request = {
            "do": "lower ethos-u",
            "graph": str(source),
            "out": str(file.resolve()),
            "accelerator": self._setting.accelerator,
            "system_config": self._setting.system_config,
            "memory_mode": self._setting.memory_mode,
            "largest_block": self.spec.options["largest_block"],
        }
        try:
            reply, _ = self._compiler.ask(request)
        except EngineRefused as e:
            raise TargetError(
                "EB612",
                f"the compiler for {self.spec.device} refuses the graph: {e}",
                hint="compile for another target, or replace the operators it names",
            ) from e
        left: dict[str, str] = reply["left"]
        return left

    def _require(self) -> None:
        state = self.available()
        if not state.ok:
            raise TargetError("EB601", f"{self.spec.name}: {state.why}", hint=state.install)


def _placed(model: onnx.ModelProto, left: Mapping[str, str]) -> list[NodePlacement]:
    """Every node; rounding at the edges is no part of the .pte and is not listed."""
    given = {v.name for v in model.graph.output}
    taken = {v.name for v in model.graph.input}
    nodes = []
    for i, node in enumerate(model.graph.node):
        edge = node.input[0] in taken if node.input else False
        if node.op_type in _EDGES and (edge or node.output[0] in given):
            if node.name not in left:
                continue
        where = _CPU if node.name in left else _NPU
        nodes.append(
            NodePlacement(node.name or f"#{i}", node.op_type, where, left.get(node.name, ""))
        )
    known = {n.name for n in model.graph.node}
    return nodes + [NodePlacement(n, n, _CPU, why) for n, why in left.items() if n not in known]


def _memory_words(found: Estimate) -> str:
    kinds = {
        "SRAM at its peak": found.sram_bytes,
        "DRAM": found.dram_bytes,
        "off-chip flash": found.off_chip_flash_bytes,
        "on-chip flash": found.on_chip_flash_bytes,
    }
    return ", ".join(f"{many} B {kind}" for kind, many in kinds.items() if many)
