"""Qualcomm Hexagon NPUs through ONNX Runtime's QNN plug-in, whose emulator runs on a PC.

The emulator shows which nodes the NPU takes and computes what the SoC's generation computes.
It says nothing about time; for some SoCs the compiler prints an estimate of its own.
"""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from edgebudget.cpu_features import cpu_features
from edgebudget.session import CpuSession
from edgebudget.target import Availability, Executor, Lowered, Placement, TargetSpec
from edgebudget_runtime.cost import Figure
from edgebudget_runtime.errors import TargetError
from edgebudget_targets._executor import CpuExecutor
from edgebudget_targets._onnx_file import write_segment
from edgebudget_targets._qnn_emulator import Emulator, Limits
from edgebudget_targets._qnn_process import Job, NotAllOnNpu, run_jobs

if TYPE_CHECKING:
    from edgebudget.program import Program
    from edgebudget.workload import Array
    from edgebudget_runtime.budget import Statistic

_INSTALL = 'pip install "edgebudget[qnn]"'
_PROBE_S = 120.0


class HexagonTarget:
    """One Qualcomm SoC's NPU."""

    def __init__(self, spec: TargetSpec, limits: Limits | None = None) -> None:
        self.spec = spec
        self._emulator = Emulator(spec, limits or Limits())

    def available(self) -> Availability:
        """Whether the plug-in is installed and starts."""
        if find_spec("onnxruntime_qnn") is None:
            why = "the package onnxruntime-qnn is not installed"
            if platform.system() not in {"Linux", "Windows"}:
                why += f", and has no build for {platform.system()}"
            return Availability(ok=False, why=why, install=_INSTALL)
        return _probe()

    def lower(self, program: Program, folder: Path, name: str) -> Lowered:
        """Write `<name>.onnx` and, where the engine can, its compiled form `<name>_ctx.onnx`.

        The compiled form is for this SoC alone and was loaded once more in a fresh emulator.

        Raises:
            UnsupportedError: EB241 the program is no graph, EB242 it is larger than 2 GiB.
        """
        file = write_segment(program, folder, name)
        context = folder / f"{name}_ctx.onnx"
        try:
            self._require()
            self._emulator.compile(file, context)
        except TargetError as e:
            context.unlink(missing_ok=True)
            return Lowered(file, notes=(f"no compiled context: {e.what}",))
        note = f"{context.name} is compiled for {self.spec.device} and loads in its emulator"
        return Lowered(file, (context,), (note,))

    def open(self, file: Path, *, exact: bool = False) -> Executor:
        """Load a segment: in the emulator if `exact`, else in the CPU engine.

        The CPU engine computes the same integer graph, but rounds differently in every layer.

        Raises:
            ArtifactError: EB510, the CPU engine refuses the file.
            TargetError: EB601, the NPU engine is missing.
        """
        if exact:
            self._require()
            return _Emulated(self._emulator, file)
        # Without VNNI, x86 sums byte products in 16 bits, and clips where the NPU does not.
        precise = {"session.x64quantprecision": "1"} if cpu_features().saturates else {}
        return CpuExecutor(CpuSession(file, entries=precise))

    def placement(self, file: Path) -> Placement:
        """Where every node of the file runs, quantization at the edges included.

        Raises:
            ArtifactError: EB510, the file is no valid model.
            TargetError: EB601 the engine is missing, EB610 it crashed, EB611 it took too long,
                EB612 it refuses the graph, EB613 it failed.
        """
        self._require()
        return Placement(self._emulator.place(file), "npu")

    def latency(
        self,
        file: Path,
        inputs: Mapping[str, Array],
        repeats: int,
        *,
        statistic: Statistic = "p50",
    ) -> Figure:
        """The compiler's own estimate in ms, or unknown with the reason; nothing is run.

        It is one number: a percentile above the median stays unknown.

        Raises:
            TargetError: as `placement`, except that nodes left to the CPU make it unknown.
        """
        device = self.spec.device
        if statistic not in ("p50", "mean"):
            why = f"the compiler's estimate has no {statistic}"
            return Figure(value=None, evidence="unknown", how=why, device=device)
        if self.spec.options["estimate"] != "true":
            why = "the vendor's compiler prints no estimate for this SoC, and its emulator no time"
            return Figure(value=None, evidence="unknown", how=why, device=device)
        try:
            found = self.estimate(file)
        except NotAllOnNpu as e:
            return Figure(value=None, evidence="unknown", how=e.what, device=device)
        if not found:
            why = "the vendor's compiler printed no estimate for this graph"
            return Figure(value=None, evidence="unknown", how=why, device=device)
        how = (
            f"compiler's estimate, {found['us_low']:.0f} to {found['us_high']:.0f} us, "
            f"{found['dram_bytes'] / 1e6:.2f} MB of DRAM traffic; not compared with silicon"
        )
        return Figure(value=found["us"] / 1e3, evidence="simulated", how=how, device=device)

    def compare(self, file: Path, other: Path, inputs: Mapping[str, Array]) -> float | None:
        """Estimated latency of `file` over that of `other`; None where one is unknown."""
        mine, theirs = (self.latency(f, inputs, 1).value for f in (file, other))
        return mine / theirs if mine is not None and theirs else None

    def estimate(self, file: Path) -> dict[str, float]:
        """The compiler's own estimate: `us`, `us_low`, `us_high`, `cycles`, `dram_bytes` and parts.

        Empty for SoCs without one.

        Raises:
            TargetError: as `placement`; EB613 also where nodes are left to the CPU.
        """
        self._require()
        return self._emulator.estimate(file)

    def _require(self) -> None:
        state = self.available()
        if not state.ok:
            raise TargetError("EB601", f"{self.spec.name}: {state.why}", hint=state.install)


class _Emulated:
    """A segment in the emulator; each call starts a process."""

    def __init__(self, emulator: Emulator, file: Path) -> None:
        self._emulator, self._file = emulator, file

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        return self._emulator.run(self._file, inputs)


@cache
def _probe() -> Availability:
    """Load the vendor's library once, in a process of its own."""
    found = version("onnxruntime-qnn")
    with tempfile.TemporaryDirectory(prefix="edgebudget-npu-") as folder:
        try:
            run_jobs([Job(Path(folder), {"action": "probe"})], _PROBE_S, "this machine")
        except TargetError as e:
            return Availability(ok=False, why=e.what, install=_INSTALL, version=found)
    return Availability(ok=True, version=found)
