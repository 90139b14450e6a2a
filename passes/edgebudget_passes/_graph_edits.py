"""Small edits on onnx_ir graphs that several graph passes share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir

if TYPE_CHECKING:
    from edgebudget.workload import Array

_RESHAPES = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Expand", "Tile"})


def constant(value: ir.Value | None) -> Array | None:
    """The array behind an initializer or a Constant node, or None."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else np.asarray(tensor.numpy())


def shape(value: ir.Value | None) -> tuple[int, ...] | None:
    """The static shape of a value, or None."""
    if value is None or value.shape is None:
        return None
    dims = tuple(d for d in value.shape if isinstance(d, int))
    return dims if len(dims) == len(value.shape) else None


def ints(node: ir.Node, name: str, default: Sequence[int] = ()) -> tuple[int, ...]:
    """An integer-list attribute."""
    found = node.attributes.get(name)
    return tuple(found.as_ints()) if found is not None else tuple(default)


def integer(node: ir.Node, name: str, default: int) -> int:
    """An integer attribute."""
    found = node.attributes.get(name)
    return int(found.as_int()) if found is not None else default


def text(node: ir.Node, name: str, default: str) -> str:
    """A string attribute."""
    found = node.attributes.get(name)
    return str(found.as_string()) if found is not None else default


def add_initializer(body: ir.Graph, name: str, array: Array) -> ir.Value:
    """A new weight, named `name` or the like."""
    taken = {*body.initializers, *(v.name for n in body for v in n.outputs)}
    taken |= {v.name for v in body.inputs}
    unique, count = name, 1
    while unique in taken:
        count += 1
        unique = f"{name}_{count}"
    tensor = ir.tensor(np.ascontiguousarray(array), name=unique)
    value = ir.Value(name=unique, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))
    value.const_value = tensor
    body.register_initializer(value)
    return value


def replace(old: ir.Node, new: Sequence[ir.Node]) -> None:
    """Put `new` where `old` was; the last new node's output takes over name and users."""
    body = old.graph
    assert body is not None
    result, last = old.outputs[0], new[-1].outputs[0]
    last.name, last.type, last.shape = result.name, result.type, result.shape
    for node in new:
        node.name = node.name or f"{old.name}"
    body.insert_before(old, new)
    result.replace_all_uses_with(last, replace_graph_outputs=True)
    body.remove(old, safe=True)


def is_noop(node: ir.Node) -> bool:
    """Whether a node hands on its first input unchanged."""
    if node.domain or not node.inputs or len(node.outputs) != 1:
        return False
    before, after = shape(node.inputs[0]), shape(node.outputs[0])
    if node.op_type == "Concat":
        return len(node.inputs) == 1
    if before is None or before != after:
        return False
    if node.op_type in _RESHAPES:
        return True
    if node.op_type == "Slice":  # the same size with steps of one is everything
        steps = constant(node.inputs[4]) if len(node.inputs) > 4 else np.ones(1)
        return steps is not None and bool((steps == 1).all())
    if node.op_type == "Pad":
        return True
    pools = node.op_type in ("MaxPool", "AveragePool")
    return (
        pools and set(ints(node, "kernel_shape")) == {1} and set(ints(node, "strides", (1,))) == {1}
    )


def bypass(node: ir.Node) -> bool:
    """Remove a node that hands on its input; False where graph inputs and outputs forbid it."""
    body, source, result = node.graph, node.inputs[0], node.outputs[0]
    assert body is not None
    assert source is not None
    if result.is_graph_output():
        if source.producer() is None or source.is_graph_output():
            return False
        source.name, result.name = result.name, None
    result.replace_all_uses_with(source, replace_graph_outputs=True)
    body.remove(node, safe=True)
    return True


def keep_names(model: onnx.ModelProto, before: onnx.ModelProto) -> onnx.ModelProto:
    """Name nodes that a rewriter made after the node that had their weight or their result."""
    by_weight = {(n.op_type, n.input[1]): n.name for n in before.graph.node if len(n.input) > 1}
    by_result = {n.output[0]: n.name for n in before.graph.node if n.output}
    known = {n.name for n in before.graph.node}
    for node in model.graph.node:
        if node.name not in known or not node.name:
            weight = (node.op_type, node.input[1]) if len(node.input) > 1 else None
            found = by_weight.get(weight) if weight else None
            node.name = found or by_result.get(node.output[0], "")
    return model


def changes(before: onnx.ModelProto, after: onnx.ModelProto) -> str:
    """What a step added and removed, for people; empty when only names changed."""
    parts = []
    inputs = len(before.graph.input) - len(after.graph.input)
    if inputs:
        parts.append(f"{inputs} weights are no longer inputs")
    old = Counter(n.op_type for n in before.graph.node)
    new = Counter(n.op_type for n in after.graph.node)
    for verb, many in (("removed", old - new), ("added", new - old)):
        if many:
            parts.append(f"{verb} {', '.join(f'{n} {op}' for op, n in sorted(many.items()))}")
    spared = _stored(before) - _stored(after)
    if not parts and spared > 0:
        parts.append(f"{spared} bytes of weights were stored twice or unused")
    return "; ".join(parts)


def _stored(model: onnx.ModelProto) -> int:
    return sum(t.ByteSize() for t in model.graph.initializer)
