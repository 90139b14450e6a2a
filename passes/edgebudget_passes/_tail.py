"""The last few operators, which cost next to nothing and decide every digit of the answer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgebudget.quant_graph import Graph

_POOLS = frozenset({"GlobalAveragePool", "ReduceMean"})
_SHARE = 0.01  # of all multiply-accumulates, at and after a node of the tail
_LARGEST = 1 << 16  # elements that a node of the tail may give


def after_pooling(graph: Graph) -> frozenset[str]:
    """Global averages near the end, and everything between them and the outputs.

    Averaged, an engine's own way of rounding a feature map all but vanishes, but an 8-bit average
    turns what is left into whole steps, which the last layer then enlarges.
    """
    total = sum(graph.macs(n) for n in graph.nodes)
    later: dict[str, int] = {}  # node -> bits of the multiplying nodes at and after it
    macs: list[int] = []
    for node in reversed(graph.nodes):
        found = 0
        for output in (*node.output, graph.result(node)):
            for reader in graph.readers[output]:
                found |= later.get(reader.name, 0)
        if cost := graph.macs(node):
            found |= 1 << len(macs)
            macs.append(cost)
        later[node.name] = found
    chosen: set[str] = set()
    made: set[str] = set()
    for node in graph.nodes:
        cost = sum(m for i, m in enumerate(macs) if later[node.name] >> i & 1)
        sizes = [graph.shape(o) for o in node.output]
        small = all(s is not None and math.prod(s) <= _LARGEST for s in sizes)
        starts = node.op_type in _POOLS or any(n in made for _, n in graph.data_inputs(node))
        if starts and small and cost <= _SHARE * total:
            chosen.add(node.name)
            made.update((*node.output, graph.result(node)))
    return frozenset(chosen)
