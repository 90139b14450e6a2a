"""How good answers are, on which data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Quality:
    """The task's metric on the evaluation data, with a 95 % interval; higher is better."""

    metric: str
    value: float
    low: float
    high: float
    count: int
    others: Mapping[str, float] = field(default_factory=dict)
    how: str = ""  # "evaluated on segments/main.onnx, onnxruntime-cpu"
