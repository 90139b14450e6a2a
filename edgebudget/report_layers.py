"""The report's chapter on single nodes: their place under the roofline, their time, their place.

The roofline after "Roofline: An Insightful Visual Performance Model for Multicore Architectures"
(2009), in multiply-accumulates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from edgebudget.layer_loads import Anatomy, Load, Roof
from edgebudget.report_markup import Markup, joined, si, tag
from edgebudget_runtime.manifest import Layer, Placement

_WIDTH, _HEIGHT = 760.0, 340.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 64.0, 20.0, 22.0, 46.0
_LETTER = 6.3
_LISTED = 20  # of the slowest nodes


def chapter(anatomy: Anatomy, placement: Placement | None) -> Markup:
    """Roofline, times and places of the nodes; nothing for files that cannot be read."""
    if not anatomy.loads:
        return joined()
    where = placement_map(anatomy.loads, placement) if placement is not None else joined()
    timed = [x for x in anatomy.loads if x.ms is not None]
    if not timed:
        said = (
            "No node was timed: the same compile gives the same bytes, and times differ. "
            "`edgebudget profile ARTIFACT --out FILE`, then `edgebudget report ARTIFACT "
            "--profile FILE` adds times and the roofline."
        )
        return joined(tag("h2", "Node by node"), where, tag("p", said, class_="soft"))
    total = sum(x.ms or 0.0 for x in timed)
    said = f"{len(timed)} nodes take {total:.4g} ms ({anatomy.evidence}: {anatomy.how})."
    return joined(
        tag("h2", "Node by node"),
        where,
        tag("p", said, class_="soft"),
        flame(timed),
        _slowest(timed, total, anatomy.roof),
        joined() if anatomy.roof is None else _roofline(timed, anatomy.roof, anatomy.evidence),
    )


def _roofline(timed: Sequence[Load], roof: Roof, evidence: str) -> Markup:
    working = [x for x in timed if x.macs > 0 and x.bytes > 0 and x.ms]
    if not working or roof.macs_per_s.value is None or roof.bytes_per_s.value is None:
        return joined()
    said = (
        f"Peak {si(roof.macs_per_s.value, 'MACs/s')} ({roof.macs_per_s.evidence}: "
        f"{roof.macs_per_s.how}); bandwidth {si(roof.bytes_per_s.value, 'B/s')} "
        f"({roof.bytes_per_s.evidence}: {roof.bytes_per_s.how}). Each point is a node, its rate "
        f"{evidence}; left of the corner bytes bind, right of it arithmetic does. A node whose "
        "data stay in a cache may lie above the slope."
    )
    return joined(tag("h3", "Roofline"), roofline(working, roof), tag("p", said, class_="soft"))


def rate(load: Load) -> float:
    """Multiply-accumulates per second of a node that was timed."""
    return load.macs / (load.ms or math.inf) * 1e3


def reachable(load: Load, roof: Roof) -> float:
    """What the roof allows a node of this intensity, in multiply-accumulates per second."""
    peak, bandwidth = roof.macs_per_s.value or 0.0, roof.bytes_per_s.value or 0.0
    return min(peak, bandwidth * load.macs / load.bytes)


@dataclass(frozen=True, slots=True)
class _Log:
    """A logarithmic axis of whole decades."""

    low: int
    high: int
    start: float
    end: float

    @staticmethod
    def of(values: Sequence[float], start: float, end: float) -> _Log:
        logs = [math.log10(v) for v in values if v > 0]
        low, high = math.floor(min(logs)), math.ceil(max(logs))
        return _Log(low, max(high, low + 1), start, end)

    def at(self, value: float) -> float:
        share = (math.log10(value) - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    @property
    def ticks(self) -> list[float]:
        return [10.0**k for k in range(self.low, self.high + 1)]


def roofline(loads: Sequence[Load], roof: Roof) -> Markup:
    """Every node's rate against its arithmetic intensity, below the roof."""
    peak, bandwidth = roof.macs_per_s.value or 1.0, roof.bytes_per_s.value or 1.0
    corner = peak / bandwidth
    intensities = [x.macs / x.bytes for x in loads]
    x = _Log.of([*intensities, corner], _LEFT, _WIDTH - _RIGHT)
    y = _Log.of([*(rate(v) for v in loads), peak], _HEIGHT - _BOTTOM, _TOP)
    parts: list[Markup] = []
    for tick in y.ticks:
        parts.append(_line(x.start, y.at(tick), x.end, y.at(tick), "grid"))
        parts.append(_text(x.start - 8, y.at(tick) + 4, si(tick), "end"))
    for tick in x.ticks:
        parts.append(_line(x.at(tick), y.start, x.at(tick), y.start + 5, "axis"))
        parts.append(_text(x.at(tick), y.start + 19, f"{tick:g}", "middle"))
    parts.append(_line(x.start, y.start, x.end, y.start, "axis"))
    parts.append(_text(x.end, y.start + 38, "MACs per byte", "end", "title"))
    parts.append(_text(x.start, y.end - 8, "MACs per second", "start", "title"))
    first = max(10.0**x.low, 10.0**y.low / bandwidth)
    bend = f"{x.at(first):.1f},{y.at(first * bandwidth):.1f} {x.at(corner):.1f},{y.at(peak):.1f}"
    parts.append(tag("polyline", points=f"{bend} {x.end:.1f},{y.at(peak):.1f}", class_="roof"))
    for load in loads:
        share = rate(load) / reachable(load, roof)
        words = (
            f"{load.name} ({load.op}): {load.macs / load.bytes:.3g} MACs per byte, "
            f"{si(rate(load), 'MACs/s')}, {share:.0%} of what the roof allows"
        )
        at = {"cx": x.at(load.macs / load.bytes), "cy": y.at(rate(load))}
        parts.append(tag("circle", tag("title", words), r=4.5, class_="point", **at))
    label = f"Roofline of {len(loads)} nodes"
    return _svg(_HEIGHT, label, parts)


def flame(timed: Sequence[Load]) -> Markup:
    """One bar per segment; each node as wide as its share of all time, in order."""
    total = sum(x.ms or 0.0 for x in timed) or 1.0
    segments = list(dict.fromkeys(x.segment for x in timed))
    parts: list[Markup] = []
    start = 0.0
    for row, segment in enumerate(segments):
        top = row * 34.0
        for index, load in enumerate(x for x in timed if x.segment == segment):
            wide = _WIDTH * (load.ms or 0.0) / total
            words = f"{load.name} ({load.op}): {load.ms or 0.0:.4g} ms, {wide / _WIDTH:.1%}"
            kind = "flame" if index % 2 == 0 else "flame odd"
            parts.append(tag("rect", tag("title", words), x=start, y=top, width=wide,
                             height=26.0, class_=kind))  # fmt: skip
            shown = load.op[: int((wide - 6) / _LETTER)] if wide > 3 * _LETTER else ""
            if shown:
                parts.append(_text(start + 4, top + 17, shown, "start", "inside"))
            start += wide
    return _svg(34.0 * len(segments), "Time of every node in order", parts)


def _slowest(timed: Sequence[Load], total: float, roof: Roof | None) -> Markup:
    rows = []
    for load in sorted(timed, key=lambda x: -(x.ms or 0.0))[:_LISTED]:
        share = "" if roof is None or not load.macs or not load.ms else _of_roof(load, roof)
        cells = (load.name, load.op, f"{load.ms or 0.0:.4g} ms",
                 f"{(load.ms or 0.0) / total:.1%}" if total else "", share)  # fmt: skip
        rows.append(tag("tr", *(tag("td", c, class_="n" if i > 1 else None)
                                for i, c in enumerate(cells))))  # fmt: skip
    titles = ("Node", "Operator", "Time", "Share", "Of the roof")
    head = tag("tr", *(tag("th", t, class_="n" if i > 1 else None) for i, t in enumerate(titles)))
    table = tag("table", tag("thead", head), tag("tbody", *rows))
    title = f"The {len(rows)} slowest nodes" if len(rows) < len(timed) else "All nodes"
    return tag("details", tag("summary", title), tag("div", table, class_="scroll"))


def _of_roof(load: Load, roof: Roof) -> str:
    allowed = reachable(load, roof)
    return f"{rate(load) / allowed:.0%}" if allowed > 0 else ""


def placement_map(loads: Sequence[Load], placement: Placement) -> Markup:
    """Every node in order as a cell, coloured by where it runs."""
    elsewhere = {x.name: x for x in placement.fallback}
    across = 60
    side = _WIDTH / across
    parts: list[Markup] = []
    for index, load in enumerate(loads):
        node = elsewhere.get(load.name)
        place = placement.processor if node is None else node.processor
        why = "" if node is None or not node.why else f": {node.why}"
        parts.append(
            tag(
                "rect",
                tag("title", f"{load.name} ({load.op}) on {place}{why}"),
                x=index % across * side,
                y=index // across * side,
                width=side - 1.5,
                height=side - 1.5,
                class_="good" if node is None else "bad",
            )
        )
    rows = -(-len(loads) // across)
    label = f"Where each of {len(loads)} nodes runs"
    return _svg(rows * side, label, parts)


def paired(
    before: Sequence[Layer], after: Sequence[Layer]
) -> Iterator[tuple[Layer | None, Layer | None]]:
    """Layers of the same name side by side; layers that came or went stand alone."""
    later: dict[str, list[Layer]] = {}
    for layer in after:
        later.setdefault(layer.name, []).append(layer)
    for layer in before:
        same = later.get(layer.name)
        yield layer, same.pop(0) if same else None
    for rest in later.values():
        yield from zip_longest((), rest)


def _svg(height: float, label: str, parts: Sequence[Markup]) -> Markup:
    box = f"0 0 {_WIDTH:g} {height:g}"
    return tag("svg", *parts, viewBox=box, class_="plot", role="img", aria_label=label)


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=kind)


def _text(x: float, y: float, text: str, anchor: str, kind: str | None = None) -> Markup:
    return tag("text", text, x=x, y=y, text_anchor=anchor, class_=kind)
