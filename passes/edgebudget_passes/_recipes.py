"""Turn statistics and an assignment into a quantized model, one recipe at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from edgebudget import ranges
from edgebudget.qdq import LEVELS, Plan, emit
from edgebudget.quant_graph import MOVE_OPS, Graph
from edgebudget_passes import _weights

if TYPE_CHECKING:
    import onnx

    from edgebudget.ranges import Range, Stats
    from edgebudget.workload import Array
    from edgebudget_passes._assign import Assignment

RANGES = ("minmax", "99.999", "99.99", "99.9", "mse")
_LEAST_RANGE = 1e-4  # QNN wants no smaller range (ONNX Runtime's recipe has the same floor)
# What an operator can give at most: no room is needed beyond.
_BOUNDS = {
    "Sigmoid": (0.0, 1.0),
    "HardSigmoid": (0.0, 1.0),
    "Softmax": (0.0, 1.0),
    "Tanh": (-1.0, 1.0),
}
_MARGIN = 1.25  # of "wide": room for what calibration samples did not show


@dataclass(slots=True)
class Bench:
    """Statistics of one graph, with every range and weight step computed once."""

    graph: Graph
    stats: Mapping[str, Stats]
    per_channel: bool
    family: str  # of the target
    _ranges: dict[tuple[str, str], Range] = field(default_factory=dict)
    _scales: dict[tuple[str, bool], Array] = field(default_factory=dict)

    def range_of(self, value: str, recipe: str) -> Range:
        """The range of one value under one of `RANGES`."""
        key = (value, recipe)
        if key not in self._ranges:
            # Pictures fill their range, and with all of it 8-bit pixels pass without rounding.
            known = value in self.graph.inputs
            stats = self.stats[value]
            pooled = stats.room > 0.0
            low, high = _range(stats, "minmax" if known or pooled else recipe)
            room = 0.0 if known else stats.room * (high - low)
            maker = self.graph.producer.get(value)
            least, most = _BOUNDS.get(maker.op_type if maker else "", (-math.inf, math.inf))
            # What is never negative (after ReLU) stays so.
            low = max(low - room, least) if low < 0.0 else low
            self._ranges[key] = (low, min(high + room, most))
        return self._ranges[key]

    def plan(self, assignment: Assignment, recipe: Recipe) -> Plan:
        """Everything `emit` needs."""
        scales = {}
        for node in self.graph.nodes:
            if node.name in assignment.dtypes and self.graph.has_weight(node):
                scales[node.name] = self._scale(node, recipe.clip_weights)
        return Plan(
            assignment.dtypes,
            {v: self.range_of(v, recipe.ranges) for v in self.stats},
            scales,
            recipe.bias_shift,
            assignment.open,
            0.0 if self.family == "cpu" else _LEAST_RANGE,
            assignment.narrowed,
        )

    def build(self, assignment: Assignment, recipe: Recipe) -> onnx.ModelProto:
        """The quantized model."""
        return emit(self.graph, self.plan(assignment, recipe))

    def _scale(self, node: onnx.NodeProto, clip: bool) -> Array:
        key = (node.name, clip)
        if key not in self._scales:
            one_each = self.per_channel and _may_have_channels(self.graph, node, self.family)
            self._scales[key] = _weights.scales(self.graph, node, per_channel=one_each, clip=clip)
        return self._scales[key]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How ranges and weight steps are chosen, and what is added to biases."""

    ranges: str = "minmax"
    clip_weights: bool = False
    bias_shift: Mapping[str, Array] = field(default_factory=dict)


def watched(graph: Graph, assignment: Assignment) -> list[str]:
    """Values whose range an integer node may need."""
    found: dict[str, None] = {}
    for node in graph.nodes:
        if node.name not in assignment.dtypes:
            continue
        for _, name in graph.data_inputs(node):
            if name not in graph.weights:
                found[name] = None
        if node.op_type not in MOVE_OPS:
            for out in (graph.result(node), *node.output[1:]):
                if out and graph.is_float(out):
                    found[out] = None
    merged = {clamp.input[0] for clamp in graph.clamps.values()}
    return [f for f in found if f not in merged]


def _range(stats: Stats, recipe: str) -> Range:
    if recipe == "minmax":
        return ranges.minmax(stats)
    if recipe == "wide":
        low, high = ranges.minmax(stats)
        return low * _MARGIN, high * _MARGIN
    if recipe == "mse":
        return ranges.least_squares(stats, LEVELS["uint8"])
    return ranges.percentile(stats, float(recipe))


def _may_have_channels(graph: Graph, node: onnx.NodeProto, family: str) -> bool:
    """Whether the engine takes one step for each output channel of this node."""
    weight = graph.weights[node.input[1]]
    if node.op_type == "ConvTranspose":
        return graph.channels(node) == int(weight.shape[1])  # one group
    if node.op_type == "Conv":
        return True
    return family == "cpu" and weight.ndim == 2  # QNN takes one step per matrix
