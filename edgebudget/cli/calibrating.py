"""`calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgebudget.cli import options as o
from edgebudget.cli.output import write, write_json
from edgebudget.cli.progress import listening
from edgebudget_runtime.errors import TargetError, UnsupportedError

if TYPE_CHECKING:
    from edgebudget.predictor import Predictor
    from edgebudget.target import CalibratedTarget


def register(app: typer.Typer) -> None:
    """Add this file's command."""
    app.command()(calibrate)


def calibrate(
    device: Annotated[str, typer.Option("--device", help="Where to measure: local.")] = "local",
    target: o.TargetName = "cpu",
    time_limit: Annotated[
        str, typer.Option("--time-limit", help="Fit what was measured by then, a minute more: 18m.")
    ] = "18m",
    networks: Annotated[
        int | None,
        typer.Option("--networks", min=1, help="Small networks, each in float and in int8."),
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option("--rounds", min=1, help="How often each is timed; the quietest counts."),
    ] = None,
    use: Annotated[
        Path | None, typer.Option("--use", help="Check and keep a predictor from elsewhere.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Also write the predictor to this file.")
    ] = None,
    as_json: o.Json = False,
) -> None:
    """Time a few hundred kernels on a device, and fit the predictor of its latency and energy.

    A run that is interrupted goes on where it ended.
    """
    from edgebudget_runtime.budget import Budget

    limit_s = Budget.parse(time_limit=time_limit).time_limit_s
    with listening() as emit:
        from edgebudget import calibrate as work
        from edgebudget import predictor_fit, predictors

        chosen = _calibrated(device, target)
        here = chosen.device()
        skipped = 0
        if use is not None:
            found = predictors.adopt(use, here)
        else:
            log = work.calibrate(
                chosen, networks=networks, rounds=rounds, limit_s=limit_s or 0.0, emit=emit
            )
            found, skipped = predictor_fit.fit(here, log.best), log.skipped
            found.save(predictors.user_file(here))
        kept = predictors.user_file(here)
    if out is not None:
        o.write_file(out, found.encode().decode("ascii"))
    if as_json:
        write_json(_plain(found, kept, skipped))
        return
    write(f"{here.engine} {here.engine_version} on {here.cpu}, threads: {here.threads}")
    kernels = sum(r.count for k, r in found.regressors.items() if k != "*")
    write(
        f"{len(found.regressors)} kinds of kernels, {kernels} timed, floor {found.floor_us:.1f} us"
    )
    write(f"latency, {found.errors.words}")
    if found.energy is None:
        write("energy: unknown, no counter answers here (`edgebudget doctor`)")
    else:
        write(f"energy, {found.energy.error_words}")
    write(f"predictor {kept}")


def _calibrated(device: str, name: str) -> CalibratedTarget:
    from edgebudget import target_registry
    from edgebudget.target import TellsKernels

    target = target_registry.get(name)
    known = device == "local" and isinstance(target, TellsKernels)
    if known and not (state := target.available()).ok:
        raise TargetError("EB601", f"{name}: {state.why}", hint=state.install)
    if not isinstance(target, TellsKernels) or not (known and "latency_ms" in target.spec.tells):
        what = f"device {device!r}" if device != "local" else f"target {name!r}"
        raise UnsupportedError(
            "EB246",
            f"{what} cannot be calibrated: its engine does not tell its kernels' times here",
            hint="calibrate `--device local --target cpu`",
        )
    return target


def _plain(found: Predictor, kept: Path, skipped: int) -> dict[str, object]:
    return {
        "predictor": str(kept),
        "device": found.device.cpu,
        "engine": f"{found.device.engine} {found.device.engine_version}",
        "networks": found.errors.networks,
        "median_error": found.errors.median,
        "p90_error": found.errors.p90,
        "rank_correlation": found.errors.rank_correlation,
        "energy": None
        if found.energy is None
        else {
            "median_error": found.energy.median_error,
            "p90_error": found.energy.p90_error,
        },
        "damaged_lines": skipped,
        "kernels": {k: r.count for k, r in sorted(found.regressors.items())},
    }
