"""A comparison as a table for terminals and for documents."""

from __future__ import annotations

from collections.abc import Iterator

from edgebudget.comparing import Comparison, Row
from edgebudget.report_markup import amount
from edgebudget_runtime.cost import Figure, Resource

_TITLES = ("target", "MACs", "bytes", "latency", "energy", "DRAM traffic", "not on it", "quality")
_SHORT = 48  # of a reason inside a table; the whole is below it


def table(found: Comparison) -> tuple[list[str], list[list[str]]]:
    """Titles and rows; each dear figure with its evidence."""
    return list(_TITLES), [_cells(row) for row in found.rows]


def notes(found: Comparison) -> list[str]:
    """What a row has no room for: who ran it, why figures are missing, what to install."""
    lines = []
    if found.original.macs.value is not None:
        size = amount("size_bytes", found.original.size_bytes.value)
        lines.append(f"original: {amount('macs', found.original.macs.value)}, {size} in float32")
    for row in found.rows:
        if row.why:
            tried = f"; {row.hint}" if row.hint else ""
            lines.append(f"{row.target}: {row.why}{tried}")
            continue
        lines.append(f"{row.target}: {row.device}, through {row.engine}")
        lines += [f"  {words}" for words in _sources(row)]
    return lines


def markdown(found: Comparison) -> str:
    """A section of a document: a table, and where its figures come from."""
    titles, rows = table(found)
    lines = [f"## {found.model}", "", _line(titles), _line(["---"] * len(titles))]
    lines += [_line(row) for row in rows]
    lines.append("")
    lines += [f"{'  ' if n.startswith('  ') else ''}- {n.strip()}" for n in notes(found)]
    return "\n".join(lines) + "\n"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(c.replace('|', '/') for c in cells)} |"


def _cells(row: Row) -> list[str]:
    if row.why:
        short = row.why if len(row.why) <= _SHORT else f"{row.why[:_SHORT]}..."
        return [row.target, short, *[""] * (len(_TITLES) - 2)]
    cost, quality = row.cost, row.quality
    nodes = cost.fallback_nodes.value
    return [
        row.target,
        amount("macs", cost.macs.value),
        amount("size_bytes", cost.size_bytes.value),
        _dear("latency_ms", cost.latency_ms),
        _dear("energy_mj", cost.energy_mj),
        _dear("size_bytes", row.traffic_bytes),
        "unknown" if nodes is None else f"{nodes:.0f} of {row.nodes} nodes",
        "" if quality is None else f"{quality.metric} {quality.value:.4f}{_against(row)}",
    ]


def _dear(resource: Resource, figure: Figure) -> str:
    if figure.value is None:
        return "unknown"
    return f"{amount(resource, figure.value)} {figure.evidence}"


def _against(row: Row) -> str:
    return "" if row.original_quality is None else f" (original {row.original_quality.value:.4f})"


def _sources(row: Row) -> Iterator[str]:
    for name, figure in (("latency", row.cost.latency_ms), ("energy", row.cost.energy_mj)):
        if figure.how:
            yield f"{name} {figure.evidence}: {figure.how}"
    yield from row.notes
