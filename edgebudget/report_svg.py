"""Plots as inline SVG. Colours come from the page's style, details from native tooltips."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from edgebudget.report_markup import Markup, joined, si, tag
from edgebudget_runtime.manifest import Candidate, Layer

_WIDTH = 760.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 64.0, 20.0, 18.0, 46.0
_LETTER = 6.3  # width of one character of a label
_PRECISIONS = (("int8", "8-bit integer"), ("int16", "16-bit integer"), ("float", "float"))


@dataclass(frozen=True, slots=True)
class Axis:
    """Maps values to pixels, and knows where its ticks are."""

    low: float
    high: float
    start: float  # pixels
    end: float
    ticks: tuple[float, ...]

    def at(self, value: float) -> float:
        """The pixel of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def axis(values: Sequence[float], start: float, end: float, *, zero: bool = False) -> Axis:
    """An axis that holds every value, with about five round ticks."""
    low, high = (0.0 if zero else min(values)), max(values)
    pad = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    low, high = (0.0 if zero else low - pad), high + pad
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    count = math.floor(high / step + 1e-9) - first + 1
    return Axis(low, high, start, end, tuple((first + i) * step for i in range(count)))


def scatter(candidates: Sequence[Candidate], metric: str, bound: float | None) -> Markup:
    """Quality against MACs of the candidates; the chosen one stands out."""
    height = 340.0
    known = [c for c in candidates if c.quality is not None]
    macs = [c.macs for c in candidates] + ([] if bound is None else [bound])
    zero = min(macs) < 0.6 * max(macs)
    x = axis(macs, _LEFT, _WIDTH - _RIGHT, zero=zero)
    y = axis([_quality(c) for c in known], height - _BOTTOM, _TOP)
    parts = [*_grid(x, y, metric)]
    if bound is not None:
        parts.append(_limit(x, y, bound))
    front = " ".join(f"{x.at(c.macs):.1f},{y.at(_quality(c)):.1f}" for c in _front(known))
    parts.append(tag("polyline", points=front, class_="front"))
    for c in candidates:
        parts.append(_point(c, x, y, metric))
    parts += _labels(known, x, y)
    return _svg(height, f"{metric} against MACs of {len(candidates)} candidates", parts)


def columns(before: Sequence[Layer], after: Sequence[Layer]) -> Markup:
    """MACs of every layer in order, before above and after below, on one scale."""
    height, each = 384.0, 150.0
    shown = [[x for x in layers if x.macs > 0] for layers in (before, after)]
    top = max((x.macs for layers in shown for x in layers), default=1.0)
    parts: list[Markup] = []
    for index, (title, layers) in enumerate(zip(("before", "after"), shown, strict=True)):
        floor = _TOP + 12 + each + index * (each + 36)
        y = axis([top], floor, floor - each, zero=True)
        for tick in y.ticks:
            parts.append(_line(_LEFT, y.at(tick), _WIDTH - _RIGHT, y.at(tick), "grid"))
            parts.append(_text(_LEFT - 8, y.at(tick) + 4, si(tick), "end"))
        total = si(sum(x.macs for x in layers), "MACs")
        title = f"{title}: {len(layers)} layers, {total}"
        parts.append(_text(_LEFT, floor - each - 6, title, "start", "title"))
        parts += _bars(layers, y)
    return _svg(height, "MACs of every layer before and after", parts)


def legend(layers: Sequence[Layer]) -> Markup:
    """The colours that `columns` uses for these layers."""
    used = {precision(x.dtype) for x in layers}
    names = [*_PRECISIONS, ("other", "other")]
    return tag(
        "p",
        *(
            tag("span", tag("i", class_=f"key {kind}"), name)
            for kind, name in names
            if kind in used
        ),
        class_="legend",
    )


def precision(dtype: str) -> str:
    """The colour class of a numpy dtype name."""
    return next((k for k, _ in _PRECISIONS if dtype.removeprefix("u").startswith(k)), "other")


def meter(share: float, holds: bool) -> Markup:
    """How much of a limit is used, as a small bar with a mark at the limit."""
    used = min(max(share, 0.0), 1.2) / 1.2
    return tag(
        "svg",
        tag("rect", x=0, y=0, width=100, height=8, rx=4, class_="track"),
        tag("rect", x=0, y=0, width=100 * used, height=8, rx=4, class_="good" if holds else "bad"),
        tag("rect", x=100 / 1.2 - 0.75, y=-2, width=1.5, height=12, class_="mark"),
        viewBox="0 -2 100 12",
        class_="meter",
        aria_hidden="true",
    )


def split(counts: Sequence[tuple[str, int]]) -> Markup:
    """Parts of a whole as one bar; the first part is the good one."""
    total = sum(n for _, n in counts) or 1
    parts: list[Markup] = []
    start = 0.0
    for index, (name, count) in enumerate(counts):
        width = _WIDTH * count / total
        kind = "good" if index == 0 else "bad"
        title = tag("title", f"{name}: {count}")
        parts.append(tag("rect", title, x=start, y=0, width=width, height=14, class_=kind))
        start += width
    return tag("svg", *parts, viewBox=f"0 0 {_WIDTH:g} 14", class_="plot", role="img")


def _svg(height: float, label: str, parts: Sequence[Markup]) -> Markup:
    box = f"0 0 {_WIDTH:g} {height:g}"
    return tag("svg", *parts, viewBox=box, class_="plot", role="img", aria_label=label)


def _grid(x: Axis, y: Axis, metric: str) -> list[Markup]:
    parts: list[Markup] = []
    for tick in y.ticks:
        parts.append(_line(x.start, y.at(tick), x.end, y.at(tick), "grid"))
        parts.append(_text(x.start - 8, y.at(tick) + 4, f"{tick:.4g}", "end"))
    for tick in x.ticks:
        parts.append(_line(x.at(tick), y.start, x.at(tick), y.start + 5, "axis"))
        parts.append(_text(x.at(tick), y.start + 19, si(tick), "middle"))
    parts.append(_line(x.start, y.start, x.end, y.start, "axis"))
    parts.append(_text(x.end, y.start + 38, "MACs of one input", "end", "title"))
    parts.append(_text(x.start, y.end - 6, f"{metric} on calibration data", "start", "title"))
    return parts


def _limit(x: Axis, y: Axis, bound: float) -> Markup:
    at = x.at(bound)
    side = "end" if at > (x.start + x.end) / 2 else "start"
    return joined(
        tag("rect", x=at, y=y.end, width=x.end - at, height=y.start - y.end, class_="forbidden"),
        _line(at, y.end, at, y.start, "limit"),
        _text(at + (-6 if side == "end" else 6), y.end + 12, f"limit {si(bound)}", side, "limit"),
    )


def _point(c: Candidate, x: Axis, y: Axis, metric: str) -> Markup:
    if c.quality is None:  # looked at for its cost only: a mark on the axis
        title = tag("title", f"{c.label}: {si(c.macs, 'MACs')}, {metric} not probed")
        where = {"cx": x.at(c.macs), "cy": y.start}
        return tag("circle", title, r=3, class_="unknown", **where)
    title = tag("title", f"{c.label}: {si(c.macs, 'MACs')}, {metric} {c.quality:.4f}")
    return tag(
        "circle",
        title,
        cx=x.at(c.macs),
        cy=y.at(c.quality),
        r=7 if c.chosen else 4.5,
        class_="chosen" if c.chosen else "point",
    )


def _labels(known: Sequence[Candidate], x: Axis, y: Axis) -> list[Markup]:
    """Names beside the points, as far as they do not cover each other; the chosen one first."""
    taken = [(x.at(c.macs) - 6, x.at(c.macs) + 6, y.at(_quality(c))) for c in known]
    parts: list[Markup] = []
    for c in sorted(known, key=lambda c: (not c.chosen, -_quality(c))):
        at, row, wide = x.at(c.macs), y.at(_quality(c)) + 4, _LETTER * len(c.label)
        for left, anchor in ((at + 11, "start"), (at - 11 - wide, "end")):
            inside = x.start <= left and left + wide <= x.end
            others = [t for t in taken if t != (at - 6, at + 6, row - 4)]
            clear = all(
                left > b or left + wide < a or abs(row - 4 - line) > 12 for a, b, line in others
            )
            if inside and clear:
                taken.append((left, left + wide, row - 4))
                edge = left if anchor == "start" else left + wide
                kind = "name strong" if c.chosen else "name"
                parts.append(_text(edge, row, c.label, anchor, kind))
                break
    return parts


def _front(known: Sequence[Candidate]) -> list[Candidate]:
    """Candidates that no other one beats in both quality and MACs, cheapest first."""
    front: list[Candidate] = []
    for c in sorted(known, key=lambda c: (c.macs, -_quality(c))):
        if not front or _quality(c) > _quality(front[-1]):
            front.append(c)
    return front


def _bars(layers: Sequence[Layer], y: Axis) -> list[Markup]:
    slot = (_WIDTH - _RIGHT - _LEFT) / max(len(layers), 1)
    gap = min(2.0, slot * 0.2)
    bars = []
    for index, layer in enumerate(layers):
        words = f"{layer.name} ({layer.op}, {layer.dtype}): {si(layer.macs, 'MACs')}"
        bars.append(
            tag(
                "rect",
                tag("title", words),
                x=_LEFT + index * slot,
                y=y.at(layer.macs),
                width=min(slot - gap, 40.0),
                height=max(y.start - y.at(layer.macs), 0.5),
                class_=precision(layer.dtype),
            )
        )
    bars.append(_line(_LEFT, y.start, _WIDTH - _RIGHT, y.start, "axis"))
    return bars


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=kind)


def _text(x: float, y: float, text: str, anchor: str, kind: str | None = None) -> Markup:
    return tag("text", text, x=x, y=y, text_anchor=anchor, class_=kind)


def _quality(c: Candidate) -> float:
    assert c.quality is not None
    return c.quality
