"""`compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgebudget.cli import options as o
from edgebudget.cli.output import write, write_json, write_table
from edgebudget.cli.progress import listening

if TYPE_CHECKING:
    from edgebudget.comparing import Comparison


def register(app: typer.Typer) -> None:
    """Add this file's command."""
    app.command()(compare)


def compare(
    model: o.Model,
    targets: Annotated[
        str | None,
        typer.Option("--targets", help="Names joined by commas; one of each family otherwise."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Costs alone: no quality, and no data needed.")
    ] = False,
    data: o.Data = None,
    task: o.Task = None,
    weights: o.Weights = None,
    input_shape: o.InputShape = None,
    energy_model: o.EnergyModel = None,
    timeout: Annotated[
        float, typer.Option("--timeout", min=1, help="Seconds that one target may take.")
    ] = 1800.0,
    markdown: Annotated[
        Path | None, typer.Option("--markdown", help="Write a Markdown table to this file.")
    ] = None,
    seed: o.Seed = 0,
    as_json: o.Json = False,
) -> None:
    """Show one network on several targets side by side, without compiling it to a budget."""
    from edgebudget.compare_text import markdown as as_markdown
    from edgebudget.compare_text import notes, table
    from edgebudget.comparing import Comparison
    from edgebudget.comparing import compare as run
    from edgebudget.target_registry import families
    from edgebudget_runtime import codec

    named = [n.strip() for n in (targets or "").split(",") if n.strip()]
    with listening() as emit:
        found: Comparison = run(
            model,
            named or families(),
            weights=weights,
            data=data,
            task=task,
            input_shape=o.parse_shape(input_shape),
            energy_model=energy_model,
            seed=seed,
            quick=quick,
            limit_s=timeout,
            emit=emit,
        )
    if markdown is not None:
        o.write_file(markdown, as_markdown(found))
    if as_json:
        write_json(codec.encode(Comparison, found))
        return
    write_table(*table(found))
    for line in notes(found):
        write(line)
