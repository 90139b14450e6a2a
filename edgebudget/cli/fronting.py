"""`frontier`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgebudget.cli import options as o
from edgebudget.cli.output import write, write_json, write_table

if TYPE_CHECKING:
    from edgebudget_runtime.manifest import Manifest
    from edgebudget_runtime.profile import Profile


def register(app: typer.Typer) -> None:
    """Add this file's command."""
    app.command()(frontier)


def frontier(
    artifact: o.Artifact,
    measure: Annotated[
        bool, typer.Option("--measure", help="Time every segment on this device, and keep it.")
    ] = False,
    profile_file: Annotated[
        Path | None,
        typer.Option("--profile", help="Latency and energy of another device: `profile --out`."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Write quality against MACs as an SVG file.")
    ] = None,
    as_json: o.Json = False,
) -> None:
    """Every sub-network and operating point: MACs, ms, mJ, bytes and quality."""
    from edgebudget import report_svg
    from edgebudget.frontier import as_candidates, ways
    from edgebudget.report_markup import amount, metric
    from edgebudget_runtime.manifest import Manifest

    manifest = Manifest.load(artifact)
    if measure:
        _measure(artifact)
    profile, note = _known(artifact, manifest, profile_file)
    found = ways(manifest, profile)
    if plot is not None:
        known = tuple(w for w in found if w.quality is not None)
        points = as_candidates(known or found, manifest.subnetworks[0].id)
        o.write_file(plot, report_svg.scatter(points, metric(manifest.workload.metric), None))
    if as_json:
        write_json({"ways": [w.as_dict() for w in found], "profile": note})
        return
    rows = []
    for w in found:
        q = w.quality
        rows.append(
            [
                w.id,
                "mean" if w.mean else "worst",
                amount("macs", w.macs.value),
                amount("latency_ms", w.latency_ms.value),
                amount("latency_ms", w.p99_ms.value),
                amount("energy_mj", w.energy_mj.value),
                amount("size_bytes", w.size_bytes.value),
                "unknown" if q is None else f"{q.value:.4f} [{q.low:.4f}, {q.high:.4f}]",
                w.certified,
            ]
        )
    metric_name = manifest.workload.metric
    header = ["", "", "MACs", "latency", "p99", "energy", "bytes", metric_name, "certified"]
    write_table(header, rows)
    if profile is not None and profile.detail is not None:
        d = profile.device
        where = f"{profile.detail.where}: {d.cpu}, {d.engine} {d.engine_version}"
        write(f"latency and energy of {where}, {d.threads} threads")
    if (s := manifest.sharing) is not None:
        write(
            f"all sub-networks: {amount('size_bytes', float(s.stored_bytes))}, "
            f"{s.stored_bytes / max(1, s.largest_bytes):.2f} times the largest alone"
        )
    if note:
        write(f"latency on this device: {note} (`--measure` or `edgebudget profile` times it)")


def _measure(artifact: Path) -> None:
    """Time every segment on zeros of the input's shape: integer kernels do not look at values."""
    import numpy as np

    from edgebudget_runtime.runner import Runner

    with Runner(artifact) as runner:
        runner.calibrate(
            {t.name: np.zeros([d or 1 for d in t.shape], t.dtype) for t in runner.inputs}
        )


def _known(artifact: Path, manifest: Manifest, file: Path | None) -> tuple[Profile | None, str]:
    """The profile in a file, or this device's of the artifact, or why there is none.

    Raises:
        ArtifactError: EB580 the file cannot be read, EB581 it is of another artifact.
    """
    from edgebudget_runtime import engine, profile
    from edgebudget_runtime.device_id import here

    device = here(engine.CPU, engine.VERSION, engine.default_threads())
    own = profile.digest(artifact)
    segments = [s.id for s in manifest.segments]
    if file is not None:
        return profile.read(file, own, segments), ""
    return profile.load(profile.default_file(own, device), own, device, segments)
