"""One grid before and behind operators that engines take to have only one.

An operator that selects, moves or clips values gives the same numbers when its input is rounded to
the grid of its result beforehand: rounding keeps the order. XNNPACK cannot load a program that
joins integers of other grids; the compiler for Ethos-U answers wrongly. Imports onnx.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

import numpy as np
import onnx
from onnx import helper

from edgebudget import graph as graphs
from edgebudget.workload import Array


def even_grids(model: onnx.ModelProto, operators: Set[str]) -> None:
    """Round what the named operators read to the grid of their result, where that differs."""
    makers = {o: n for n in model.graph.node for o in n.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    stored = graphs.initializers(model)
    nodes = list(model.graph.node)
    del model.graph.node[:]
    for node in nodes:
        after = readers.get(node.output[0], []) if node.op_type in operators else []
        if len(after) == 1 and after[0].op_type == "QuantizeLinear":
            grid = list(after[0].input[1:])
            for i, name in enumerate(node.input):
                maker = makers.get(name)
                if maker is None or maker.op_type != "DequantizeLinear":
                    continue
                if not _same(stored, maker.input[1:], grid):
                    node.input[i] = _rounded(model, name, grid, f"{node.name}.{i}")
        model.graph.node.append(node)


def _rounded(model: onnx.ModelProto, value: str, grid: Sequence[str], name: str) -> str:
    """`value` on a grid (scale and zero point), as float again."""
    whole, result = f"{name}.q", f"{name}.even"
    model.graph.node.extend(
        [
            helper.make_node("QuantizeLinear", [value, *grid], [whole], name=whole),
            helper.make_node("DequantizeLinear", [whole, *grid], [result], name=result),
        ]
    )
    return result


def _same(stored: Mapping[str, Array], one: Sequence[str], other: Sequence[str]) -> bool:
    pairs = zip(one, other, strict=False)
    return len(one) == len(other) and all(
        a == b or np.array_equal(stored[a], stored[b]) for a, b in pairs
    )
