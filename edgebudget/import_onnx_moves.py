"""Import rules of operators that move values without changing them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from edgebudget.import_onnx_call import Call, Op, Rule


def _reshaped(call: Call) -> Op:
    """Reshape, Flatten, Squeeze and Unsqueeze: the shape of the result is known."""
    shape = call.out_shape()
    if shape == call.shape():
        return call.op(lambda x: x, 1)
    return call.op(lambda x: x.reshape(call.sized(shape)), 1)


def _transpose(call: Call) -> Op:
    order = call.ints("perm") or list(reversed(range(call.rank())))
    return call.op(lambda x: x.permute(order))


def _concat(call: Call) -> Op:
    axis = call.axis("axis", 0)
    stored = [name in call.scope.known for name in call.inputs]
    if not call.scope.batches or axis == 0 or not any(stored):
        return call.op(lambda *values: torch.cat(values, axis))

    def run(*values: Tensor) -> Tensor:
        """A stored tensor joins every sample."""
        count = next(v.shape[0] for v, s in zip(values, stored, strict=True) if not s)
        each = zip(values, stored, strict=True)
        return torch.cat([v.expand(count, *v.shape[1:]) if s else v for v, s in each], axis)

    return call.op(run)


def _split(call: Call) -> Op:
    axis = call.axis("axis", 0)
    sizes = [call.out_shape(i)[axis] for i in range(len(call.node.output))]
    return call.op(lambda x: tuple(x.split(sizes, axis)), 1)


def _slice(call: Call) -> Op:
    starts, ends = call.ints("starts", 1), call.ints("ends", 2)
    if starts is None or ends is None:
        raise call.refuse("has no bounds", "export the model again")
    axes = call.ints("axes", 3) or list(range(len(starts)))
    steps = call.ints("steps", 4) or [1] * len(starts)
    shape = call.shape()
    cuts = []
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        axis %= len(shape)
        first, last, stride = slice(start, end, step).indices(shape[axis])
        if step < 0:  # the same elements from the other end
            size = shape[axis]
            first, last, stride = size - 1 - first, size - 1 - last, -stride
        cuts.append((axis, first, max(first, last), stride, step < 0))

    def run(x: Tensor) -> Tensor:
        for axis, first, last, stride, back in cuts:
            x = x.flip(axis) if back else x
            if (first, stride) != (0, 1) or last < x.shape[axis]:
                x = torch.ops.aten.slice(x, axis, first, last, stride)
        return x

    return call.op(run, 1)


_PAD_MODES: Mapping[str, str] = {"edge": "replicate", "reflect": "reflect", "wrap": "circular"}


def _pad(call: Call) -> Op:
    pads = call.ints("pads", 1)
    if pads is None:
        raise call.refuse("has no pads", "export the model again")
    rank = call.rank()
    axes = [a % rank for a in (call.ints("axes", 3) or range(rank))]
    pairs = {a: (pads[i], pads[i + len(axes)]) for i, a in enumerate(axes)}
    first = min((a for a, p in pairs.items() if any(p)), default=rank - 1)
    flat = [p for a in range(rank - 1, first - 1, -1) for p in pairs.get(a, (0, 0))]
    mode = call.text("mode", "constant")
    if mode == "constant":
        given = call.constant(2)
        value = call.number("value", 0.0) if given is None else float(given)
        return call.op(lambda x: F.pad(x, flat, value=value), 1)
    if mode not in _PAD_MODES or first < 2:
        raise call.refuse(f"pads by {mode} on axis {first}", "pad with a constant")
    known = _PAD_MODES[mode]
    return call.op(lambda x: F.pad(x, flat, mode=known), 1)


def _expand(call: Call) -> Op:
    shape = call.out_shape()
    return call.op(lambda x: x.expand(call.sized(shape)), 1)


def _tile(call: Call) -> Op:
    repeats = call.ints("repeats", 1)
    if repeats is None:
        raise call.refuse("has no repeats", "export the model again")
    return call.op(lambda x: x.repeat(repeats), 1)


def _gather(call: Call) -> Op:
    axis, shape = call.axis("axis", 0), call.out_shape()
    size = call.shape()[axis]
    known = call.scope.known.get(call.inputs[1])
    if known is not None and known.ndim == 0:
        index = int(known) % size
        return call.op(lambda x: x.select(axis, index), 1)
    if known is not None:
        flat = known.reshape(-1).to(torch.int64) % size
        name = call.scope.stored(f"{call.node.name}.indices", flat)
        return Op(
            lambda x, i: x.index_select(axis, i).reshape(call.sized(shape)),
            (call.inputs[0], name),
        )

    def run(x: Tensor, i: Tensor) -> Tensor:
        whole = torch.where(i < 0, i + size, i).reshape(-1)
        return x.index_select(axis, whole).reshape(call.sized(shape))

    return call.op(run)


def _gather_elements(call: Call) -> Op:
    axis = call.axis("axis", 0)
    size = call.shape()[axis]
    return call.op(lambda x, i: torch.gather(x, axis, torch.where(i < 0, i + size, i).long()))


def _depth_to_space(call: Call) -> Op:
    block, mode = call.whole("blocksize", 1), call.text("mode", "DCR")
    _, c, h, w = call.shape()
    inner = c // block**2
    if mode == "CRD":
        return call.op(lambda x: F.pixel_shuffle(x, block))

    def run(x: Tensor) -> Tensor:
        parts = x.reshape(-1, block, block, inner, h, w).permute(0, 3, 4, 1, 5, 2)
        return parts.reshape(-1, inner, h * block, w * block)

    return call.op(run)


def _space_to_depth(call: Call) -> Op:
    block = call.whole("blocksize", 1)
    _, c, h, w = call.shape()

    def run(x: Tensor) -> Tensor:
        parts = x.reshape(-1, c, h // block, block, w // block, block).permute(0, 3, 5, 1, 2, 4)
        return parts.reshape(-1, c * block**2, h // block, w // block)

    return call.op(run)


def _trilu(call: Call) -> Op:
    offset = call.constant(1)
    k, upper = 0 if offset is None else int(offset), bool(call.whole("upper", 1))
    return call.op(lambda x: x.triu(k) if upper else x.tril(k), 1)


MOVES: Mapping[str, Rule] = {
    "Reshape": _reshaped,
    "Flatten": _reshaped,
    "Squeeze": _reshaped,
    "Unsqueeze": _reshaped,
    "Transpose": _transpose,
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "Pad": _pad,
    "Expand": _expand,
    "Tile": _tile,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "DepthToSpace": _depth_to_space,
    "SpaceToDepth": _space_to_depth,
    "Trilu": _trilu,
}
