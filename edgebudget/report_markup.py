"""Markup that cannot forget to escape, and figures written for people."""

from __future__ import annotations

import html

from edgebudget_runtime.cost import Figure, Resource

_VOID = {"meta", "br"}
_SI = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
NAMES: dict[Resource, str] = {
    "macs": "MACs",
    "params": "Parameters",
    "size_bytes": "Size",
    "memory_bytes": "Peak memory",
    "latency_ms": "Latency",
    "energy_mj": "Energy",
    "fallback_nodes": "Fallback nodes",
}
_METRICS = {
    "top1": "Top-1 accuracy",
    "top5": "Top-5 accuracy",
    "nll": "Negative log-likelihood",
    "srcc": "SRCC",
    "krcc": "KRCC",
    "plcc": "PLCC",
    "plcc_logistic": "PLCC after a logistic fit",
    "mae": "Mean absolute error",
    "rmse": "Root mean square error",
}
_UNITS: dict[Resource, str] = {
    "macs": "MACs",
    "params": "",
    "size_bytes": "B",
    "memory_bytes": "B",
    "latency_ms": "ms",
    "energy_mj": "mJ",
    "fallback_nodes": "",
}


class Markup(str):
    """Text that is already escaped."""

    __slots__ = ()


def escaped(text: str) -> Markup:
    """Text made safe; characters that cannot be shown or stored are replaced."""
    kept = "".join(c if c.isprintable() else " " if c.isspace() else "\ufffd" for c in text)
    return Markup(html.escape(kept, quote=True))


def joined(*children: str) -> Markup:
    """Children one after another; whatever is not markup yet is escaped."""
    return Markup("".join(c if isinstance(c, Markup) else escaped(c) for c in children))


def tag(name: str, /, *children: str, **attributes: str | float | None) -> Markup:
    """An element. `class_` is class, `text_anchor` is text-anchor; None leaves one out."""
    shown = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escaped(_attribute(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID:
        return Markup(f"<{name}{shown}>")
    return Markup(f"<{name}{shown}>{joined(*children)}</{name}>")


def _attribute(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.6g}"


def si(value: float, unit: str = "", digits: int = 4) -> str:
    """1234567 as "1.235 M"; decimal prefixes."""
    for scale, prefix in _SI:
        if abs(value) >= scale:
            return f"{value / scale:.{digits}g} {prefix}{unit}"
    return f"{value:.{digits}g} {unit}".rstrip()


def amount(resource: Resource, value: float | None) -> str:
    """A value of one resource with its unit; bytes are decimal (MB = 10^6)."""
    if value is None:
        return "unknown"
    unit = _UNITS[resource]
    text = f"{value:.4g} {unit}" if unit in ("ms", "mJ") else si(value, unit)
    return text.replace("kB", "KB").rstrip()


def metric(name: str) -> str:
    """What a manager calls a metric."""
    return _METRICS.get(name, name)


def ratio(before: float | None, after: float | None) -> str:
    """How much smaller or larger, in percent."""
    if before is None or after is None or before == 0:
        return "" if before != after else "same"
    change = 100 * (after / before - 1)
    if abs(change) < 0.05:
        return "same"
    return f"{'+' if change > 0 else '−'}{abs(change):.1f}\u00a0%"  # noqa: RUF001 - a real minus


def details(figure: Figure, resource: Resource) -> str:
    """Where a figure comes from, in one line."""
    parts = [figure.how, figure.device]
    if figure.count:
        parts.append(f"{figure.count} observation" + ("s" if figure.count > 1 else ""))
    if figure.spread is not None:
        parts.append(f"± {amount(resource, figure.spread)} (half the interquartile range)")
    return " · ".join(p for p in parts if p)
