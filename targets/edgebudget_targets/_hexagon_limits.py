"""What each Hexagon generation cannot compile, and what to change; data from `hexagon.toml`."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebudget_runtime.errors import UnsupportedError, UsageError

if TYPE_CHECKING:
    import onnx

    from edgebudget.target import TargetSpec

_FILE = Path(__file__).with_name("hexagon.toml")


@dataclass(frozen=True, slots=True)
class Generation:
    """The limits of one generation. Operators in `refuses` make the vendor's compiler fail."""

    opset: tuple[int, int]
    refuses: frozenset[str]
    refuses_uint16: frozenset[str]
    on_cpu: frozenset[str]
    on_cpu_uint16: frozenset[str]


@cache
def _table() -> Mapping[str, Any]:
    return tomllib.loads(_FILE.read_text(encoding="utf-8"))


@cache
def generation(arch: str) -> Generation:
    """The limits of Hexagon v`arch`: those of all, and its own."""
    shared = _table()["generations"]
    own = shared.get(f"v{arch}", {})
    low, high = own.get("opset", shared["opset"])
    names = ("refuses", "refuses_uint16", "on_cpu", "on_cpu_uint16")
    sets = {k: frozenset(shared.get(k, ())) | frozenset(own.get(k, ())) for k in names}
    return Generation((low, high), **sets)


def knobs() -> Mapping[str, tuple[int, ...]]:
    """Options of the vendor's compiler that are worth searching, and their values."""
    return {k: tuple(v) for k, v in _table()["knobs"].items()}


def checked_knobs(chosen: Mapping[str, int]) -> dict[str, str]:
    """Settings as the engine takes them; it would ignore a wrong one in silence.

    Raises:
        UsageError: EB145, there is no such setting or value.
    """
    for name, value in chosen.items():
        allowed = knobs().get(name)
        if allowed is None or value not in allowed:
            values = "no such setting" if allowed is None else f"one of {_listed(allowed)}"
            raise UsageError(
                "EB145",
                f"{name}={value} is not a setting of the Hexagon compiler ({values})",
                hint=f"its settings are {', '.join(knobs())}",
            )
    return {k: str(v) for k, v in chosen.items()}


def check(model: onnx.ModelProto, spec: TargetSpec) -> None:
    """Refuse what the compiler for this SoC is known to fail on, before it is asked.

    Raises:
        UnsupportedError: EB248, an operator or the operator set, with what to change.
    """
    limits = generation(spec.options["arch"])
    found = max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0)
    low, high = limits.opset
    if not low <= found <= high:
        raise UnsupportedError(
            "EB248",
            f"operator set {found} is not one that {spec.device} is known to take ({low} to "
            f"{high})",
            hint=f"export the model with operator set {high if found > high else max(low, 20)}",
        )
    for name, op in culprits(model, spec):
        raise UnsupportedError(
            "EB248",
            f"the compiler for {spec.device} fails on operator {op} (node {name!r})",
            hint=instead(op),
        )


def culprits(model: onnx.ModelProto, spec: TargetSpec) -> list[tuple[str, str]]:
    """(name, operator) of every node that this SoC's compiler is known to fail on."""
    import onnx

    limits = generation(spec.options["arch"])
    refused = limits.refuses
    if any(w.data_type == onnx.TensorProto.UINT16 for w in model.graph.initializer):
        refused |= limits.refuses_uint16
    return [
        (n.name or f"#{i}", n.op_type)
        for i, n in enumerate(model.graph.node)
        if n.op_type in refused
    ]


def instead(op: str) -> str:
    """What to use instead of an operator."""
    found = str(_table()["instead"].get(op, ""))
    return found or f"choose a newer SoC, or replace {op} in the model"


def _listed(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, values))
