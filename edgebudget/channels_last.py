"""Hand tensors over with their channels last, for engines that compute integers that way.

ONNX Runtime's CPU engine turns integer convolutions to channels last and moves the transposes
that this takes through the graph until they meet and vanish. At a segment's edge there is nothing
to meet: a transpose would stay before every operator that reads what was handed over, block after
block. Transposes of our own at the edges are what they meet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from onnx import ModelProto, helper

from edgebudget.program import TensorSpec
from edgebudget.split_exits import Cut

_LAST, _FIRST = (0, 2, 3, 1), (0, 3, 1, 2)
_INTEGERS = frozenset({"uint8", "int8"})


def hand_over_channels_last(cuts: Sequence[Cut]) -> tuple[Cut, ...]:
    """The same chain, in which 8-bit pictures [N, C, H, W] cross as [N, H, W, C], names kept."""
    turned = {s.name for cut in cuts for s in cut.hidden if _is_picture(s)}
    return tuple(_turned(cut, turned) for cut in cuts)


def _is_picture(spec: TensorSpec) -> bool:
    return len(spec.shape) == 4 and spec.dtype in _INTEGERS


def _turned(cut: Cut, names: set[str]) -> Cut:
    read = [s for s in cut.inputs if s.name in names]
    made = [s for s in cut.hidden if s.name in names]
    if not read and not made:
        return cut
    model = ModelProto()
    model.CopyFrom(cut.model)
    graph = model.graph
    inner = {s.name: f"{s.name}.channels_first" for s in (*read, *made)}
    for node in graph.node:
        node.input[:] = [inner.get(i, i) for i in node.input]
        node.output[:] = [inner.get(o, o) for o in node.output]
    nodes = [
        helper.make_node("Transpose", [s.name], [inner[s.name]], f"{s.name}/first", perm=_FIRST)
        for s in read
    ]
    nodes += graph.node
    nodes += [
        helper.make_node("Transpose", [inner[s.name]], [s.name], f"{s.name}/last", perm=_LAST)
        for s in made
    ]
    del graph.node[:]
    graph.node.extend(nodes)
    for value in (*graph.input, *graph.output):
        if value.name in inner:
            sizes = [d.dim_value for d in value.type.tensor_type.shape.dim]
            for dimension, axis in zip(value.type.tensor_type.shape.dim, _LAST, strict=True):
                dimension.dim_value = sizes[axis]
    inputs, hidden = (
        tuple(_last(s) if s.name in names else s for s in specs)
        for specs in (cut.inputs, cut.hidden)
    )
    return Cut(model, inputs, hidden)


def _last(spec: TensorSpec) -> TensorSpec:
    return replace(spec, shape=tuple(spec.shape[a] for a in _LAST))
