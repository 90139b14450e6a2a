"""Steps of integer weights: symmetric int8, one step per output channel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgebudget.qdq import along

if TYPE_CHECKING:
    import onnx

    from edgebudget.quant_graph import Graph
    from edgebudget.workload import Array

_LEVELS = 127.0
_SHRINKS = np.linspace(0.98, 0.6, 20)


def scales(graph: Graph, node: onnx.NodeProto, *, per_channel: bool, clip: bool) -> Array:
    """Weight step of one node; `clip` takes the range of least squared error, not the largest.

    A channel of zeros gets the largest step of the others (any step is exact).
    """
    value = graph.weights[node.input[1]]
    axis = graph.channel_axis(node)
    if not per_channel:
        axis, others = 0, tuple(range(value.ndim))
    else:
        others = tuple(i for i in range(value.ndim) if i != axis)
    peak = np.abs(value).max(axis=others).astype(np.float64)
    step = peak / _LEVELS
    if clip:
        step = _least_squares(value, step, axis, others)
    least = float(np.finfo(np.float32).tiny)
    whole = float(step.max()) if step.max() > least else 1.0 / _LEVELS
    return np.where(step > least, step, whole).astype(np.float32)


def _least_squares(value: Array, step: Array, axis: int, others: tuple[int, ...]) -> Array:
    best, least = step, _error(value, step, axis, others)
    for shrink in _SHRINKS:
        tried = step * shrink
        error = _error(value, tried, axis, others)
        best = np.where(error < least, tried, best)
        least = np.minimum(error, least)
    return best


def _error(value: Array, step: Array, axis: int, others: tuple[int, ...]) -> Array:
    shaped = along(np.asarray(np.maximum(step, 1e-38), np.float32), axis, value.ndim)
    whole = np.clip(np.rint(value / shaped), -_LEVELS, _LEVELS)
    error: Array = np.square(value - whole * shaped).sum(axis=others)
    return error
