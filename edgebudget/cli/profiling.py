"""`profile`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgebudget.cli import options as o
from edgebudget.cli.output import fail, write, write_json, write_table
from edgebudget.cli.progress import listening
from edgebudget_runtime.errors import TargetError, UsageError

if TYPE_CHECKING:
    from edgebudget.profile_subject import Subject
    from edgebudget_runtime.cost import Figure
    from edgebudget_runtime.profile import Profile
    from edgebudget_runtime.profile_detail import Detail

_SHOWN = 20  # layers for people; --json and --out have all


def register(app: typer.Typer) -> None:
    """Add this file's command."""
    app.command()(profile)


def profile(
    source: Annotated[
        str, typer.Argument(metavar="ARTIFACT|MODEL", help="An artifact folder, or any model.")
    ],
    device: Annotated[
        str,
        typer.Option("--device", help="local, ssh://[USER@]HOST[:PORT], adb:SERIAL."),
    ] = "local",
    target: Annotated[
        str | None,
        typer.Option("--target", help="What runs it there; the artifact's own, cpu for a model."),
    ] = None,
    seconds: Annotated[
        float, typer.Option("--seconds", help="For timing; layers and energy take as long again.")
    ] = 5.0,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="CPU threads; as `run` has them.")
    ] = None,
    layers: Annotated[bool, typer.Option(help="Time every node, in runs of their own.")] = True,
    energy: Annotated[bool, typer.Option(help="Read the device's energy counters.")] = True,
    energy_model: o.EnergyModel = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Write the profile, for `frontier` and runners.")
    ] = None,
    python: Annotated[
        str, typer.Option("--python", help="The interpreter on an ssh device.")
    ] = "python3",
    install: Annotated[
        bool, typer.Option("--install", help="pip install what an ssh device lacks.")
    ] = False,
    runner: Annotated[
        Path | None,
        typer.Option("--runner", help="onnxruntime_perf_test built for an adb device."),
    ] = None,
    silence: Annotated[
        float, typer.Option("--silence", min=1, help="Seconds until a silent device is lost.")
    ] = 300.0,
    weights: o.Weights = None,
    input_shape: o.InputShape = None,
    as_json: o.Json = False,
) -> None:
    """Where time and energy go on a device: percentiles, paths, layers, memory.

    On this device the profile of an artifact is also kept for `frontier` and runners.
    """
    from edgebudget import devices, energy_estimate
    from edgebudget.profile_device import measure
    from edgebudget.profile_subject import subject

    if not 0 < seconds <= 3600:
        raise UsageError("EB144", f"--seconds {seconds:g}", hint="more than 0, at most 3600")
    if energy_model is not None:
        energy_estimate.check(energy_model)
    link = devices.link(device, python=python, install=install, runner=runner, silence_s=silence)
    shape = o.parse_shape(input_shape)
    with (
        listening() as emit,
        subject(source, target, weights=weights, input_shape=shape, emit=emit) as what,
    ):
        measured = measure(
            what, link, threads=threads, seconds=seconds, layers=layers, energy=energy, emit=emit
        )
        found = measured.profile
        if energy_model is not None:
            found = _estimated(found, what, energy_model)
    detail = found.detail
    assert detail is not None
    kept = what.kept and measured.error is None and device == "local"
    note = _keep(found, out, kept)
    if as_json:
        write_json(_plain(found, detail, what.manifest.name))
    else:
        _show(found, detail, what.manifest.name)
        if note:
            write(note)
    if measured.error is not None:
        fail(str(measured.error))
        raise typer.Exit(TargetError.exit_code)


def _estimated(found: Profile, what: Subject, source: str) -> Profile:
    """Energies of a model where nothing measured any."""
    from edgebudget import energy_estimate

    version = found.device.engine_version
    predict = energy_estimate.predictor(source, engine=what.target.engine, engine_version=version)
    return energy_estimate.fill(found, what.folder, what.manifest, predict)


def _keep(found: Profile, out: Path | None, kept: bool) -> str:
    """Write what was asked for, and where runners look; what became of that."""
    from edgebudget_runtime import profile as profiles

    if out is not None and (why := profiles.save(found, out)):
        raise UsageError("EB108", f"{out}: {why}", hint="name another --out")
    if not kept:
        return ""
    why = profiles.save(found, profiles.default_file(found.artifact, found.device))
    return why or "kept for `frontier` and runners on this device"


def _plain(found: Profile, detail: Detail, name: str) -> dict[str, Any]:
    plain: dict[str, Any] = dataclasses.asdict(detail)
    segments = {s: _median(ms) for s, ms in found.samples_ms.items()}
    return {
        "name": name,
        "artifact": found.artifact,
        "device": dataclasses.asdict(found.device),
        "segments_p50_ms": segments,
        "energy_mj": {k: dataclasses.asdict(f) for k, f in found.energy.items()},
        **plain,
    }


def _median(ms: tuple[float, ...]) -> float:
    return sorted(ms)[len(ms) // 2]


def _show(found: Profile, detail: Detail, name: str) -> None:
    from edgebudget.report_markup import amount

    d = found.device
    threads = f"{d.threads} thread{'s' if d.threads > 1 else ''}"
    write(f"{name} on {detail.where}: {d.cpu}, {threads}, {d.engine} {d.engine_version}")
    rows = []
    for id, t in detail.paths.items():
        energy, gross = found.energy.get(id), detail.gross_energy.get(id)
        rows.append(
            [
                id,
                *(_ms(x) for x in (t.p50_ms, t.p90_ms, t.p95_ms, t.p99_ms)),
                f"{t.spread_ms:.3g}",
                str(t.runs),
                amount("energy_mj", None if energy is None else energy.value),
                amount("energy_mj", None if gross is None else gross.value),
            ]
        )
    header = ["path", "p50 ms", "p90", "p95", "p99", "spread", "runs", "energy", "with idle"]
    write_table(header, rows)
    if len(found.samples_ms) > 1:
        write_table(
            ["segment", "p50 ms", "runs kept"],
            [[s, _ms(_median(ms)), str(len(ms))] for s, ms in found.samples_ms.items()],
        )
    if detail.layers:
        ranked = sorted(detail.layers, key=lambda x: -x.ms)
        write_table(
            ["segment", "layer", "runs as", "ms", "share %"],
            [
                [x.segment, x.name + (" (the engine's own)" if x.added else ""), x.op,
                 f"{x.ms:.3f}", f"{100 * x.share:.1f}"]
                for x in ranked[:_SHOWN]
            ],
        )  # fmt: skip
        if len(ranked) > _SHOWN:
            rest = sum(x.ms for x in ranked[_SHOWN:])
            write(f"... {len(ranked) - _SHOWN} more layers, {rest:.3f} ms (--json has all)")
    write(f"memory above the idle process: {amount('memory_bytes', detail.memory_bytes.value)}")
    for label, key in (("temperature, C", "temperature"), ("clock, MHz", "frequency"),
                       ("load", "load")):  # fmt: skip
        write(f"{label}: {_before_after(detail, key)}")
    write(f"throttling: {_throttled(detail)}")
    write(f"idle power: {_watts(detail.idle_w)}")
    for how in dict.fromkeys(f"{f.evidence}: {f.how}" for f in found.energy.values()):
        write(f"energy, {how}")
    for note in detail.notes:
        write(note)


def _ms(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"


def _before_after(detail: Detail, key: str) -> str:
    found = [(k, f) for k, f in detail.conditions.items() if k.startswith(f"{key}_")]
    known = [
        f"{f.value:.4g} {'before' if '_before' in k else 'after'}"
        for k, f in found
        if f.value is not None
    ]
    return ", ".join(known) or f"unknown ({found[0][1].how})" if found else "unknown"


def _throttled(detail: Detail) -> str:
    before = detail.conditions.get("throttle_events_before")
    after = detail.conditions.get("throttle_events_after")
    if before is None or after is None or before.value is None or after.value is None:
        why = "" if before is None else f" ({before.how})"
        return f"unknown{why}"
    return f"{after.value - before.value:.0f} events while it was measured"


def _watts(figure: Figure) -> str:
    if figure.value is None:
        return f"unknown ({figure.how or 'not asked for'})"
    return f"{figure.value:.3g} W, {figure.how}"
