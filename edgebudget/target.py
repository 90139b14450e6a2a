"""Where a model runs: what a target module answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from pathlib import Path

    import onnx

    from edgebudget.kernels import Kernel, Observation
    from edgebudget.layer_time import LayerTime
    from edgebudget.program import Program
    from edgebudget.workload import Array
    from edgebudget_runtime.budget import Statistic
    from edgebudget_runtime.cost import Figure, Resource
    from edgebudget_runtime.device_id import Device

Family = Literal["cpu", "npu", "gpu"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetSpec:
    """What passes need to know about a target; read from `targets/edgebudget_targets/*.toml`."""

    name: str  # canonical: "cpu", "npu:hexagon/snapdragon-8-gen3"
    family: Family
    engine: str  # "onnxruntime-cpu", "onnxruntime-qnn"
    device: str  # for people: "Snapdragon 8 Gen 3 (SM8650), Hexagon v75"
    channel_multiple: int
    activation_dtypes: tuple[str, ...]  # preferred first: ("uint8", "uint16")
    weight_dtypes: tuple[str, ...]
    float_fallback: bool  # True: a node left in float is fine (CPU); False: all must be integer
    max_fallback: int | None  # default limit on nodes outside the processor; None: no limit
    tells: tuple[Resource, ...] = ()  # of latency_ms and energy_mj: what has a figure here
    runs_here: bool = True  # the engine, or the vendor's emulator of it; False: only the device
    options: Mapping[str, str] = field(default_factory=dict)  # engine-specific (soc_model, ...)
    layer_time: LayerTime | None = None  # prices of layers, where MACs mislead on this device

    @property
    def max_batch(self) -> int:
        """Samples that one call of a file may take."""
        return int(self.options.get("max_batch", 1))

    @property
    def exact(self) -> bool:
        """Whether sums of its 8-bit products are never clipped; see `session.CpuSession`."""
        from edgebudget_runtime.engine import CPU_TARGET  # loads the engine

        return self.engine != CPU_TARGET

    @property
    def integers(self) -> bool:
        """Whether the target computes with integers; else quantizing costs quality for nothing."""
        return not self.activation_dtypes[0].startswith("float")


@dataclass(frozen=True, slots=True)
class Availability:
    """Whether the engine works here, and how to get it if not."""

    ok: bool
    why: str = ""
    install: str = ""
    version: str = ""


@dataclass(frozen=True, slots=True)
class NodePlacement:
    """Where one node runs; `why` is the engine's reason when it is not the target's processor."""

    name: str
    op: str
    processor: str  # "npu", "gpu", "cpu"
    why: str = ""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where every node of a segment runs."""

    nodes: tuple[NodePlacement, ...]
    processor: str  # the target's own processor

    @property
    def fallback(self) -> tuple[NodePlacement, ...]:
        """Nodes that do not run on the target's processor."""
        return tuple(n for n in self.nodes if n.processor != self.processor)


@dataclass(frozen=True, slots=True)
class Lowered:
    """One exported segment: its main file, and files that go with it (compiled context)."""

    file: Path
    extra: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()
    memory: Figure | None = None  # bytes, where the engine's compiler says what it needs
    max_batch: int = 1  # samples that one call may take; costs are those of one


class Executor(Protocol):
    """A loaded segment."""

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run one batch; names are the segment's own."""
        ...


@runtime_checkable
class Packs(Protocol):
    """A target whose files can hold several programs, which store equal weights once."""

    def pack(self, programs: Mapping[str, Program], files: Mapping[str, Path], into: Path) -> None:
        """Write programs, lowered one by one as `files`, as the methods of one file."""
        ...


class Target(Protocol):
    """A device family reached through one engine."""

    spec: TargetSpec

    def available(self) -> Availability:
        """Whether this target can lower and run here."""
        ...

    def lower(self, program: Program, folder: Path, name: str) -> Lowered:
        """Write a graph-stage program as this engine wants it."""
        ...

    def open(self, file: Path, *, exact: bool = False) -> Executor:
        """Load a segment for evaluation.

        `exact` False may use a fast engine with the same integer arithmetic (the CPU for an
        NPU); True runs the target's own engine or the vendor's emulator.
        """
        ...

    def placement(self, file: Path) -> Placement:
        """Where the engine puts every node of this file."""
        ...

    def latency(
        self,
        file: Path,
        inputs: Mapping[str, Array],
        repeats: int,
        *,
        statistic: Statistic = "p50",
    ) -> Figure:
        """A statistic of the latency of one input, measured, simulated, modelled or unknown.

        `repeats` is the fewest runs; a percentile may take more. Unknown where the engine cannot
        tell this statistic.
        """
        ...

    def compare(self, file: Path, other: Path, inputs: Mapping[str, Array]) -> float | None:
        """Latency of `file` over that of `other`, run interleaved; None where not measurable."""
        ...


@runtime_checkable
class TakesBatches(Protocol):
    """A target whose files can take several samples in one call."""

    def in_batches(self, most: int) -> Target:
        """The same target, whose files take 1 to `most` samples at a time."""
        ...


@runtime_checkable
class TimesChains(Protocol):
    """A target that can run files one after the other, again and again, as a chain of segments."""

    def chain_times(
        self, files: Sequence[Path], inputs: Sequence[Mapping[str, Array]], repeats: int
    ) -> Sequence[Array]:
        """Milliseconds [repeats] of each file on its own inputs, the files taking turns."""
        ...


@runtime_checkable
class TellsEnergy(Protocol):
    """A target that can also tell the energy of a run; `spec.tells` then lists energy_mj."""

    def energy(self, file: Path, inputs: Mapping[str, Array]) -> Figure:
        """Mean energy of one input in mJ, measured or modelled, or unknown with the reason."""
        ...


@runtime_checkable
class Predicts(Protocol):
    """A target with a cost model of its own, which the planner ranks candidates by."""

    def predict(self, model: onnx.ModelProto) -> Figure:
        """Modelled latency in ms of a graph, float or quantized, with its error; or unknown."""
        ...


@runtime_checkable
class TellsKernels(Protocol):
    """A target whose engine tells which kernels it runs, so that they can be timed and predicted.

    Files are given inputs of seeded noise.
    """

    def device(self) -> Device:
        """What a latency depends on: this device, the engine, its version and threads."""
        ...

    def kernels(self, file: Path) -> tuple[Kernel, ...]:
        """Every kernel of one run, after the engine's own fusion.

        Raises:
            ArtifactError: EB510, the engine refuses the file.
        """
        ...

    def observe(self, file: Path) -> Observation:
        """The time of one run and of each kernel, in a fraction of a second; its energy if told.

        Raises:
            ArtifactError: EB510, the engine refuses the file.
        """
        ...


@runtime_checkable
class Halves(Protocol):
    """A target that writes half precision of its own accord."""

    def single(self) -> CalibratedTarget:
        """The same target, whose files stay in single precision."""
        ...


class CalibratedTarget(Target, TellsKernels, Protocol):
    """A target that can be calibrated."""
