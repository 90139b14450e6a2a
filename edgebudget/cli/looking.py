"""`inspect`, `explain` and `report`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgebudget.cli import options as o
from edgebudget.cli.compiling import quality_words, summary
from edgebudget.cli.output import write, write_json, write_table
from edgebudget.cli.progress import listening
from edgebudget_runtime.errors import EdgeBudgetError

if TYPE_CHECKING:
    from edgebudget.layer_loads import Anatomy, Roof
    from edgebudget.layer_times import Times
    from edgebudget_runtime.manifest import Manifest, Note


def register(app: typer.Typer) -> None:
    """Add this file's commands."""
    app.command()(inspect)
    app.command()(explain)
    app.command()(report)


def inspect(
    model: Annotated[
        str, typer.Argument(metavar="MODEL|ARTIFACT", help="An artifact folder, or any model.")
    ],
    weights: o.Weights = None,
    input_shape: o.InputShape = None,
    as_json: o.Json = False,
) -> None:
    """Say what a model or an artifact costs, layer by layer, counted on its graph."""
    shape = o.parse_shape(input_shape)
    with listening() as emit:
        from edgebudget.cli import anatomy
        from edgebudget_runtime.manifest import FILE

        folder = Path(model)
        if (folder / FILE).is_file():
            found = anatomy.of_artifact(folder)
        else:
            found = anatomy.of_model(model, weights, shape, emit)
    if as_json:
        write_json(found)
    else:
        _show_anatomy(found)


def _show_anatomy(found: dict[str, Any]) -> None:
    from edgebudget.report_markup import si

    def cell(value: Any) -> str:
        return "-" if value is None else str(value)

    rows = [
        [
            x["name"],
            x["op"],
            "x".join(map(str, x["output_shape"] or [])) or "-",
            cell(x["dtype"]),
            *(cell(x[k]) for k in ("macs", "other_ops", "params", "weight_bytes", "live_bytes")),
            cell(x["processor"]),
        ]
        for x in found["layers"]
    ]
    header = ["layer", "op", "output", "dtype", "MACs", "other ops", "params", "weight B",
              "activation B", "runs on"]  # fmt: skip
    if all(x["processor"] is None for x in found["layers"]):
        header, rows = header[:-1], [r[:-1] for r in rows]
    write_table(header, rows)
    write(found["definition"])
    for tensor in found["inputs"]:
        shape = "x".join("any" if d is None else str(d) for d in tensor["shape"])
        write(f"input {tensor['name']}: {shape} {tensor['dtype']} (batch included)")
    write(f"MACs {si(found['macs'])} ({found['macs']:.0f}); FLOPs {si(2 * found['macs'])}")
    if found["other_ops"] is not None:
        write(f"other ops {si(found['other_ops'])} ({found['other_ops']})")
    write(f"parameters {si(found['params'])} ({found['params']:.0f})")
    memory = found["memory"]
    if memory is not None:
        write(
            f"memory {memory['total_bytes']} B: weights {memory['weight_bytes']} B, activations "
            f"{memory['peak_activation_bytes']} B at {memory['peak_at']} (planned)"
        )
    for note in found["notes"]:
        write(f"note: {note}")


def explain(artifact: o.Artifact, as_json: o.Json = False) -> None:
    """Say what every pass did to an artifact, what it declined, and why."""
    manifest = _checked(artifact)
    if as_json:
        plain = json.loads(manifest.encode())
        kept = {k: plain[k] for k in ("passes", "candidates", "notes", "provenance", "workload")}
        write_json({**summary(artifact, manifest), **kept})
        return
    _show_story(manifest)


def _show_story(manifest: Manifest) -> None:
    from edgebudget.report_markup import NAMES, amount, ratio
    from edgebudget_runtime.cost import RESOURCES

    write(f"{manifest.name} for {manifest.target.name} ({manifest.target.device})")
    for limit in manifest.limits:
        found = limit.proven
        write(
            f"  {NAMES[limit.resource]} <= {amount(limit.resource, limit.bound)}: "
            f"{amount(limit.resource, found.value)} ({found.evidence}), "
            + ("proven" if limit.holds else "not proven")
        )
    best = manifest.subnetworks[0]
    for name, quality in (("quality", best.quality), ("original", best.original_quality)):
        if quality is not None:
            write(f"  {name}: {quality_words(quality)}")
    for number, step in enumerate(manifest.passes, start=1):
        settings = ", ".join(f"{k}={v}" for k, v in step.config.items())
        write(f"{number}. {step.name}({settings})" + (" undone" if step.undone else ""))
        if step.undone:
            write(f"   undone: {step.undone}")
        for resource in RESOURCES:
            before, after = step.before.get(resource).value, step.after.get(resource).value
            if before != after and before is not None and after is not None:
                change = ratio(before, after)
                write(
                    f"   {NAMES[resource]}: {amount(resource, before)} to "
                    f"{amount(resource, after)} ({change})"
                )
        _show_notes("did", step.did)
        _show_notes("declined", step.declined)
    for note in manifest.notes:
        write(f"- {note}")


def _show_notes(title: str, notes: tuple[Note, ...]) -> None:
    for note in notes:
        where = f"{note.where}: " if note.where else ""
        why = f" ({note.why})" if note.why else ""
        write(f"   {title} {where}{note.what}{why}")


def _checked(artifact: Path) -> Manifest:
    """What an artifact says, if it is about the files that are there."""
    from edgebudget_runtime import integrity
    from edgebudget_runtime.manifest import Manifest

    manifest = Manifest.load(artifact)
    integrity.verify(artifact, manifest)
    return manifest


def report(
    artifact: o.Artifact,
    out: Annotated[Path, typer.Option("--out", help="The HTML file to write.")] = Path(
        "report.html"
    ),
    profile: Annotated[
        Path | None,
        typer.Option("--profile", help="Times of nodes: of `edgebudget profile`, or ONNX Runtime."),
    ] = None,
    as_json: o.Json = False,
) -> None:
    """Write an artifact's report: one HTML page that needs nothing else.

    With times that were measured on this processor, its roofline is measured as well (a second).
    """
    from edgebudget.report import render

    manifest = _checked(artifact)
    o.write_file(out, render(manifest, _anatomy(artifact, manifest, profile)))
    if as_json:
        write_json({"report": str(out), "holds": manifest.holds})
    else:
        write(f"report written to {out}")


def _anatomy(folder: Path, manifest: Manifest, profile: Path | None) -> Anatomy | None:
    """The artifact's nodes; None where this machine cannot read its files."""
    from importlib.util import find_spec

    times = None
    if profile is not None:
        from edgebudget import layer_times
        from edgebudget_runtime import profile as profiles

        times = layer_times.read(profile, manifest, profiles.digest(folder))
    if find_spec("onnx") is None:
        return None
    from edgebudget import target_registry
    from edgebudget.layer_loads import anatomy

    if times is None:
        try:
            target = target_registry.get(manifest.target.name)
        except EdgeBudgetError:  # a plug-in that is not installed here
            return anatomy(folder, manifest)
        return anatomy(folder, manifest, target)
    return anatomy(folder, manifest, None, times.ms, times.how, _roof(manifest, times))


def _roof(manifest: Manifest, times: Times) -> Roof | None:
    """Of this processor, where the times are its own."""
    from edgebudget.measure_roof import measure
    from edgebudget_runtime.device_id import here

    cpu = here("", "", 1).cpu
    if times.cpu != cpu:
        return None
    return measure(cpu, integer=any("int8" in x.dtype for x in manifest.layers_after))
