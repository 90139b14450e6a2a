"""Budgets: limits with units, and what breaks them."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from edgebudget_runtime.cost import Cost, Resource
from edgebudget_runtime.errors import UsageError

Statistic = Literal["max", "mean", "p50", "p90", "p95", "p99"]

_COUNT = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_BYTES = {
    "B": 1.0,
    "KB": 1e3,
    "MB": 1e6,
    "GB": 1e9,
    "KiB": 2.0**10,
    "MiB": 2.0**20,
    "GiB": 2.0**30,
}
_MS = {"us": 1e-3, "ms": 1.0, "s": 1e3}
_MJ = {"uJ": 1e-3, "mJ": 1.0, "J": 1e3}
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}
_FRACTION = {"": 1.0, "%": 0.01}

# option -> (resource, units, default statistic, an example for messages)
_OPTIONS: Mapping[str, tuple[Resource, Mapping[str, float], Statistic, str]] = {
    "macs": ("macs", _COUNT, "max", "50G"),
    "params": ("params", _COUNT, "max", "2M"),
    "size": ("size_bytes", _BYTES, "max", "4MB"),
    "memory": ("memory_bytes", _BYTES, "max", "64MiB"),
    "latency": ("latency_ms", _MS, "p50", "10ms@p99"),
    "energy": ("energy_mj", _MJ, "mean", "5mJ"),
}
_STATISTICS: Mapping[str, tuple[Statistic, ...]] = {
    "macs": ("max", "mean"),
    "latency": ("p50", "p90", "p95", "p99", "mean"),
    "energy": ("mean",),
}
_NUMBER = re.compile(r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z%]*)\s*")


@dataclass(frozen=True, slots=True)
class Limit:
    """One resource may not exceed `bound` (in the resource's own unit) at this statistic."""

    resource: Resource
    bound: float
    statistic: Statistic = "max"


@dataclass(frozen=True, slots=True)
class Violation:
    """One limit that a cost breaks, or cannot be shown to keep (`actual` None)."""

    limit: Limit
    actual: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """A set of limits that hold jointly, with the quality to keep and the time to spend."""

    limits: tuple[Limit, ...] = ()
    max_drop: float | None = None  # fraction of the original's quality that may be lost
    min_quality: float | None = None  # of the task's metric
    time_limit_s: float | None = None

    @staticmethod
    def parse(
        *,
        macs: str | float | None = None,
        params: str | float | None = None,
        size: str | float | None = None,
        memory: str | float | None = None,
        latency: str | float | None = None,
        energy: str | float | None = None,
        max_drop: str | float | None = None,
        min_quality: str | float | None = None,
        max_fallback: int | None = None,
        time_limit: str | float | None = None,
    ) -> Budget:
        """Build a budget from what a user types; bare numbers are in the base unit.

        Base units: MACs and parameters are counts, bytes, milliseconds, millijoules,
        seconds for `time_limit`, a fraction for `max_drop`.

        Raises:
            UsageError: EB110 a value cannot be read, EB111 a bound is not positive,
                EB112 the statistic does not exist for the resource.
        """
        given = {
            "macs": macs,
            "params": params,
            "size": size,
            "memory": memory,
            "latency": latency,
            "energy": energy,
        }
        limits = [_limit(k, v) for k, v in given.items() if v is not None]
        if max_fallback is not None:
            if max_fallback < 0:
                raise UsageError(
                    "EB111", f"--max-fallback {max_fallback} is negative", hint="use 0 or more"
                )
            limits.append(Limit("fallback_nodes", float(max_fallback)))
        drop = None if max_drop is None else _value("max-drop", max_drop, _FRACTION, "1%")
        if drop is not None and drop >= 1:
            raise UsageError(
                "EB111",
                f"--max-drop {max_drop} allows losing everything",
                hint="a drop is a percentage or a fraction below 1: 1% or 0.01",
            )
        quality = None
        if min_quality is not None:
            quality = _value("min-quality", min_quality, _FRACTION, "0.80")
        seconds = None
        if time_limit is not None:
            seconds = _value("time-limit", time_limit, _SECONDS, "20m")
        return Budget(
            limits=tuple(limits), max_drop=drop, min_quality=quality, time_limit_s=seconds
        )

    def limit(self, resource: Resource) -> float | None:
        """The tightest bound set on one resource, or None."""
        bounds = [x.bound for x in self.limits if x.resource == resource]
        return min(bounds) if bounds else None

    def violations(self, cost: Cost) -> tuple[Violation, ...]:
        """Limits that `cost` breaks; an unknown cost breaks every limit set on it."""
        found: list[Violation] = []
        for limit in self.limits:
            value = cost.get(limit.resource).value
            if value is None or math.isnan(value) or value > limit.bound:
                found.append(Violation(limit, value))
        return tuple(found)


def parse_count(text: str | float) -> float:
    """Read a count such as `50G` (decimal K, M, G, T)."""
    return _value("value", text, _COUNT, "50G")


def _limit(option: str, raw: str | float) -> Limit:
    resource, units, default, example = _OPTIONS[option]
    text, _, stat = str(raw).partition("@")
    bound = _value(option, text if isinstance(raw, str) else raw, units, example)
    allowed = _STATISTICS.get(option, (default,))
    if stat and stat not in allowed:
        raise UsageError(
            "EB112",
            f"--{option} {raw}: no statistic {stat!r}",
            hint=f"one of {', '.join(allowed)}",
        )
    chosen = next((s for s in allowed if s == stat), default)
    return Limit(resource, bound, chosen)


def _value(option: str, raw: str | float, units: Mapping[str, float], example: str) -> float:
    match = _NUMBER.fullmatch(str(raw))
    if match is None:
        raise UsageError(
            "EB110", f"--{option} {raw!r} is not a number with a unit", hint=f"write {example}"
        )
    number, unit = match.groups()
    if unit == "" and "" not in units:
        if not isinstance(raw, str):
            unit = next(u for u, scale in units.items() if scale == 1.0)
        else:
            raise UsageError(
                "EB110",
                f"--{option} {raw} has no unit",
                hint=f"one of {', '.join(units)}: {example}",
            )
    if unit not in units:
        close = difflib.get_close_matches(unit, [u for u in units if u], n=1, cutoff=0.3)
        same = [u for u in units if u and u.lower() == unit.lower()]
        best = same[0] if same else (close[0] if close else "")
        meant = f"did you mean {number}{best}? " if best else ""
        known = ", ".join(u for u in units if u)
        raise UsageError(
            "EB110",
            f"--{option} {raw}: unknown unit {unit!r}",
            hint=f"{meant}units are {known}",
        )
    value = float(number) * units[unit]
    if not value > 0 or not math.isfinite(value):
        raise UsageError("EB111", f"--{option} {raw} is not positive", hint=f"write {example}")
    return value
