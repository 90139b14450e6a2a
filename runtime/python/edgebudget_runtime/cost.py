"""What one inference costs, and how we know."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Evidence = Literal["measured", "simulated", "modelled", "unknown"]
Resource = Literal[
    "macs", "params", "size_bytes", "memory_bytes", "latency_ms", "energy_mj", "fallback_nodes"
]
RESOURCES: tuple[Resource, ...] = (
    "macs",
    "params",
    "size_bytes",
    "memory_bytes",
    "latency_ms",
    "energy_mj",
    "fallback_nodes",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One number and its evidence. `value` is None exactly when the evidence is unknown."""

    value: float | None
    evidence: Evidence
    how: str = ""  # "counted on segments/main.onnx", "median of 50 interleaved runs", ...
    device: str = ""
    count: int = 0  # number of observations behind the value; 0 for exact counts
    spread: float | None = None  # half of the interquartile range, in the value's unit

    def __post_init__(self) -> None:
        if (self.value is None) != (self.evidence == "unknown"):
            raise ValueError("a figure is unknown exactly when it has no value")


UNKNOWN = Figure(value=None, evidence="unknown")


def counted(value: float, how: str) -> Figure:
    """An exact count on a file or graph."""
    return Figure(value=float(value), evidence="measured", how=how)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What one inference costs at the stated input shape. Units are in the names."""

    macs: Figure = UNKNOWN  # multiply-accumulates
    params: Figure = UNKNOWN
    size_bytes: Figure = UNKNOWN
    memory_bytes: Figure = UNKNOWN  # weights resident + planned activations
    latency_ms: Figure = UNKNOWN
    energy_mj: Figure = UNKNOWN
    fallback_nodes: Figure = UNKNOWN

    def items(self) -> Iterator[tuple[Resource, Figure]]:
        """Every resource and its figure, in the fixed order of `RESOURCES`."""
        for name in RESOURCES:
            yield name, self.get(name)

    def get(self, resource: Resource) -> Figure:
        """The figure of one resource."""
        figure: Figure = getattr(self, resource)
        return figure
