"""A plan: which passes run, in which order, with which settings, and why.

A plan is a value: it can be printed, written to TOML, edited by hand and replayed.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgebudget import registry
from edgebudget_runtime.errors import UsageError

FORMAT = 1
_STAGES = ("module", "graph")


@dataclass(frozen=True, slots=True)
class Step:
    """One pass with its configuration, and the planner's reason for it."""

    name: str
    config: Any
    why: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """Ordered steps; module-stage steps come before graph-stage ones."""

    steps: tuple[Step, ...]
    reasons: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)  # model, target, budget, seed

    def as_dict(self) -> dict[str, Any]:
        """Plain data for TOML and JSON."""
        steps = [
            {"pass": s.name, "why": s.why, "config": config_to_dict(s.config)} for s in self.steps
        ]
        return {
            "format": FORMAT,
            "settings": dict(self.settings),
            "reasons": list(self.reasons),
            "step": steps,
        }

    def to_toml(self) -> str:
        """The plan as an editable file."""
        import tomli_w

        return tomli_w.dumps(self.as_dict())


def load_plan(path: Path) -> Plan:
    """Read a plan from TOML.

    Raises:
        UsageError: EB105 not readable or not TOML, EB106 wrong structure, EB102 unknown pass,
            EB104 unknown or wrongly typed setting (with its place, such as step[2].bits).
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as e:
        raise UsageError(
            "EB105", f"plan {path}: {e}", hint="write one with `edgebudget plan MODEL --out FILE`"
        ) from e
    return plan_from_dict(raw, str(path))


def plan_from_dict(raw: Mapping[str, Any], where: str) -> Plan:
    """Build a plan from plain data; see `load_plan` for what is raised."""
    steps = raw.get("step")
    if raw.get("format") != FORMAT or not isinstance(steps, list):
        raise UsageError(
            "EB106",
            f"{where}: not a plan (format {raw.get('format')!r}, this version reads {FORMAT})",
            hint="a plan has `format = 1` and [[step]] tables, each with `pass`",
        )
    built: list[Step] = []
    for i, item in enumerate(steps):
        place = f"step[{i}]"
        if not isinstance(item, dict) or not isinstance(item.get("pass"), str):
            raise UsageError("EB106", f"{where}: {place} names no pass", hint='add `pass = "..."`')
        p = registry.get(item["pass"])
        config = config_from_dict(p.config, item.get("config", {}), f"{where}: {place}")
        built.append(Step(p.name, config, str(item.get("why", ""))))
    order = [_STAGES.index(registry.get(s.name).stage) for s in built]
    if order != sorted(order):
        late = next(i for i in range(1, len(order)) if order[i] < order[i - 1])
        raise UsageError(
            "EB106",
            f"{where}: step[{late}] {built[late].name!r} works on the module, "
            f"but step[{late - 1}] {built[late - 1].name!r} already works on the graph",
            hint="put module-stage steps first (`edgebudget passes` shows stages)",
        )
    reasons = tuple(str(r) for r in raw.get("reasons", ()))
    return Plan(tuple(built), reasons, dict(raw.get("settings", {})))


def config_to_dict(config: Any) -> dict[str, Any]:
    """A pass's settings as plain data, without the unset ones (TOML has no null)."""
    found = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in found.items() if v is not None}


def config_from_dict(kind: type, raw: Mapping[str, Any], place: str) -> Any:
    """Check plain data against a pass's config class.

    Raises:
        UsageError: EB104, an unknown setting or a value of the wrong type.
    """
    hints = typing.get_type_hints(kind)
    known = {f.name for f in dataclasses.fields(kind)}
    values: dict[str, Any] = {}
    for key, value in raw.items():
        if key not in known:
            close = difflib.get_close_matches(key, sorted(known), n=1)
            raise UsageError(
                "EB104",
                f"{place}.{key}: no such setting",
                hint=f"did you mean {close[0]!r}?" if close else f"known: {sorted(known)}",
            )
        values[key] = _coerce(value, hints[key], f"{place}.{key}")
    try:
        return kind(**values)
    except (TypeError, ValueError) as e:
        raise UsageError("EB104", f"{place}: {e}", hint="see `edgebudget passes`") from e


def _coerce(value: Any, hint: Any, place: str) -> Any:
    origin = typing.get_origin(hint)
    if origin is tuple and isinstance(value, list):
        inner = typing.get_args(hint)[0]
        return tuple(_coerce(v, inner, f"{place}[{i}]") for i, v in enumerate(value))
    if origin is typing.Literal:
        allowed = typing.get_args(hint)
        if value in allowed:
            return value
        raise UsageError("EB104", f"{place} = {value!r}", hint=f"one of {list(allowed)}")
    if origin in (typing.Union, types.UnionType):
        kinds = [a for a in typing.get_args(hint) if a is not type(None)]
        return _coerce(value, kinds[0], place)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and isinstance(value, hint):
        if hint is int and isinstance(value, bool):
            raise UsageError("EB104", f"{place} = {value!r}", hint="an int is wanted")
        return value
    wanted = getattr(hint, "__name__", str(hint))
    raise UsageError("EB104", f"{place} = {value!r}", hint=f"a value of type {wanted} is wanted")
