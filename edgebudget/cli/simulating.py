"""`simulate`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgebudget.cli import options as o
from edgebudget.cli.output import write, write_json, write_table
from edgebudget.cli.progress import listening
from edgebudget.events import Said
from edgebudget_runtime.errors import UsageError

if TYPE_CHECKING:
    from edgebudget.events import Emit
    from edgebudget.simulate import Replay, Store
    from edgebudget_runtime.manifest import Manifest
    from edgebudget_runtime.profile import Profile
    from edgebudget_runtime.trace import Request

_DEADLINES = 5  # made from the artifact's own latencies
_ROOM = 1.5  # of the longest of them over the slowest path
_RATE = 20.0  # requests a second, where nothing tells what is usual
_MOST_BYTES = 10**10


def register(app: typer.Typer) -> None:
    """Add this file's commands."""
    app.command()(simulate)


def simulate(
    trace: Annotated[Path, typer.Argument(metavar="TRACE", help="A .jsonl file of requests.")],
    artifact: Annotated[
        Path | None, typer.Option("--artifact", help="The folder that `compile --out` wrote.")
    ] = None,
    profile: Annotated[
        Path | None, typer.Option("--profile", help="What it costs on a device (newest known).")
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option("--policy", help="best, deadline, paced, fixed:ID, point:ID. Repeatable."),
    ] = None,
    power: Annotated[
        float | None, typer.Option("--power", min=0, help="Mean watts of the device at work.")
    ] = None,
    battery: Annotated[
        str | None, typer.Option("--battery", help="Energy that is there at the start: 500J.")
    ] = None,
    income: Annotated[
        float, typer.Option("--income", min=0, help="Watts that the battery gains meanwhile.")
    ] = 0.0,
    make: Annotated[
        str | None,
        typer.Option("--make", help="Write TRACE first: steady, bursts, throttling, battery."),
    ] = None,
    count: Annotated[int, typer.Option("--count", min=1, help="Requests to make.")] = 2000,
    rate: Annotated[float | None, typer.Option("--rate", help="Requests a second to make.")] = None,
    deadlines: Annotated[
        str | None, typer.Option("--deadlines", help="Milliseconds to choose from: 2,4,8.")
    ] = None,
    energy: Annotated[
        str | None, typer.Option("--energy", help="Allowed for each made request: 5mJ.")
    ] = None,
    seed: o.Seed = 0,
    as_json: o.Json = False,
) -> None:
    """Replay a trace of requests, and compare policies without hardware."""
    from edgebudget import make_trace
    from edgebudget_runtime.budget import Budget
    from edgebudget_runtime.manifest import Manifest

    allowed = Budget.parse(energy=energy).limit("energy_mj")
    held = Budget.parse(energy=battery).limit("energy_mj")
    with listening() as emit:
        found = None
        if artifact is not None:
            found = Manifest.load(artifact), _profile(artifact, profile, emit)
        if make is not None:
            made = partial(make_trace.make, make, count=count, energy_mj=allowed, seed=seed)
            _make(trace, made, found, rate, deadlines)
        results = None
        if found is not None:
            results = _replays(trace, *found, policy, power, _store(held, income), seed)
    if results is None:
        if make is None:
            raise UsageError("EB184", "there is nothing to replay on", hint="name an --artifact")
        write(f"{count} requests written to {trace}")
        return
    if as_json:
        write_json([dataclasses.asdict(r) for r in results])
    else:
        _show(results)


def _store(held: float | None, income: float) -> Store | None:
    from edgebudget.simulate import Store

    if held is None:
        if income:
            raise UsageError("EB184", "--income needs a store to fill", hint="add --battery 500J")
        return None
    return Store(capacity_mj=held, rate_mw=income * 1e3)


def _profile(artifact: Path, file: Path | None, emit: Emit) -> Profile | None:
    """The profile that the user named, or the newest of this artifact that is kept here."""
    from edgebudget_runtime import profile as profiles

    own = profiles.digest(artifact)
    if file is None:
        folder = profiles.default_folder()
        kept = sorted(folder.glob(f"{own[:32]}-*.json"), key=lambda f: f.stat().st_mtime)
        if not kept:
            return None
        file = kept[-1]
        emit(Said("info", f"profile {file}"))
    try:
        found = profiles.Profile.decode(file.read_bytes())
    except OSError as e:
        raise UsageError(
            "EB184", f"the profile {file} cannot be read: {e.strerror}", hint="name another"
        ) from e
    if found.artifact != own:
        raise UsageError(
            "EB184", f"the profile {file} is of another artifact", hint="run this artifact once"
        )
    return found


def _make(
    trace: Path,
    requests: Callable[..., Iterator[Request]],
    artifact: tuple[Manifest, Profile | None] | None,
    rate: float | None,
    deadlines: str | None,
) -> None:
    """Write a made trace; the artifact's latencies stand in for what the user did not say."""
    from edgebudget_runtime.trace import Writer

    chosen = _numbers(deadlines)
    if artifact is not None:
        from edgebudget.simulate import segment_samples, usual_ms

        samples = segment_samples(*artifact)
        usual = [usual_ms(samples, sub.path) for sub in artifact[0].subnetworks]
        step = (_ROOM * max(usual) - min(usual)) / _DEADLINES
        if deadlines is None:
            chosen = [min(usual) + step * (i + 1) for i in range(_DEADLINES)]
        rate = rate or 500.0 / max(usual)  # the slowest path is busy half of the time
    with Writer(trace, most_bytes=_MOST_BYTES) as writer:
        for request in requests(rate_per_s=rate or _RATE, deadlines_ms=chosen):
            writer.write(request)
    if writer.dropped:
        raise UsageError("EB183", f"the trace {trace} cannot be written whole", hint="free space")


def _numbers(text: str | None) -> list[float]:
    try:
        return [float(part) for part in text.split(",")] if text else []
    except ValueError as e:
        raise UsageError(
            "EB184", f"--deadlines {text!r} are no numbers", hint="milliseconds: 2,4,8"
        ) from e


def _replays(
    trace: Path,
    manifest: Manifest,
    profile: Profile | None,
    names: Sequence[str] | None,
    power_w: float | None,
    store: Store | None,
    seed: int,
) -> list[Replay]:
    from edgebudget import simulate as s
    from edgebudget_runtime.policy import named
    from edgebudget_runtime.trace import read

    samples = s.segment_samples(manifest, profile)
    front = s.prepare_front(manifest, samples, power_w)
    default = ["deadline", "best", *(f"fixed:{x.id}" for x in manifest.subnetworks)]
    policies = {n: named(n, manifest) for n in names or default}
    return [
        s.replay(read(trace), front, samples, policy, name=name, store=store, seed=seed)
        for name, policy in policies.items()
    ]


def _show(results: Sequence[Replay]) -> None:
    def cell(value: float | None, how: str) -> str:
        return "-" if value is None else format(value, how)

    rows: list[list[Any]] = [
        [
            r.policy,
            f"{r.late_share:.2%}",
            str(r.avoidable),
            str(r.overspent),
            cell(r.quality, ".4f"),
            cell(r.quality_in_time, ".4f"),
            cell(r.energy_mj, ".4g"),
            cell(r.p50_ms, ".3g"),
            cell(r.p99_ms, ".3g"),
            ", ".join(f"{id} {n / r.requests:.0%}" for id, n in r.ran.items()),
        ]
        for r in results
    ]
    header = ["policy", "late", "avoidably", "overspent", "quality", "in time", "mJ", "p50 ms",
              "p99 ms", "ran"]  # fmt: skip
    write(f"{results[0].requests} requests")
    write_table(header, rows)
