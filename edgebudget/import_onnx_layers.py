"""Import rules of convolutions, pools and normalisations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from edgebudget.import_onnx_call import Call, Op, Rule, on_grid

_CONV: Mapping[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE: Mapping[int, Callable[..., Tensor]] = {
    1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d,
}  # fmt: skip
_MAX_POOL: Mapping[int, Callable[..., Tensor]] = {
    1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d,
}  # fmt: skip
_AVG_POOL: Mapping[int, Callable[..., Tensor]] = {
    1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d,
}  # fmt: skip
_IMAGE_RANK = 4


def _sizes(call: Call, name: str, default: Sequence[int]) -> tuple[int, ...]:
    return tuple(call.ints(name) or default)


def _pads(
    call: Call, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Padding before and after each axis, whichever way the node says it."""
    auto = call.text("auto_pad", "NOTSET")
    rank = len(kernel)
    if auto == "NOTSET":
        pads = _sizes(call, "pads", [0] * (2 * rank))
        return tuple(pads[:rank]), tuple(pads[rank:])
    if auto == "VALID":
        return (0,) * rank, (0,) * rank
    before, after = [], []
    for size, k, stride, dilation in zip(call.shape()[2:], kernel, strides, dilations, strict=True):
        total = max(0, (ceil(size / stride) - 1) * stride + (k - 1) * dilation + 1 - size)
        small, large = total // 2, total - total // 2
        before.append(small if auto == "SAME_UPPER" else large)
        after.append(large if auto == "SAME_UPPER" else small)
    return tuple(before), tuple(after)


def _flat(before: Sequence[int], after: Sequence[int]) -> list[int]:
    """Padding as torch wants it: last axis first."""
    return [p for pair in zip(reversed(before), reversed(after), strict=True) for p in pair]


def _conv(call: Call) -> Op:
    weight = call.shape(1)
    rank = len(weight) - 2
    function = _CONV.get(rank)
    if function is None:
        raise call.refuse(f"works on {rank} axes", "use 1 to 3")
    ones = [1] * rank
    strides, dilations = _sizes(call, "strides", ones), _sizes(call, "dilations", ones)
    before, after = _pads(call, weight[2:], strides, dilations)
    groups, grid = call.whole("group", 1), call.grid()

    def run(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        if before == after:
            return function(x, w, b, strides, before, dilations, groups)
        padded = on_grid(grid, F.pad(x, _flat(before, after)))
        return function(padded, w, b, strides, 0, dilations, groups)

    return call.op(run)


def _conv_transpose(call: Call) -> Op:
    weight = call.shape(1)
    rank = len(weight) - 2
    function = _CONV_TRANSPOSE.get(rank)
    if function is None:
        raise call.refuse(f"works on {rank} axes", "use 1 to 3")
    ones, groups = [1] * rank, call.whole("group", 1)
    strides, dilations = _sizes(call, "strides", ones), _sizes(call, "dilations", ones)
    # Torch makes the whole output, of which the pads cut off what the graph's shape leaves out.
    wanted, source = call.out_shape()[2:], call.shape()[2:]
    whole = [
        (n - 1) * s + (k - 1) * d + 1
        for n, s, k, d in zip(source, strides, weight[2:], dilations, strict=True)
    ]
    before = _cut_before(call, whole, wanted)
    after = [w - b - o for w, b, o in zip(whole, before, wanted, strict=True)]
    pads = tuple(max(0, min(b, a)) if a >= 0 else b for b, a in zip(before, after, strict=True))
    extra = tuple(max(0, p - a) if a < p else 0 for p, a in zip(pads, after, strict=True))
    cuts = [(b - p, b - p + o) for b, p, o in zip(before, pads, wanted, strict=True)]
    exact = all(b == p for b, p in zip(before, pads, strict=True)) and all(
        a - p + e == 0 for a, p, e in zip(after, pads, extra, strict=True)
    )

    def run(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        found = function(x, w, b, strides, pads, extra, groups, dilations)
        if exact:
            return found
        for axis, (first, last) in enumerate(cuts):
            found = found.narrow(axis + 2, first, last - first)
        return found

    return call.op(run)


def _cut_before(call: Call, whole: Sequence[int], wanted: Sequence[int]) -> list[int]:
    auto, rank = call.text("auto_pad", "NOTSET"), len(whole)
    if auto == "VALID":
        return [0] * rank
    if auto == "NOTSET" and not call.ints("output_shape"):
        return list(_sizes(call, "pads", [0] * 2 * rank)[:rank])
    extra = _sizes(call, "output_padding", [0] * rank)
    totals = [w + e - o for w, e, o in zip(whole, extra, wanted, strict=True)]
    return [t // 2 if auto == "SAME_UPPER" else t - t // 2 for t in totals]


def _window(call: Call) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    kernel = _sizes(call, "kernel_shape", [])
    ones = [1] * len(kernel)
    if len(kernel) not in _MAX_POOL:
        raise call.refuse(f"pools over {len(kernel)} axes", "use 1 to 3")
    return kernel, _sizes(call, "strides", ones), _sizes(call, "dilations", ones)


def _max_pool(call: Call) -> Op:
    if len(call.node.output) > 1 and call.node.output[1]:
        raise call.refuse("gives the positions of the maxima")
    kernel, strides, dilations = _window(call)
    before, after = _pads(call, kernel, strides, dilations)
    up, grid, wanted = bool(call.whole("ceil_mode", 0)), call.grid(), call.out_shape()
    function = _MAX_POOL[len(kernel)]
    native = before == after and all(2 * p <= k for p, k in zip(before, kernel, strict=True))
    lowest = -torch.inf if grid is None else (grid.low - grid.zero) * grid.scale

    def run(x: Tensor) -> Tensor:
        if native:
            return _checked(call, function(x, kernel, strides, before, dilations, up), wanted)
        low = lowest if x.is_floating_point() else torch.iinfo(x.dtype).min
        padded = on_grid(grid, F.pad(x, _flat(before, after), value=low))
        return _checked(call, function(padded, kernel, strides, 0, dilations, up), wanted)

    return call.op(run)


def _avg_pool(call: Call) -> Op:
    kernel, strides, dilations = _window(call)
    if any(d != 1 for d in dilations):
        raise call.refuse("averages over a window with gaps")
    before, after = _pads(call, kernel, strides, dilations)
    up, wanted = bool(call.whole("ceil_mode", 0)), call.out_shape()
    # Without pads it counts the same either way, and engines only take the plain form.
    all_count = bool(call.whole("count_include_pad", 0)) and any([*before, *after])
    function = _AVG_POOL[len(kernel)]
    if before == after and all(2 * p <= k for p, k in zip(before, kernel, strict=True)):
        return call.op(
            lambda x: _checked(call, function(x, kernel, strides, before, up, all_count), wanted)
        )
    pads = _flat(before, after)
    ones = torch.ones((1, 1, *call.shape()[2:]))
    ones = F.pad(ones, pads, value=1.0 if all_count else 0.0)
    share = call.scope.stored(f"{call.node.name}.share", function(ones, kernel, strides, 0, up))

    def run(x: Tensor, counted: Tensor) -> Tensor:
        found = function(F.pad(x, pads), kernel, strides, 0, up) / counted
        return _checked(call, found, wanted)

    return Op(run, (call.inputs[0], share))


def _checked(call: Call, found: Tensor, wanted: tuple[int, ...]) -> Tensor:
    """Torch and ONNX count the last, incomplete window differently in corner cases."""
    if found.shape[2:] != wanted[2:]:
        raise call.refuse(f"makes {wanted} in ONNX and {tuple(found.shape)} in torch")
    return found


def _global_average(call: Call) -> Op:
    if call.rank() == _IMAGE_RANK:
        return call.op(lambda x: x.mean([-1, -2], True))
    axes = list(range(2, call.rank()))
    return call.op(lambda x: x.mean(axes, True))


def _global_max(call: Call) -> Op:
    axes = list(range(2, call.rank()))
    return call.op(lambda x: x.amax(axes, True))


def _batch_norm(call: Call) -> Op:
    epsilon = call.number("epsilon", 1e-5)
    if call.whole("training_mode", 0):
        raise call.refuse("is in training mode", "export the model in eval mode")
    return call.op(lambda x, w, b, m, v: F.batch_norm(x, m, v, w, b, False, 0.0, epsilon))


def _layer_norm(call: Call) -> Op:
    if any(call.node.output[1:]):
        raise call.refuse("gives its mean and deviation")
    axis, epsilon = call.axis("axis", -1), call.number("epsilon", 1e-5)
    shape = call.shape()[axis:]

    def run(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        offset = None if b is None else b.expand(shape)
        return F.layer_norm(x, shape, w.expand(shape), offset, epsilon)

    return call.op(run)


def _rms_norm(call: Call) -> Op:
    axis, epsilon = call.axis("axis", -1), call.number("epsilon", 1e-5)
    shape = call.shape()[axis:]
    axes = list(range(axis, call.rank()))

    def run(x: Tensor, w: Tensor) -> Tensor:
        return x * torch.rsqrt((x * x).mean(axes, True) + epsilon) * w.expand(shape)

    return call.op(run, 2)


def _instance_norm(call: Call) -> Op:
    epsilon = call.number("epsilon", 1e-5)
    return call.op(lambda x, w, b: F.instance_norm(x, None, None, w, b, True, 0.0, epsilon))


def _group_norm(call: Call) -> Op:
    groups, epsilon = call.whole("num_groups", 1), call.number("epsilon", 1e-5)
    channels = call.shape()[1]

    def run(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        if w.numel() != channels:  # up to operator set 20: one per group
            w, b = (v.repeat_interleave(channels // groups) for v in (w, b))
        return F.group_norm(x, groups, w, b, epsilon)

    return call.op(run)


def _lp_norm(call: Call) -> Op:
    axis, power = call.axis("axis", -1), call.whole("p", 2)
    return call.op(lambda x: x / x.norm(power, axis, keepdim=True))


def _lrn(call: Call) -> Op:
    size: Any = call.whole("size", 1)
    alpha, beta, bias = (
        call.number("alpha", 1e-4), call.number("beta", 0.75), call.number("bias", 1.0)
    )  # fmt: skip
    if size % 2 == 0:
        raise call.refuse("normalises over an even number of channels")
    return call.op(lambda x: F.local_response_norm(x, size, alpha, beta, bias))


def _dropout(call: Call) -> Op:
    if any(call.node.output[1:]):
        raise call.refuse("gives its mask")
    return call.op(lambda x: x, 1)


LAYERS: Mapping[str, Rule] = {
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "MaxPool": _max_pool,
    "AveragePool": _avg_pool,
    "GlobalAveragePool": _global_average,
    "GlobalMaxPool": _global_max,
    "BatchNormalization": _batch_norm,
    "LayerNormalization": _layer_norm,
    "RMSNormalization": _rms_norm,
    "SimplifiedLayerNormalization": _rms_norm,
    "InstanceNormalization": _instance_norm,
    "GroupNormalization": _group_norm,
    "LpNormalization": _lp_norm,
    "LRN": _lrn,
    "Dropout": _dropout,
}
