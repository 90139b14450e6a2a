"""`compile` and `plan`."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgebudget.cli import options as o
from edgebudget.cli.output import write, write_json, write_table
from edgebudget.cli.progress import listening
from edgebudget_runtime.errors import UsageError

if TYPE_CHECKING:
    from edgebudget.elastic_compile import Elastic
    from edgebudget.planner import Proposal
    from edgebudget_runtime.manifest import Manifest, Quality


class Depth(StrEnum):
    """How much of the evaluation set the target's own engine is asked to run."""

    SAMPLE = "sample"
    FULL = "full"


def register(app: typer.Typer) -> None:
    """Add this file's commands."""
    app.command("compile")(compile_)
    app.command()(plan)


def compile_(
    model: o.Model,
    out: Annotated[Path, typer.Option("--out", help="The artifact's folder.")],
    target: o.TargetName = "cpu",
    macs: o.Macs = None,
    params: o.Params = None,
    size: o.Size = None,
    memory: o.Memory = None,
    latency: o.Latency = None,
    energy: o.Energy = None,
    energy_model: o.EnergyModel = None,
    max_drop: o.MaxDrop = None,
    min_quality: o.MinQuality = None,
    max_fallback: o.MaxFallback = None,
    time_limit: o.TimeLimit = None,
    data: o.Data = None,
    task: o.Task = None,
    weights: o.Weights = None,
    input_shape: o.InputShape = None,
    max_batch: o.MaxBatch = 1,
    plan: Annotated[
        Path | None, typer.Option("--plan", help="Replay a plan or an artifact's recipe.toml.")
    ] = None,
    seed: o.Seed = 0,
    verify: Annotated[
        Depth, typer.Option("--verify", help="How much the target's own engine runs.")
    ] = Depth.SAMPLE,
    elastic: Annotated[
        str | None,
        typer.Option(
            "--elastic",
            metavar="DIMENSIONS",
            help="Make several sub-networks: exit,depth,width,resolution, or auto.",
        ),
    ] = None,
    subnetworks: Annotated[
        int, typer.Option("--subnetworks", help="With --elastic: how many to keep at most.")
    ] = 6,
    confidence: Annotated[
        str | None,
        typer.Option("--confidence", help="With --elastic: certify exits for --max-drop: 95%."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an artifact at --out.")] = False,
    as_json: o.Json = False,
) -> None:
    """Compile MODEL so that every limit is proven on the exported files."""
    from edgebudget_runtime.budget import Budget

    shape = o.parse_shape(input_shape)
    budget = Budget.parse(
        macs=macs, params=params, size=size, memory=memory, latency=latency, energy=energy,
        max_drop=max_drop, min_quality=min_quality, max_fallback=max_fallback,
        time_limit=time_limit,
    )  # fmt: skip
    with listening() as emit:
        from edgebudget import compiler

        result = compiler.compile(
            model, out=out, target=target, budget=budget, weights=weights, data=data, task=task,
            input_shape=shape, max_batch=max_batch, energy_model=energy_model, plan=plan, seed=seed,
            verify=verify.value, force=force,
            elastic=_elastic(elastic, subnetworks, confidence), on_event=emit,
        )  # fmt: skip
    if as_json:
        write_json(summary(result.out, result.manifest))
    else:
        _show_result(result.out, result.manifest)


def _elastic(text: str | None, subnetworks: int, confidence: str | None) -> Elastic | None:
    if text is None:
        if confidence is not None:
            raise UsageError(
                "EB156",
                "--confidence certifies exits, and there are none without --elastic",
                hint="add --elastic exit",
            )
        return None
    from edgebudget.elastic_compile import Elastic

    level = None if confidence is None else o.parse_share("--confidence", confidence)
    return Elastic.parse(text, subnetworks, level)


def summary(out: Path, manifest: Manifest) -> dict[str, Any]:
    """An artifact's verdict as plain data; the rest is in its manifest.json."""
    plain = json.loads(manifest.encode())
    best = plain["subnetworks"][0]
    return {
        "out": str(out),
        "name": manifest.name,
        "target": plain["target"],
        "holds": manifest.holds,
        "limits": plain["limits"],
        "quality_limits": plain["quality_limits"],
        "cost": best["cost"],
        "quality": best["quality"],
        "original_cost": plain["baseline"]["cost"],
        "original_quality": best["original_quality"],
        "placement": plain["placement"],
    }


def _show_result(out: Path, manifest: Manifest) -> None:
    from edgebudget.report_markup import NAMES, amount
    from edgebudget_runtime.cost import RESOURCES

    best, original = manifest.subnetworks[0], manifest.baseline.cost
    rows = []
    for name in RESOURCES:
        limits = [x for x in manifest.limits if x.resource == name]
        figure = best.cost.get(name)
        rows.append(
            [
                NAMES[name],
                amount(name, original.get(name).value),
                amount(name, figure.value),
                ", ".join(f"<= {amount(name, x.bound)}" for x in limits),
                "proven" if limits and all(x.holds for x in limits) else "",
                figure.evidence,
            ]
        )
    write_table(["", "original", "artifact", "limit", "", "evidence"], rows)
    if best.quality is not None:
        write(f"quality  {quality_words(best.quality)}")
    if best.original_quality is not None:
        write(f"original {quality_words(best.original_quality)}")
    for limit in manifest.quality_limits:
        bound, value = _level(limit.kind, limit.bound), _level(limit.kind, limit.value)
        verdict = "proven" if limit.holds else "not proven"
        write(f"{limit.kind.replace('_', ' ')} {bound}: {value}, {verdict}")
    if len(manifest.subnetworks) > 1:
        points = len(manifest.operating_points)
        write(
            f"{len(manifest.subnetworks)} sub-networks, {points} operating points: "
            f"see `edgebudget frontier {out}`"
        )
    write(f"artifact {out}, report {out / 'report.html'}")


def _level(kind: str, value: float | None) -> str:
    if value is None:
        return "unknown"
    return f"{100 * value:.4g} %" if kind == "max_drop" else f"{value:.4g}"


def quality_words(quality: Quality) -> str:
    """One line about a quality."""
    return (
        f"{quality.metric} {quality.value:.4f} "
        f"[{quality.low:.4f}, {quality.high:.4f}] on {quality.count} samples"
    )


def plan(
    model: o.Model,
    target: o.TargetName = "cpu",
    macs: o.Macs = None,
    params: o.Params = None,
    size: o.Size = None,
    memory: o.Memory = None,
    latency: o.Latency = None,
    energy: o.Energy = None,
    energy_model: o.EnergyModel = None,
    max_drop: o.MaxDrop = None,
    min_quality: o.MinQuality = None,
    max_fallback: o.MaxFallback = None,
    time_limit: o.TimeLimit = None,
    data: o.Data = None,
    task: o.Task = None,
    weights: o.Weights = None,
    input_shape: o.InputShape = None,
    max_batch: o.MaxBatch = 1,
    seed: o.Seed = 0,
    out: Annotated[
        Path | None, typer.Option("--out", help="Write the plan to edit and replay (TOML).")
    ] = None,
    as_json: o.Json = False,
) -> None:
    """Say whether a budget can be met and how, without training or writing an artifact."""
    from edgebudget_runtime.budget import Budget

    shape = o.parse_shape(input_shape)
    budget = Budget.parse(
        macs=macs, params=params, size=size, memory=memory, latency=latency, energy=energy,
        max_drop=max_drop, min_quality=min_quality, max_fallback=max_fallback,
        time_limit=time_limit,
    )  # fmt: skip
    with listening() as emit:
        from edgebudget import compiler

        proposal = compiler.propose(
            model, target=target, budget=budget, weights=weights, data=data, task=task,
            input_shape=shape, max_batch=max_batch, energy_model=energy_model, seed=seed,
            on_event=emit,
        )  # fmt: skip
    if out is not None:
        o.write_file(out, proposal.plan.to_toml())
    if as_json:
        write_json(proposal.as_dict())
    else:
        _show_proposal(proposal)
        if out is not None:
            write(f"plan written to {out}")


def _show_proposal(proposal: Proposal) -> None:
    from edgebudget.plan import config_to_dict
    from edgebudget.report_markup import si

    baseline = proposal.baseline.macs.value
    if baseline is not None:
        write(f"original: {si(baseline, 'MACs')}")
    write(f"smallest reachable point: about {si(proposal.reach.smallest, proposal.reach.unit)}")
    rows = [
        [
            "*" if c.label == proposal.chosen else "",
            c.label,
            "-" if c.refused else si(c.macs),
            "-" if c.quality is None else f"{c.quality.value:.4f}",
            "-" if c.distance is None else f"{c.distance:.4g}",
            c.refused,
        ]
        for c in proposal.candidates
    ]
    write_table(["", "candidate", "MACs", "quality, untrained", "output error", ""], rows)
    for number, step in enumerate(proposal.plan.steps, start=1):
        settings = ", ".join(f"{k}={v}" for k, v in config_to_dict(step.config).items())
        write(f"{number}. {step.name}({settings})")
        if step.why:
            write(f"   {step.why}")
    for note in (*proposal.plan.reasons, *proposal.notes):
        write(f"- {note}")
