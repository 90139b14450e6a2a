"""Rewrites of single nodes into forms that integer engines run. Each returns what it did.

A rule gets one node and changes the graph around it, or leaves everything alone and returns a
Note with a reason (`why`), or None when it has nothing to say about the node.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgebudget.program import Note
from edgebudget.target import TargetSpec
from edgebudget_passes._graph_edits import (
    add_initializer,
    constant,
    integer,
    ints,
    replace,
    shape,
    text,
)
from edgebudget_passes._unary_forms import recognise

_NON_NEGATIVE = frozenset({"Relu", "Sigmoid", "HardSigmoid", "Softmax", "Abs", "Exp"})


@dataclass(frozen=True, slots=True)
class Rule:
    """One rewrite, tried on every node whose operator is in `ops` (all when empty)."""

    name: str
    ops: frozenset[str]
    rewrite: Callable[[ir.Node], Note | None]


def rules_for(target: TargetSpec) -> tuple[Rule, ...]:
    """The rewrites that help on a target, in order."""
    chosen = [
        Rule("pads", frozenset({"Conv", "AveragePool", "MaxPool"}), merge_pad),
        Rule("activations", frozenset(), name_activation),
        Rule("global means", frozenset({"ReduceMean", "AveragePool"}), global_mean),
        Rule("linear layers", frozenset({"MatMul"}), linear),
        Rule("slices", frozenset({"Slice"}), join_slices),
    ]
    if target.options.get("symmetric_pads") == "true":
        chosen.append(Rule("symmetric pads", frozenset({"Conv"}), symmetric_pad))
    return tuple(chosen)


def merge_pad(node: ir.Node) -> Note | None:
    """A Pad before a convolution or pool becomes part of that node's own padding."""
    source = node.inputs[0]
    pad = source.producer() if source is not None else None
    if pad is None or pad.op_type != "Pad" or pad.domain:
        return None
    amounts, why = _spatial_pad(pad)
    if amounts is None:
        return Note(_name(node), f"{_name(pad)} kept", why)
    if text(node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return Note(_name(node), f"{_name(pad)} kept", "the node pads automatically")
    own = ints(node, "pads", [0] * len(amounts))
    counted = bool(integer(node, "count_include_pad", 0))
    ceil = bool(integer(node, "ceil_mode", 0))
    inner = pad.inputs[0]
    value = _pad_value(pad)
    if node.op_type == "Conv" and value != 0:
        return Note(_name(node), f"{_name(pad)} kept", f"it pads with {value}")
    if node.op_type == "AveragePool" and (value != 0 or ceil or (any(own) and not counted)):
        return Note(_name(node), f"{_name(pad)} kept", "the mean over the edge would change")
    if node.op_type == "MaxPool":
        maker = inner.producer() if inner is not None else None
        positive = maker is not None and maker.op_type in _NON_NEGATIVE
        if ceil or len(node.outputs) > 1 or not (value == -np.inf or (value == 0 and positive)):
            return Note(_name(node), f"{_name(pad)} kept", "padding may be the maximum")
    kernel = ints(node, "kernel_shape") or (shape(node.inputs[1]) or ())[2:]
    total = [a + b for a, b in zip(own, amounts, strict=True)]
    if node.op_type != "Conv" and any(t >= k for t, k in zip(total, [*kernel] * 2, strict=True)):
        return Note(_name(node), f"{_name(pad)} kept", "a pool's padding must be below its kernel")
    node.attributes["pads"] = ir.AttrInt64s("pads", total)
    node.attributes.pop("auto_pad", None)
    if node.op_type == "AveragePool":
        node.attributes["count_include_pad"] = ir.AttrInt64("count_include_pad", 1)
    node.replace_input_with(0, inner)
    return Note(_name(node), f"took in {_name(pad)}: pads {'x'.join(map(str, total))}")


def name_activation(node: ir.Node) -> Note | None:
    """A spelled-out activation becomes its own operator."""
    found = recognise(node)
    if found is None:
        return None
    form, source, count = found
    if form.op == node.op_type:
        return None
    version = node.graph.opset_imports.get("", 0) if node.graph is not None else 0
    if version < form.since:
        why = f"{form.op} needs operator set {form.since}, the model has {version}"
        return Note(_name(node), "kept spelled out", why)
    made = ir.node(form.op, [source], attributes=form.attributes, name=f"{_name(node)}.{form.op}")
    replace(node, [made])
    return Note(_name(node), f"{count} nodes became {form.op}")


def global_mean(node: ir.Node) -> Note | None:
    """A mean over height and width becomes GlobalAveragePool, which has an integer kernel."""
    source = node.inputs[0]
    size = shape(source)
    if source is None or size is None or len(size) != 4:
        return None
    if node.op_type == "AveragePool":
        if ints(node, "kernel_shape") != size[2:] or any(ints(node, "pads")):
            return None
        keep = True
    else:
        axes = ints(node, "axes") or _listed(node, 1)
        if sorted(a % 4 for a in axes) != [2, 3]:
            return None
        keep = bool(integer(node, "keepdims", 1))
    pool = ir.node("GlobalAveragePool", [source], name=f"{_name(node)}.GlobalAveragePool")
    if keep:
        replace(node, [pool])
        return Note(_name(node), "became GlobalAveragePool")
    pooled = pool.outputs[0]
    pooled.name, pooled.type = f"{node.outputs[0].name}.pooled", source.type
    pooled.shape = ir.Shape((*size[:2], 1, 1))
    flat = ir.node("Flatten", [pooled], attributes={"axis": 1}, name=f"{_name(node)}.Flatten")
    replace(node, [pool, flat])
    return Note(_name(node), "became GlobalAveragePool and Flatten")


def linear(node: ir.Node) -> Note | None:
    """MatMul by a stored matrix, then Add of a stored vector, becomes Gemm: one integer layer."""
    left, right = node.inputs
    weight = constant(right)
    uses = list(node.outputs[0].uses())
    if left is None or weight is None or weight.ndim != 2 or len(uses) != 1:
        return None
    add, position = uses[0].node, uses[0].idx
    if add.op_type != "Add" or node.outputs[0].is_graph_output() or len(shape(left) or ()) != 2:
        return None
    other = add.inputs[1 - position]
    bias = constant(other)
    if bias is None or bias.ndim > 2 or not bias.size == bias.shape[-1] == weight.shape[1]:
        return None
    flat = other
    if bias.ndim != 1:
        body = node.graph
        assert body is not None
        flat = add_initializer(body, f"{other.name}.flat" if other else "bias", bias.reshape(-1))
    made = ir.node("Gemm", [left, right, flat], name=_name(node))
    replace(add, [made])
    return Note(_name(node), f"{_name(node)} and {_name(add)} became Gemm")


def join_slices(node: ir.Node) -> Note | None:
    """Two Slices in a row along different axes become one."""
    source = node.inputs[0]
    first = source.producer() if source is not None else None
    if first is None or first.op_type != "Slice" or len(list(first.outputs[0].uses())) != 1:
        return None
    if first.outputs[0].is_graph_output() or first.inputs[0] is None:
        return None
    parts = [_slice(n) for n in (first, node)]
    if not all(parts) or set(parts[0]["axes"]) & set(parts[1]["axes"]):
        return None
    body = node.graph
    assert body is not None
    fields = [
        add_initializer(body, f"{_name(node)}.{k}", np.array(parts[0][k] + parts[1][k], np.int64))
        for k in ("starts", "ends", "axes", "steps")
    ]
    replace(node, [ir.node("Slice", [first.inputs[0], *fields], name=_name(node))])
    return Note(_name(node), f"joined with {_name(first)}")


def _slice(node: ir.Node) -> dict[str, tuple[int, ...]]:
    """Starts, ends, axes and steps of a Slice with constant bounds; empty for others."""
    starts, ends, axes, steps = (_listed(node, i) for i in range(1, 5))
    rank = len(shape(node.inputs[0]) or ())
    if not starts or len(starts) != len(ends) or not rank:
        return {}
    axes = tuple(a % rank for a in axes or range(len(starts)))
    return {"starts": starts, "ends": ends, "axes": axes, "steps": steps or (1,) * len(starts)}


def symmetric_pad(node: ir.Node) -> Note | None:
    """A kernel grows by zeros until the padding of both sides is equal (exact).

    A 3x3 kernel with padding 0 before and 1 after becomes 4x4 with padding 1.
    """
    pads, weight = ints(node, "pads"), constant(node.inputs[1])
    rank = len(pads) // 2
    before, after = pads[:rank], pads[rank:]
    if before == after or weight is None:
        return None
    if set(ints(node, "dilations", (1,))) != {1}:
        return Note(_name(node), "pads kept", "its kernel is dilated")
    most = [max(a, b) for a, b in zip(before, after, strict=True)]
    grow = [(m - b, m - a) for m, b, a in zip(most, before, after, strict=True)]
    wider = np.pad(weight, [(0, 0), (0, 0), *grow])
    body = node.graph
    assert body is not None
    old = node.inputs[1]
    value = add_initializer(body, f"{old.name if old else 'weight'}.wide", wider)
    node.replace_input_with(1, value)
    node.attributes["pads"] = ir.AttrInt64s("pads", most * 2)
    node.attributes["kernel_shape"] = ir.AttrInt64s("kernel_shape", wider.shape[2:])
    return Note(_name(node), f"kernel {_by(weight.shape[2:])} became {_by(wider.shape[2:])}")


def _spatial_pad(pad: ir.Node) -> tuple[list[int] | None, str]:
    """Padding of the spatial axes, begins then ends; None and why when it is something else."""
    amounts = list(_listed(pad, 1))
    if text(pad, "mode", "constant") != "constant":
        return None, f"it pads by {text(pad, 'mode', 'constant')}"
    rank = len(amounts) // 2
    if not amounts or len(pad.inputs) > 3 or rank < 3:
        return None, "its amounts are not plain constants"
    if any(amounts[i] for i in (0, 1, rank, rank + 1)):
        return None, "it pads channels"
    if min(amounts) < 0:
        return None, "it crops"
    return amounts[2:rank] + amounts[rank + 2 :], ""


def _pad_value(pad: ir.Node) -> float:
    if len(pad.inputs) < 3 or pad.inputs[2] is None:
        return 0.0
    held = constant(pad.inputs[2])
    return float("nan") if held is None else float(held.reshape(-1)[0])


def _listed(node: ir.Node, index: int) -> tuple[int, ...]:
    """Integers that newer operator sets give as an input."""
    held = constant(node.inputs[index]) if len(node.inputs) > index else None
    return () if held is None else tuple(int(v) for v in held.reshape(-1))


def _name(node: ir.Node) -> str:
    return node.name or node.op_type


def _by(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))
