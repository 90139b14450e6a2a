"""Recognise a spelled-out activation by what it computes, not by how it is written.

Exporters write hard-swish, GELU and friends as five or more element-wise nodes in many orders.
A group of element-wise nodes with one source and scalar constants is a function of one number:
it is evaluated on a grid and compared with the functions that have an operator of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import erf, sqrt
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from edgebudget import graph
from edgebudget.workload import Array
from edgebudget_passes._graph_edits import constant, shape
from edgebudget_runtime.errors import EdgeBudgetError

_ELEMENTWISE = frozenset(
    "Abs Add Clip Div Elu Erf Exp Gelu HardSigmoid HardSwish Identity Log Max Min Mul Neg Pow "
    "Greater Less Reciprocal Relu Sigmoid Softplus Sqrt Sub Tanh Where".split()
)
_BOUNDS = frozenset({"Clip", "Max"})  # alone, they may be a Relu
_MOST_NODES = 12
# Fine around zero, wide enough to tell clipped functions from others.
_GRID = np.concatenate([np.linspace(-8, 8, 3201), [-50, -20, -12, 12, 20, 50]]).astype(np.float32)
_AGREE = 2e-6  # of the larger of 1 and the value: float32 rounding over a few nodes


@dataclass(frozen=True, slots=True)
class Form:
    """A function that has an operator of its own."""

    op: str
    function: Callable[[Array], Array]
    since: int  # operator set
    attributes: dict[str, Any] = field(default_factory=dict)


def _sigmoid(x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-x)))


_ERF = np.vectorize(erf, otypes=[np.float64])
FORMS = (
    Form("Relu", lambda x: np.maximum(x, 0), 1),
    Form("HardSwish", lambda x: x * np.clip(x / 6 + 0.5, 0, 1), 14),
    Form(
        "HardSigmoid",
        lambda x: np.clip(x / 6 + 0.5, 0, 1),
        1,
        {"alpha": 1 / 6, "beta": 0.5},
    ),
    Form("Gelu", lambda x: 0.5 * x * (1 + _ERF(x / sqrt(2))), 20),
    Form(
        "Gelu",
        lambda x: 0.5 * x * (1 + np.tanh(sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
        20,
        {"approximate": "tanh"},
    ),
    Form("Sigmoid", _sigmoid, 1),
    Form("Tanh", np.tanh, 1),
    Form("Softplus", lambda x: np.logaddexp(0, x), 1),
    Form("Mish", lambda x: x * np.tanh(np.logaddexp(0, x)), 18),
)


def recognise(root: ir.Node) -> tuple[Form, ir.Value, int] | None:
    """The form that `root` ends, its source and how many nodes it replaces; the largest group."""
    found = None
    for region, source in _regions(root):
        if len(region) == 1 and root.op_type not in _BOUNDS:
            continue
        values = _evaluate(region, source, root)
        form = None if values is None else _match(values)
        if form is not None:
            found = form, source, len(region)
    return found


def _regions(root: ir.Node) -> Iterator[tuple[list[ir.Node], ir.Value]]:
    """Growing groups of element-wise nodes that end in `root` and have a single source."""
    region: list[ir.Node] = [root]
    while root.op_type in _ELEMENTWISE and len(region) <= _MOST_NODES:
        sources = _sources(region)
        if sources is None or not sources:
            return
        if len(sources) == 1:
            yield list(region), sources[0]
        # The source that is computed last from the others is the next to be taken in.
        grown = [p for v in sources if (p := _joins(v, region)) is not None]
        if not grown:
            return
        body = root.graph
        assert body is not None
        order = {n: i for i, n in enumerate(body)}
        region.append(max(grown, key=lambda n: order[n]))


def _joins(value: ir.Value, region: list[ir.Node]) -> ir.Node | None:
    """The element-wise node behind a source, when nothing outside the region reads it."""
    node = value.producer()
    if node is None or node.op_type not in _ELEMENTWISE or node.domain or value.is_graph_output():
        return None
    return node if all(use.node in region for use in value.uses()) else None


def _sources(region: list[ir.Node]) -> list[ir.Value] | None:
    """Values that enter the region; None when a constant in it is not a scalar."""
    found: dict[ir.Value, None] = {}
    for node in region:
        for value in node.inputs:
            if value is None or value.producer() in region:
                continue
            held = constant(value)
            if held is None:
                found[value] = None
            elif held.size != 1:
                return None
    return list(found)


def _evaluate(region: list[ir.Node], source: ir.Value, root: ir.Node) -> Array | None:
    """The region's values on the grid, computed by the engine."""
    result, body = root.outputs[0], root.graph
    if body is None or shape(source) is None or shape(source) != shape(result):
        return None
    constants = {}
    for node in region:
        for value in node.inputs:
            held = constant(value)
            if value is not None and held is not None:
                constants[value.name] = numpy_helper.from_array(held.reshape(()), value.name)
    small = helper.make_graph(
        [ir.to_proto(n) for n in sorted(region, key=lambda n: _depth(n, region))],
        "function",
        [helper.make_tensor_value_info(str(source.name), TensorProto.FLOAT, _GRID.shape)],
        [helper.make_tensor_value_info(str(result.name), TensorProto.FLOAT, None)],
        list(constants.values()),
    )
    opset = [helper.make_opsetid("", body.opset_imports.get("", graph.OPSET))]
    model = helper.make_model(small, opset_imports=opset, ir_version=8)
    try:
        return graph.run(model, {str(source.name): _GRID}, optimize=False)[str(result.name)]
    except EdgeBudgetError:  # not float: no function of one real number
        return None


def _depth(node: ir.Node, region: list[ir.Node]) -> int:
    makers = [v.producer() for v in node.inputs if v is not None]
    return 1 + max((_depth(m, region) for m in makers if m in region), default=0)


def _match(values: Array) -> Form | None:
    if values.shape != _GRID.shape:
        return None
    for form in FORMS:
        with np.errstate(over="ignore"):
            expected = form.function(_GRID.astype(np.float64))
        if np.all(np.abs(values - expected) <= _AGREE * np.maximum(1, np.abs(expected))):
            return form
    return None
