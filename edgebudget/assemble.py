"""Put the artifact together: manifest, recipe and report around the exported files."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebudget.planner import Proposal
from edgebudget_runtime import manifest as m
from edgebudget_runtime.integrity import sha256

if TYPE_CHECKING:
    from edgebudget.pipeline import Built, Setting
    from edgebudget.plan import Plan
    from edgebudget.program import Note, PassRecord, Program
    from edgebudget.target import Lowered, Target
    from edgebudget.verify import Proof
    from edgebudget.workload import Quality, Workload

_PACKAGES = (
    "edgebudget",
    "numpy",
    "onnx",
    "onnx-ir",
    "onnxruntime",
    "onnxruntime-qnn",
    "onnxscript",
    "scipy",
    "torch",
    "torch-pruning",
)


@dataclass(frozen=True, slots=True)
class Result:
    """One plan, built and proven."""

    plan: Plan
    proposal: Proposal | None
    built: Built
    original: Built  # the untouched model, as a float graph
    lowered: Lowered
    proof: Proof
    undone: tuple[PassRecord, ...]


def versions() -> dict[str, str]:
    """Versions of everything that decides the bytes of a result."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def write_artifact(
    folder: Path, result: Result, workload: Workload, target: Target, setting: Setting
) -> m.Manifest:
    """Write manifest.json, recipe.toml and report.html beside `segments/`."""
    from edgebudget.report import render

    (folder / "recipe.toml").write_text(result.plan.to_toml(), encoding="utf-8")
    manifest = build_manifest(folder, result, workload, target, setting)
    manifest.save(folder)
    (folder / "report.html").write_text(render(manifest), encoding="utf-8")
    return manifest


def build_manifest(
    folder: Path, result: Result, workload: Workload, target: Target, setting: Setting
) -> m.Manifest:
    """Everything the artifact says about itself."""
    from edgebudget.static_cost import static_cost

    proof, spec = result.proof, target.spec
    how = f"{result.lowered.file.name} through ONNX Runtime on the CPU"
    quality = _quality(proof.quality, how)
    original = _quality(proof.original, "the original in float32")
    segment = _segment(folder, result)
    candidates = () if result.proposal is None else _candidates(result.proposal)
    return m.Manifest(
        name=workload.name,
        target=m.TargetInfo(spec.name, spec.engine, spec.device),
        workload=m.WorkloadInfo(
            workload.name, workload.task.kind, workload.task.metric, workload.digest
        ),
        preprocessing=dict(workload.preprocessing),
        segments=(segment,),
        subnetworks=(m.SubNetwork("main", ("main",), proof.cost, quality, original),),
        limits=tuple(_limits(proof, setting)),
        quality_limits=tuple(_quality_limits(proof, setting, how)),
        placement=_placement(proof),
        baseline=m.Baseline(static_cost(result.original.program, "the original graph"), original),
        passes=tuple(_entry(r) for r in (*result.built.records, *result.undone)),
        candidates=candidates,
        layers_before=_layers(result.original.program),
        layers_after=_layers_of_file(result),
        provenance=m.Provenance(versions(), setting.seed, _digests(workload)),
        notes=(*workload.notes, *_notes(result)),
    )


def _segment(folder: Path, result: Result) -> m.Segment:
    import onnx
    from onnx import TensorProto, helper

    graph = onnx.load_model(str(result.lowered.file)).graph
    weights = {t.name for t in graph.initializer}

    def tensor(value: Any) -> m.Tensor:
        kind = value.type.tensor_type
        shape = tuple(d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim)
        assert kind.elem_type != TensorProto.UNDEFINED
        dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type).name
        return m.Tensor(value.name, shape, dtype)

    def relative(path: Path) -> str:
        return path.relative_to(folder).as_posix()

    file = result.lowered.file
    return m.Segment(
        id="main",
        file=relative(file),
        sha256=sha256(file),
        bytes=file.stat().st_size,
        inputs=tuple(tensor(v) for v in graph.input if v.name not in weights),
        outputs=tuple(tensor(v) for v in graph.output),
        extra=tuple(m.File(relative(x), sha256(x), x.stat().st_size) for x in result.lowered.extra),
    )


def _quality(found: Quality | None, how: str) -> m.Quality | None:
    if found is None:
        return None
    q = found
    return m.Quality(q.metric, q.value, q.low, q.high, q.count, dict(q.others), how)


def _limits(proof: Proof, setting: Setting) -> list[m.ProvenLimit]:
    found = []
    for x in setting.budget.limits:
        figure = proof.cost.get(x.resource)
        holds = figure.value is not None and figure.value <= x.bound
        found.append(m.ProvenLimit(x.resource, x.bound, x.statistic, figure, holds))
    return found


def _quality_limits(proof: Proof, setting: Setting, how: str) -> list[m.ProvenQuality]:
    found = []
    budget = setting.budget
    if budget.max_drop is not None:
        holds = proof.drop is not None and proof.drop <= budget.max_drop
        found.append(m.ProvenQuality("max_drop", budget.max_drop, proof.drop, holds, how))
    if budget.min_quality is not None:
        value = None if proof.quality is None else proof.quality.value
        holds = value is not None and value >= budget.min_quality
        found.append(m.ProvenQuality("min_quality", budget.min_quality, value, holds, how))
    return found


def _placement(proof: Proof) -> m.Placement:
    counts: dict[str, int] = {}
    for node in proof.placement.nodes:
        counts[node.processor] = counts.get(node.processor, 0) + 1
    fallback = tuple(
        m.FallbackNode(n.name, n.op, n.processor, n.why) for n in proof.placement.fallback
    )
    return m.Placement(proof.placement.processor, counts, fallback)


def _entry(record: PassRecord) -> m.PassEntry:
    def notes(found: tuple[Note, ...]) -> tuple[m.Note, ...]:
        return tuple(m.Note(n.where, n.what, n.why) for n in found)

    return m.PassEntry(
        name=record.name,
        config=record.config,
        seed=record.seed,
        before=record.before,
        after=record.after,
        did=notes(record.did),
        declined=notes(record.declined),
        undone=record.undone,
    )


def _candidates(proposal: Proposal) -> tuple[m.Candidate, ...]:
    """What the planner looked at; points that could not be built have no place on a plot."""
    return tuple(
        m.Candidate(
            c.label,
            c.macs,
            None if c.quality is None else c.quality.value,
            c.label == proposal.chosen,
        )
        for c in proposal.candidates
        if not c.refused
    )


def _layers(program: Program) -> tuple[m.Layer, ...]:
    from edgebudget.counter import count

    return tuple(
        m.Layer(x.name, x.op, float(x.macs), float(x.params), x.output_dtype)
        for x in count(program).layers
        if x.macs or x.params
    )


def _layers_of_file(result: Result) -> tuple[m.Layer, ...]:
    from dataclasses import replace

    import onnx

    body = onnx.load_model(str(result.lowered.file))
    return _layers(replace(result.built.program, stage="graph", body=body))


def _digests(workload: Workload) -> dict[str, str]:
    data = workload.data
    sets = {"calibration": data.calibration, "train": data.train, "evaluation": data.evaluation}
    return {k: d.digest() for k, d in sets.items() if d is not None}


def _notes(result: Result) -> tuple[str, ...]:
    notes = list(result.proof.notes)
    if (agreed := result.proof.agreement) is not None:
        notes.append(
            f"the target's own engine ran {agreed.count} samples: outputs within "
            f"{agreed.worst_steps:.3f} quantization steps ({agreed.step:.6g} each) of the engine "
            "that ran the whole set (simulated)"
        )
    if result.proposal is not None:
        notes.extend(result.proposal.plan.reasons)
        notes.extend(result.proposal.notes)
    notes.extend(f"{r.name} undone: {r.undone}" for r in result.undone)
    return tuple(notes)
