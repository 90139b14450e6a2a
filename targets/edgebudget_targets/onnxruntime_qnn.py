"""Qualcomm Hexagon NPUs through ONNX Runtime's QNN plug-in, whose emulator runs on a PC.

The emulator shows which nodes the NPU takes and computes what the SoC's generation computes.
It says nothing about time. For some SoCs the compiler prints an estimate of its own; for others
latency is modelled on those estimates.
"""

from __future__ import annotations

import hashlib
import platform
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
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
from edgebudget_runtime.cost import Evidence, Figure
from edgebudget_runtime.errors import TargetError, UnsupportedError
from edgebudget_targets import _hexagon_limits
from edgebudget_targets._executor import CpuExecutor
from edgebudget_targets._hexagon_cost import CostModel, Fit, predict_us
from edgebudget_targets._onnx_file import read_segment, write_segment
from edgebudget_targets._qnn_emulator import Emulator, Limits
from edgebudget_targets._qnn_process import Job, NotAllOnNpu, run_jobs
from edgebudget_targets._qnn_tuning import Tuned, tune

if TYPE_CHECKING:
    import onnx

    from edgebudget.program import Program
    from edgebudget.workload import Array
    from edgebudget_runtime.budget import Statistic

_INSTALL = 'pip install "edgebudget[qnn]"'
_PROBE_S = 120.0


class HexagonTarget:
    """One Qualcomm SoC's NPU."""

    def __init__(self, spec: TargetSpec, limits: Limits | None = None) -> None:
        self.spec = spec
        self.emulator = Emulator(spec, limits or Limits())
        self._tuned: dict[str, Tuned] = {}  # by the file's hash

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

        The compiled form is for this SoC alone, made with the settings of the compiler that it
        estimates to be fastest, and was loaded once more in a fresh emulator.

        Raises:
            UnsupportedError: EB241 the program is no graph, EB242 it is larger than 2 GiB, EB248
                the SoC's compiler is known to fail on an operator.
        """
        if program.stage == "graph":
            _hexagon_limits.check(program.body, self.spec)
        file = write_segment(program, folder, name)
        context = folder / f"{name}_ctx.onnx"
        try:
            self._require()
            tuned = self._tune(file)
            self.emulator.compile(file, context, knobs=tuned.knobs)
        except TargetError as e:
            context.unlink(missing_ok=True)
            return Lowered(file, notes=(f"no compiled context: {e.what}",))
        note = f"{context.name} is compiled for {self.spec.device} and loads in its emulator"
        return Lowered(file, (context,), (f"{note}; {tuned.words}" if tuned.words else note,))

    def open(self, file: Path, *, exact: bool = False) -> Executor:
        """Load a segment: in the emulator if `exact`, else in the CPU engine.

        The CPU engine computes the same integer graph, but rounds differently in every layer.

        Raises:
            ArtifactError: EB510, the CPU engine refuses the file.
            TargetError: EB601, the NPU engine is missing.
        """
        if exact:
            self._require()
            return _Emulated(self.emulator, file)
        return CpuExecutor(CpuSession(file))

    def placement(self, file: Path) -> Placement:
        """Where every node of the file runs, quantization at the edges included.

        Raises:
            ArtifactError: EB510, the file is no valid model.
            TargetError: EB601 the engine is missing, EB610 it crashed, EB611 it took too long,
                EB612 it refuses the graph, EB613 it failed.
        """
        self._require()
        return Placement(tuple(map(_advised, self.emulator.place(file))), "npu")

    def latency(
        self,
        file: Path,
        inputs: Mapping[str, Array],
        repeats: int,
        *,
        statistic: Statistic = "p50",
    ) -> Figure:
        """The compiler's own estimate in ms, or what a model fitted on such estimates says.

        Nothing is run. It is one number: a percentile above the median stays unknown.

        Raises:
            TargetError: as `placement`, except that nodes left to the CPU make it unknown;
                EB620, the model was fitted on another version of the engine.
        """
        if statistic not in ("p50", "mean"):
            return self._unknown(f"the compiler's estimate has no {statistic}")
        if self.spec.options["estimate"] != "true":
            return self.predict(read_segment(file))
        try:
            found = self._tune(file)
        except NotAllOnNpu as e:
            return self._unknown(e.what)
        if not found.estimate:
            return self._unknown("the vendor's compiler printed no estimate for this graph")
        us = found.estimate
        how = (
            f"compiler's estimate, {us['us_low']:.0f} to {us['us_high']:.0f} us, "
            f"{us['dram_bytes'] / 1e6:.2f} MB of DRAM traffic; "
            f"{found.words + '; ' if found.words else ''}not compared with silicon"
        )
        return self._figure(us["us"] / 1e3, "simulated", how)

    def predict(self, model: onnx.ModelProto) -> Figure:
        """Latency in ms of a network, float or quantized, by the fitted cost model alone.

        For the planner: it takes milliseconds and needs no export for the NPU. The error is that
        of the model against the compiler's estimates of networks it was not fitted on.

        Raises:
            TargetError: EB620, it was fitted on another version of the engine.
        """
        try:
            fit = self._fit()
            ms = predict_us(fit, model) / 1e3
        except UnsupportedError as e:
            return self._unknown(e.what)
        return self._figure(ms, "modelled", self._modelled_how(), spread=ms * fit.median_error)

    def node_times(self, file: Path, model: onnx.ModelProto) -> NodeTimes:
        """Modelled ms of each node that takes time; what the graph itself takes is left out.

        Raises:
            UnsupportedError: EB247, a node is of a kind that was never fitted.
            TargetError: EB620, the model was fitted on another version of the engine.
        """
        from edgebudget_targets._hexagon_kernels import kernels

        fit = self._fit()
        ms = {k.name: fit.us(k.features) / 1e3 for k in kernels(model)}
        return NodeTimes(ms, "modelled", self._modelled_how(), self._roof())

    def _roof(self) -> Roof:
        """Peak and bandwidth as the fitted weights have them: no figures of the silicon."""
        from edgebudget_targets._hexagon_kernels import BLOCK_MACS

        fit = self._fit()
        us_per_block = sum(fit.weights.get(k, 0.0) for k in ("conv_work", "conv1_work")) / 2
        us_per_byte = max(fit.weights.get(f"{k}_{w}", 0.0) for k in ("conv", "conv1")
                          for w in ("read", "written"))  # fmt: skip
        how = "slope of the fitted cost model"

        def rate(slope: float, each: float) -> Figure:
            return (
                self._figure(each / slope * 1e6, "modelled", how) if slope else self._unknown(how)
            )

        return Roof(rate(us_per_block, BLOCK_MACS), rate(us_per_byte, 1.0))

    def _modelled_how(self) -> str:
        """Where modelled times come from, with their error."""
        fit, base = self._fit(), self._base()
        return (
            f"model fitted on the compiler's estimates of {fit.count} networks for {base}"
            f"{_relation(base, self.spec.options['arch'])}; median error {fit.median_error:.0%}, "
            f"90 % within {fit.p90_error:.0%} of such estimates; not compared with silicon"
        )

    def _base(self) -> str:
        """The SoC whose estimates latency is modelled on; its own where there are any."""
        own = self.spec.options["estimate"] == "true" and not self.spec.options["model"]
        return self.spec.name.rpartition("/")[2] if own else self.spec.options["model"]

    def _fit(self) -> Fit:
        fits, base = CostModel.load(_version()).fits, self._base()
        if base not in fits:
            raise UnsupportedError(
                "EB247",
                f"no cost model is fitted for {self.spec.device}, which has no estimate",
                hint="`edgebudget targets` lists SoCs with latency",
            )
        return fits[base]

    def compare(self, file: Path, other: Path, inputs: Mapping[str, Array]) -> float | None:
        """Estimated latency of `file` over that of `other`; None where one is unknown."""
        mine, theirs = (self.latency(f, inputs, 1).value for f in (file, other))
        return mine / theirs if mine is not None and theirs else None

    def estimate(self, file: Path) -> dict[str, float]:
        """The compiler's own estimate: `us`, `us_low`, `us_high`, `cycles`, `dram_bytes` and parts.

        With the settings that it estimates to be fastest. Empty for SoCs without one.

        Raises:
            TargetError: as `placement`; EB613 also where nodes are left to the CPU.
        """
        return dict(self._tune(file).estimate)

    def traffic(self, file: Path) -> Figure:
        """DRAM bytes of one input as the compiler estimates them, or unknown.

        Raises:
            TargetError: as `estimate`.
        """
        found = self.estimate(file)
        if not found:
            return self._unknown("the vendor's compiler prints no estimate for this SoC")
        return self._figure(found["dram_bytes"], "simulated", "compiler's estimate of DRAM traffic")

    def _tune(self, file: Path) -> Tuned:
        self._require()
        digest = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""
        if digest not in self._tuned:
            self._tuned[digest] = tune(self.emulator, file)
        return self._tuned[digest]

    def _figure(
        self, value: float, evidence: Evidence, how: str, *, spread: float | None = None
    ) -> Figure:
        device = self.spec.device
        return Figure(value=value, evidence=evidence, how=how, device=device, spread=spread)

    def _unknown(self, why: str) -> Figure:
        return Figure(value=None, evidence="unknown", how=why, device=self.spec.device)

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


def _advised(node: NodePlacement) -> NodePlacement:
    """With what to use instead of an operator that the NPU does not have, where that is known."""
    limits = _hexagon_limits.generation("")
    if node.processor == "npu" or node.op not in limits.on_cpu | limits.on_cpu_uint16:
        return node
    return replace(node, why=f"{node.why}; {_hexagon_limits.instead(node.op)}")


def _version() -> str:
    """Of the engine; empty where it is not installed."""
    try:
        return version("onnxruntime-qnn")
    except PackageNotFoundError:
        return ""


def _relation(base: str, arch: str) -> str:
    """How a SoC stands to the one that its latency is modelled on."""
    from edgebudget import target_registry

    other = target_registry.get(f"npu:hexagon/{base}").spec
    if other.options["arch"] == arch:
        return f", of the same generation (v{arch})"
    return f", of generation v{other.options['arch']}: this SoC is a v{arch}"


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
