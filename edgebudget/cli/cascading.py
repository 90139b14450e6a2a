"""`cascade`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgebudget.cli import options as o
from edgebudget.cli.compiling import quality_words, summary
from edgebudget.cli.output import write, write_json, write_table
from edgebudget.cli.progress import listening
from edgebudget_runtime.errors import UsageError

if TYPE_CHECKING:
    from edgebudget.cascade import Cascade
    from edgebudget_runtime.manifest import Quality


def register(app: typer.Typer) -> None:
    """Add this file's command."""
    app.command()(cascade)


def cascade(
    small: Annotated[Path, typer.Argument(metavar="SMALL", help="The artifact asked first.")],
    large: Annotated[Path, typer.Argument(metavar="LARGE", help="Asked where SMALL is in doubt.")],
    out: Annotated[Path, typer.Option("--out", help="The artifact's folder.")],
    macs_mean: Annotated[
        str | None, typer.Option("--macs-mean", help="Mean multiply-accumulates: 60M.")
    ] = None,
    max_drop: Annotated[
        str | None,
        typer.Option("--max-drop", help="Quality that may be lost against LARGE, certified: 1%."),
    ] = None,
    confidence: Annotated[
        str | None, typer.Option("--confidence", help="Of --max-drop; 95% otherwise.")
    ] = None,
    held_back: Annotated[
        str | None,
        typer.Option(
            "--held-back",
            help="Solve on this share of the evaluation set instead of the calibration set: 50%.",
        ),
    ] = None,
    data: o.Data = None,
    task: o.Task = None,
    original: Annotated[
        str | None,
        typer.Option("--original", help="The model LARGE was compiled from, if it moved."),
    ] = None,
    weights: o.Weights = None,
    seed: o.Seed = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace an artifact at --out.")] = False,
    as_json: o.Json = False,
) -> None:
    """Join two artifacts into one that asks LARGE only where SMALL is in doubt. Trains nothing."""
    from edgebudget_runtime.budget import Budget

    budget = Budget.parse(macs=macs_mean, max_drop=max_drop)
    if confidence is not None and max_drop is None:
        raise UsageError("EB194", "--confidence needs --max-drop", hint="add --max-drop 1%")
    with listening() as emit:
        from edgebudget import cascade as library

        wish = library.Wish(
            macs_mean=budget.limit("macs"),
            max_drop=budget.max_drop,
            confidence=_share("--confidence", confidence) or library.CONFIDENCE,
            held_back=_share("--held-back", held_back),
        )
        result = library.cascade(
            small, large, out=out, wish=wish, original=original, weights=weights, data=data,
            task=task, seed=seed, force=force, on_event=emit,
        )  # fmt: skip
    if as_json:
        chosen = None if result.chosen is None else result.chosen.id
        write_json({**summary(result.out, result.manifest), "operating_point": chosen})
    else:
        _show(result)


def _share(option: str, text: str | None) -> float | None:
    """A fraction below 1: 95% or 0.95."""
    if text is None:
        return None
    try:
        value = float(text.rstrip("%")) / (100.0 if text.endswith("%") else 1.0)
    except ValueError:
        value = 0.0
    if not 0.0 < value < 1.0:
        raise UsageError("EB194", f"{option} {text} is not between 0 and 1", hint="95% or 0.95")
    return value


def _show(result: Cascade) -> None:
    from edgebudget.report_markup import si

    manifest = result.manifest
    rows = [
        ["", sub.id, si(sub.cost.macs.value or 0.0, "MACs"), "", _quality(sub.quality)]
        for sub in sorted(manifest.subnetworks, key=lambda s: s.cost.macs.value or 0.0)
    ]
    rows += [
        [
            "*" if point == result.chosen else "",
            point.id,
            si(point.mean_cost.macs.value or 0.0, "MACs"),
            f"{100 * point.shares.get('large', 0.0):.1f} %",
            _quality(point.quality),
        ]
        for point in manifest.operating_points
    ]
    write_table(["", "path or point", "mean MACs", "to the large one", "quality"], rows)
    if result.chosen is not None and result.chosen.certificate is not None:
        certificate = result.chosen.certificate
        write(
            f"certified: at most {certificate.max_drop:.3g} lost, {certificate.confidence:.4g} "
            f"sure; {certificate.how}"
        )
    write(f"artifact {result.out}, report {result.out / 'report.html'}")


def _quality(quality: Quality | None) -> str:
    return "unknown" if quality is None else quality_words(quality)
