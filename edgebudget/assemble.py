"""Put the artifact together: manifest, recipe and report around the exported files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgebudget import manifest_parts as parts
from edgebudget.planner import Proposal
from edgebudget_runtime import manifest as m

if TYPE_CHECKING:
    from edgebudget.pipeline import Built, Setting
    from edgebudget.plan import Plan
    from edgebudget.program import PassRecord
    from edgebudget.target import Lowered, Target
    from edgebudget.verify import Proof
    from edgebudget.workload import Workload


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


def write_artifact(
    folder: Path, result: Result, workload: Workload, target: Target, setting: Setting
) -> m.Manifest:
    """Write manifest.json, recipe.toml and report.html beside `segments/`."""
    from edgebudget.layer_loads import anatomy
    from edgebudget.report import render

    (folder / "recipe.toml").write_text(result.plan.to_toml(), encoding="utf-8")
    manifest = build_manifest(folder, result, workload, target, setting)
    manifest.save(folder)
    (folder / "report.html").write_text(
        render(manifest, anatomy(folder, manifest, target)), encoding="utf-8"
    )
    return manifest


def build_manifest(
    folder: Path, result: Result, workload: Workload, target: Target, setting: Setting
) -> m.Manifest:
    """Everything the artifact says about itself."""
    from edgebudget.static_cost import static_cost

    proof, spec = result.proof, target.spec
    how = f"{result.lowered.file.name} through {parts.runtime(result.lowered.file)} on the CPU"
    quality = parts.quality(proof.quality, how)
    original = parts.quality(proof.original, "the original in float32")
    segment = parts.segment(folder, result.lowered, "main", proof.cost.macs.value or 0.0)
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
        placement=parts.placement(proof.placement),
        baseline=m.Baseline(static_cost(result.original.program, "the original graph"), original),
        passes=tuple(parts.entry(r) for r in (*result.built.records, *result.undone)),
        candidates=candidates,
        layers_before=parts.layers(result.original.program),
        layers_after=_layers_of_file(result),
        provenance=m.Provenance(parts.versions(), setting.seed, parts.digests(workload)),
        notes=(*workload.notes, *_notes(result)),
    )


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


def _layers_of_file(result: Result) -> tuple[m.Layer, ...]:
    from dataclasses import replace

    from edgebudget.segment_graph import read_graph

    body = read_graph(result.lowered.file)
    return parts.layers(replace(result.built.program, stage="graph", body=body))


def _notes(result: Result) -> tuple[str, ...]:
    notes = list(result.proof.notes)
    if (agreed := result.proof.agreement) is not None:
        notes.append(
            f"the target's own engine ran {agreed.count} samples: "
            + agreed.words("the engine that ran the whole set")
        )
    if result.proposal is not None:
        notes.extend(result.proposal.plan.reasons)
        notes.extend(result.proposal.notes)
    notes.extend(f"{r.name} undone: {r.undone}" for r in result.undone)
    return tuple(notes)
