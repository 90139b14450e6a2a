"""The manifest of an artifact with several sub-networks, and what of its limits is proven."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edgebudget import manifest_parts as parts
from edgebudget import planner, shared_weights
from edgebudget.artifact import writing
from edgebudget.elastic_compile import Branch, Found, build, moved, worst_drop
from edgebudget.job import check_quality_limit, reference_of
from edgebudget.static_cost import static_cost
from edgebudget.target import Placement
from edgebudget_runtime import manifest as m
from edgebudget_runtime.cost import UNKNOWN, Figure
from edgebudget_runtime.errors import MissedError

if TYPE_CHECKING:
    from pathlib import Path

    from edgebudget.elastic_compile import Elastic
    from edgebudget.job import Job
    from edgebudget.plan import Plan
    from edgebudget.target import Target
    from edgebudget.verify import Depth
    from edgebudget_runtime.budget import Budget, Limit


def prove_and_write(
    job: Job, elastic: Elastic, plan: Plan, out: Path, folder: Path, depth: Depth
) -> m.Manifest:
    """Build what `elastic` asks for on top of `plan`, prove it, and fill `folder`.

    Raises:
        MissedError: EB410, a limit is not proven; what was built is at `<out>.missed`.
        UnsupportedError: EB245, nothing about this model can be made elastic.
    """
    reference = reference_of(job)
    check_quality_limit(job, reference)
    segments = folder / "tried" / "segments"
    found = build(
        elastic, job.setting, job.start, job.target, plan, reference, segments, depth=depth
    )
    found = replace(found, plan=planner.with_settings(found.plan, **job.settings))
    if missed := broken(found, job.setting.budget):
        with writing(out.with_name(f"{out.name}.missed"), force=True) as aside:
            _write(job, moved(found, segments, aside / "segments"), aside)
        raise MissedError(
            "EB410",
            f"not proven: {'; '.join(missed)}",
            hint=f"the best so far is in {out.name}.missed; raise the limit, or train longer",
        )
    manifest = _write(job, moved(found, segments, folder / "segments"), folder)
    shutil.rmtree(folder / "tried")
    return manifest


def _write(job: Job, found: Found, folder: Path) -> m.Manifest:
    """Write manifest.json, recipe.toml and report.html, and drop segments that no path uses."""
    from edgebudget.report import render

    (folder / "recipe.toml").write_text(found.plan.to_toml(), encoding="utf-8")
    manifest = _manifest(folder, found, job)
    _drop_unused(folder, manifest)
    manifest.save(folder)
    (folder / "report.html").write_text(render(manifest), encoding="utf-8")
    return manifest


def proven(found: Found, budget: Budget, limit: Limit) -> Figure:
    """What a limit is compared with: the worst sub-network, or a solved mean."""
    costs = [found.branches[b].costs[k] for b, k in found.kept]
    if limit.statistic == "mean" and limit.resource == "macs":
        means = [p.mean_cost.macs for p in found.points.points]
        means += [c.macs for c in costs]
        return max(
            (f for f in means if f.value is not None and f.value <= limit.bound),
            key=lambda f: f.value or 0.0,
            default=UNKNOWN,
        )
    if limit.resource == "size_bytes":
        return _bytes(found)
    figures = [c.get(limit.resource) for c in costs]
    if any(f.value is None for f in figures):
        return UNKNOWN
    return max(figures, key=lambda f: f.value or 0.0)


def broken(found: Found, budget: Budget) -> tuple[str, ...]:
    """Every limit that is not proven, in words."""
    out = []
    for limit in budget.limits:
        value = proven(found, budget, limit).value
        if value is None or value > limit.bound:
            shown = "unknown" if value is None else f"{value:.6g}"
            out.append(f"{limit.resource} {shown}, limit {limit.bound:.6g} ({limit.statistic})")
    for kind, bound, value, holds in _quality_limits(found, budget):
        if not holds:
            shown = "unknown" if value is None else f"{value:.4g}"
            out.append(f"{kind.replace('_', ' ')} {shown}, limit {bound:.4g}")
    return tuple(out)


def _manifest(folder: Path, found: Found, job: Job) -> m.Manifest:
    workload, target, setting, original = job.workload, job.target, job.setting, job.graph
    spec, main = target.spec, found.branches[found.kept[0][0]]
    used = _used(found)
    segments = tuple(
        _segment(folder, branch, k)
        for branch in found.branches
        for k, id in enumerate(branch.ids)
        if id in used
    )
    engine = parts.runtime(main.lowered[0].file)
    how = f"the exported segments through {engine} on the CPU"
    before = parts.quality(found.original, "the original in float32")
    subnetworks = tuple(
        m.SubNetwork(
            found.branches[b].name(k),
            found.branches[b].ids[: k + 1],
            found.branches[b].costs[k],
            parts.quality(found.qualities.get((b, k)), how),
            before,
            found.branches[b].described(k),
        )
        for b, k in found.kept
    )
    budget = setting.budget
    points = tuple(p for p in found.points.points if set(p.path) <= used)
    return m.Manifest(
        name=workload.name,
        target=m.TargetInfo(spec.name, spec.engine, spec.device),
        workload=m.WorkloadInfo(
            workload.name, workload.task.kind, workload.task.metric, workload.digest
        ),
        preprocessing=dict(workload.preprocessing),
        segments=segments,
        subnetworks=subnetworks,
        limits=tuple(_limits(found, budget)),
        quality_limits=tuple(
            m.ProvenQuality(kind, bound, value, holds, how)
            for kind, bound, value, holds in _quality_limits(found, budget)
        ),
        placement=_placement(found, target, used),
        baseline=m.Baseline(static_cost(original.program, "the original graph"), before),
        passes=tuple(parts.entry(r) for r in main.built.records),
        candidates=(),
        layers_before=parts.layers(original.program),
        layers_after=parts.layers(main.built.program),
        provenance=m.Provenance(parts.versions(), setting.seed, parts.digests(workload)),
        notes=(*workload.notes, *_notes(found)),
        exits=tuple(e for e in found.points.exits if e.segment in used),
        operating_points=points,
        sharing=shared_weights.sharing(segments, subnetworks),
    )


def _used(found: Found) -> set[str]:
    """Segments on the path of a kept sub-network or an operating point."""
    ids = {i for b, k in found.kept for i in found.branches[b].ids[: k + 1]}
    return ids | {i for p in found.points.points for i in p.path}


def _segment(folder: Path, branch: Branch, k: int) -> m.Segment:
    before = 0.0 if k == 0 else branch.costs[k - 1].macs.value or 0.0
    macs = (branch.costs[k].macs.value or 0.0) - before
    return parts.segment(folder, branch.lowered[k], branch.ids[k], macs)


def _bytes(found: Found) -> Figure:
    files: dict[Path, int] = {}
    used = _used(found)
    for branch in found.branches:
        for id, lowered in zip(branch.ids, branch.lowered, strict=True):
            if id in used:
                weights = shared_weights.files(lowered.file)
                files |= {f: f.stat().st_size for f in (lowered.file, *weights)}
    how = f"{len(files)} files of all sub-networks, each once"
    return Figure(value=float(sum(files.values())), evidence="measured", how=how)


def _limits(found: Found, budget: Budget) -> list[m.ProvenLimit]:
    out = []
    for x in budget.limits:
        figure = proven(found, budget, x)
        holds = figure.value is not None and figure.value <= x.bound
        out.append(m.ProvenLimit(x.resource, x.bound, x.statistic, figure, holds))
    return out


def _quality_limits(found: Found, budget: Budget) -> list[tuple[Any, float, float | None, bool]]:
    """Of the best sub-network: the others are there for smaller budgets."""
    out: list[tuple[Any, float, float | None, bool]] = []
    if budget.max_drop is not None:
        drop = worst_drop(found)
        holds = drop is not None and drop <= budget.max_drop
        out.append(("max_drop", budget.max_drop, drop, holds))
    if budget.min_quality is not None:
        best = found.qualities.get(found.kept[0])
        value = None if best is None else best.value
        holds = value is not None and value >= budget.min_quality
        out.append(("min_quality", budget.min_quality, value, holds))
    return out


def _placement(found: Found, target: Target, used: set[str]) -> m.Placement:
    places = [
        target.placement(lowered.file)
        for branch in found.branches
        for id, lowered in zip(branch.ids, branch.lowered, strict=True)
        if id in used
    ]
    nodes = tuple(node for place in places for node in place.nodes)
    return parts.placement(Placement(nodes, places[0].processor))


def _notes(found: Found) -> tuple[str, ...]:
    notes = [*found.notes]
    agreed = [b.agreement for b in found.branches if b.agreement is not None]
    if agreed:
        worst = max(agreed, key=lambda a: a.worst_steps)
        notes.append(
            f"the target's own engine ran {worst.count} samples through every segment: outputs "
            f"within {worst.worst_steps:.3f} quantization steps ({worst.step:.6g} each) of the "
            "engine that ran the whole set (simulated)"
        )
    if found.points.signal is not None:
        notes.append(f"exits are left by {found.points.signal.signal}")
    notes.extend(found.plan.reasons)
    return tuple(notes)


def _drop_unused(folder: Path, manifest: m.Manifest) -> None:
    known = {f.file for s in manifest.segments for f in s.files()}
    for file in sorted((folder / "segments").rglob("*")):
        if file.is_file() and file.relative_to(folder).as_posix() not in known:
            file.unlink()
