"""What commands print: answers on stdout, everything else on stderr."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType


def fail(text: str) -> None:
    """One short block on stderr."""
    sys.stderr.write(f"{text}\n")


def write_json(value: Any) -> None:
    """Pure JSON on stdout, nothing else."""
    sys.stdout.write(json.dumps(finite(value), indent=1, ensure_ascii=False) + "\n")


def finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return value


def write(text: str) -> None:
    """A line of an answer for people."""
    sys.stdout.write(f"{text}\n")


def write_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table; columns whose cells are numbers are set right. Piped, it keeps its full width."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for column, title in enumerate(header):
        numeric = bool(rows) and all(_numeric(r[column]) for r in rows)
        table.add_column(title, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    _print(table)


def _numeric(cell: str) -> bool:
    return not cell or cell == "-" or cell[0].isdigit()


def _print(what: RenderableType) -> None:
    from rich.console import Console

    terminal = sys.stdout.isatty()
    console = Console(file=sys.stdout, width=None if terminal else 400, highlight=False)
    with console.capture() as caught:
        console.print(what)
    sys.stdout.write("\n".join(line.rstrip() for line in caught.get().splitlines()) + "\n")


@contextmanager
def only_answers() -> Iterator[None]:
    """Send to stderr whatever libraries print meanwhile, from Python or from native code."""
    sys.stdout.flush()
    real = None
    with suppress(OSError, ValueError, AttributeError):  # a captured stream has no descriptor
        real = 1 if sys.stdout.fileno() == 1 else None
    kept = None if real is None else os.dup(1)
    try:
        if kept is not None:
            os.dup2(2, 1)
        with redirect_stdout(sys.stderr):
            yield
    finally:
        if kept is not None:
            os.dup2(kept, 1)
            os.close(kept)
