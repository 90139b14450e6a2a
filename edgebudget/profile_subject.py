"""What is to be profiled, as an artifact folder: one that is there, or a model just exported.

A plain model is lowered for the target as it is, in float, and put in a folder of its own: so
that a device, near or far, only ever sees artifacts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from edgebudget.events import Emit, Finished, Started
from edgebudget_runtime import engine
from edgebudget_runtime import manifest as m
from edgebudget_runtime.cost import Cost
from edgebudget_runtime.errors import TargetError, UsageError

if TYPE_CHECKING:
    from edgebudget.target import Target, TargetSpec

# Engines of targets that the runtime itself can run, and the provider it asks for.
PROVIDERS = {
    "onnxruntime-cpu": engine.CPU,
    "onnxruntime-webgpu": "WebGpuExecutionProvider",
    "executorch-xnnpack": engine.CPU,  # its files say that ExecuTorch opens them
}


@dataclass(frozen=True, slots=True)
class Subject:
    """An artifact folder to measure, and how."""

    folder: Path
    manifest: m.Manifest
    target: TargetSpec
    provider: str
    kept: bool  # the user's own artifact, not a model exported for this measurement


@contextmanager
def subject(
    source: str,
    target: str | None,
    *,
    weights: Path | None = None,
    input_shape: tuple[int, ...] | None = None,
    emit: Emit,
) -> Iterator[Subject]:
    """Open an artifact, or export a model for the target.

    Args:
        source: An artifact folder, or any model that `compile` takes.
        target: Where it runs; None: the artifact's own target, or `cpu` for a model.
        weights: For a model's architecture.
        input_shape: Batch included, for models that do not say it.
        emit: Listens.

    Raises:
        UsageError: EB140 no such target, EB167 options that only a model takes.
        TargetError: EB645 the target's engine cannot be timed on a device.
        EdgeBudgetError: as loading, exporting and lowering a model do.
    """
    from edgebudget import target_registry

    folder = Path(source)
    if (folder / m.FILE).is_file():
        if weights is not None or input_shape is not None:
            raise UsageError(
                "EB167",
                f"{source} is an artifact: --weights and --input-shape are for models",
                hint="leave them out",
            )
        manifest = m.Manifest.load(folder)
        spec = target_registry.get(target or manifest.target.name).spec
        yield Subject(folder, manifest, spec, _provider(spec), True)
        return
    found = target_registry.get(target or "cpu")
    provider = _provider(found.spec)
    with TemporaryDirectory(prefix="edgebudget-") as name:
        emit(Started("export"))
        manifest = _exported(source, found, Path(name), weights, input_shape)
        emit(Finished("export"))
        yield Subject(Path(name), manifest, found.spec, provider, False)


def _provider(spec: TargetSpec) -> str:
    if spec.engine not in PROVIDERS:
        raise TargetError(
            "EB645",
            f"{spec.name} cannot be timed: its engine {spec.engine} runs on no device here",
            hint="--target cpu times the processor standing in; a compile tells the compiler's "
            "estimate where there is one",
        )
    return PROVIDERS[spec.engine]


def _exported(
    source: str,
    target: Target,
    folder: Path,
    weights: Path | None,
    input_shape: tuple[int, ...] | None,
) -> m.Manifest:
    from edgebudget import manifest_parts
    from edgebudget.export import to_graph
    from edgebudget.load_model import load_model
    from edgebudget.verify import file_cost

    loaded = load_model(source, weights=weights, input_shape=input_shape)
    program = loaded.program
    if program.stage == "module":
        program = to_graph(program, check=False)
    (folder / "segments").mkdir()
    lowered = target.lower(program, folder / "segments", "main")
    cost = file_cost(lowered, program)
    segment = manifest_parts.segment(folder, lowered, "main", cost.macs.value or 0.0)
    spec = target.spec
    manifest = m.Manifest(
        name=loaded.name,
        target=m.TargetInfo(spec.name, spec.engine, spec.device),
        workload=m.WorkloadInfo(loaded.name, "agreement", "", loaded.digest),
        preprocessing={},
        segments=(segment,),
        subnetworks=(m.SubNetwork("main", ("main",), cost, None, None),),
        limits=(),
        quality_limits=(),
        placement=None,
        baseline=m.Baseline(Cost()),
        passes=(),
        candidates=(),
        layers_before=(),
        layers_after=(),
        provenance=m.Provenance({}, 0),
        notes=("exported to be profiled; nothing is proven",),
    )
    manifest.save(folder)
    return manifest
