"""Import rules of element-wise operators, reductions and products."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any

import onnx
import torch
import torch.nn.functional as F
from torch import Tensor

from edgebudget.import_onnx_call import Call, Fixed, Op, Rule, Run, on_grid

_IMAGE_RANK = 4


def _plain(run: Run) -> Rule:
    return lambda call: call.op(run)


def _folded(run: Callable[[Tensor, Tensor], Tensor]) -> Rule:
    """An operator of any number of operands, two at a time."""
    return lambda call: call.op(lambda *values: reduce(run, values))


def _div(call: Call) -> Op:
    def run(a: Tensor, b: Tensor) -> Tensor:
        if a.is_floating_point():
            return a / b
        return torch.div(a, b, rounding_mode="trunc")

    return call.op(run)


def _mod(call: Call) -> Op:
    return call.op(torch.fmod if call.whole("fmod", 0) else torch.remainder)


def _mean(call: Call) -> Op:
    return call.op(lambda *values: reduce(torch.add, values) / len(values))


def _clip(call: Call) -> Op:
    bounds: list[float | None] = []
    for name, index in (("min", 1), ("max", 2)):
        if name in call.attributes:
            bounds.append(float(call.attributes[name]))
            continue
        value = call.constant(index)
        bounds.append(None if value is None else value.item())
    low, high = bounds
    if low is None and high is None:
        return call.op(lambda x: x, 1)
    if low == 0 and high is None:
        return call.op(F.relu, 1)
    return call.op(lambda x: torch.clamp(x, low, high), 1)


def _leaky(call: Call) -> Op:
    slope = call.number("alpha", 0.01)
    return call.op(lambda x: F.leaky_relu(x, slope))


def _prelu(call: Call) -> Op:
    slope, rank = call.scope.shapes.get(call.inputs[1], ()), call.rank()
    flat = [d for d in slope if d != 1]
    if call.inputs[1] in call.scope.known and not call.scope.is_packed(call.inputs[1]):
        one = not flat
        channels = len(flat) == 1 and rank > 1 and len(slope) - slope.index(flat[0]) == rank - 1
        if one or channels:
            value = call.scope.known[call.inputs[1]].reshape(-1)
            name = call.scope.stored(f"{call.inputs[1]}.flat", value)
            return Op(F.prelu, (call.inputs[0], name))
    return call.op(lambda x, s: torch.where(x < 0, x * s, x))


def _elu(call: Call) -> Op:
    alpha = call.number("alpha", 1.0)
    return call.op(lambda x: F.elu(x, alpha))


def _celu(call: Call) -> Op:
    alpha = call.number("alpha", 1.0)
    return call.op(lambda x: F.celu(x, alpha))


def _selu(call: Call) -> Op:
    alpha = call.number("alpha", 1.67326319217681884765625)
    gamma = call.number("gamma", 1.05070102214813232421875)
    return call.op(lambda x: gamma * F.elu(x, alpha))


def _thresholded(call: Call) -> Op:
    alpha = call.number("alpha", 1.0)
    return call.op(lambda x: torch.where(x > alpha, x, torch.zeros_like(x)))


def _hard_sigmoid(call: Call) -> Op:
    alpha, beta = call.number("alpha", 0.2), call.number("beta", 0.5)
    if abs(alpha - 1 / 6) < 1e-6 and beta == 0.5:
        return call.op(F.hardsigmoid)
    return call.op(lambda x: torch.clamp(alpha * x + beta, 0.0, 1.0))


def _gelu(call: Call) -> Op:
    approximate = call.text("approximate", "none")
    return call.op(lambda x: F.gelu(x, approximate=approximate))


def _quick_gelu(call: Call) -> Op:
    alpha = call.number("alpha", 1.702)
    return call.op(lambda x: x * torch.sigmoid(alpha * x))


def _fast_gelu(call: Call) -> Op:
    return call.op(lambda x, *bias: F.gelu(reduce(torch.add, bias, x), approximate="tanh"))


def _softmax(function: Callable[..., Tensor]) -> Rule:
    def rule(call: Call) -> Op:
        if call.opset >= 13:
            axis = call.axis("axis", -1)
            return call.op(lambda x: function(x, dim=axis))
        axis, shape = call.axis("axis", 1), call.shape()
        return call.op(lambda x: function(x.flatten(axis), dim=axis).reshape(call.sized(shape)))

    return rule


def _cast(call: Call) -> Op:
    return _to(call, call.whole("to", 1))


def _cast_like(call: Call) -> Op:
    other = call.constant(1)
    assert other is not None
    return call.op(lambda x: x.to(other.dtype), 1)


def _to(call: Call, kind: int) -> Op:
    name = onnx.helper.tensor_dtype_to_np_dtype(kind).name
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise call.refuse(f"casts to {name}, which torch does not have")
    return call.op(lambda x: x.to(dtype))


def _axes(call: Call) -> list[int] | None:
    """Axes of a reduction, from the front; None: there is nothing to reduce."""
    axes = call.ints("axes", 1)
    if not axes:
        return None if call.whole("noop_with_empty_axes", 0) else list(range(call.rank()))
    return sorted(a % call.rank() for a in axes)


def _reduce(run: Callable[[Tensor, list[int], bool], Tensor]) -> Rule:
    def rule(call: Call) -> Op:
        axes, keep = _axes(call), bool(call.whole("keepdims", 1))
        if axes is None:
            return call.op(lambda x: x, 1)
        return call.op(lambda x: run(x, axes, keep), 1)

    return rule


def _reduce_mean(call: Call) -> Op:
    axes, keep, shape = _axes(call), bool(call.whole("keepdims", 1)), call.out_shape()
    if axes is None:
        return call.op(lambda x: x, 1)
    if axes != [2, 3] or call.rank() != _IMAGE_RANK:
        return call.op(lambda x: x.mean(axes, keep), 1)
    if keep:  # the form that engines take for global average pooling
        return call.op(lambda x: x.mean([-1, -2], True), 1)
    grid = call.scope.grid_after(call.node.output[0]) if call.grid() else None

    def run(x: Tensor) -> Tensor:
        return on_grid(grid, x.mean([-1, -2], True)).reshape(call.sized(shape))

    return call.op(run, 1)


def _prod(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in reversed(axes):
        x = x.prod(axis, keepdim=keep)
    return x


def _arg(run: Callable[..., Tensor]) -> Rule:
    def rule(call: Call) -> Op:
        axis, keep = call.axis("axis", 0), bool(call.whole("keepdims", 1))
        if not call.whole("select_last_index", 0):
            return call.op(lambda x: run(x, axis, keepdim=keep))
        size = call.shape()[axis]
        return call.op(lambda x: size - 1 - run(x.flip(axis), axis, keepdim=keep))

    return rule


def _top_k(call: Call) -> Op:
    count = call.ints("k", 1)
    assert count is not None
    axis, largest = call.axis("axis", -1), bool(call.whole("largest", 1))
    return call.op(lambda x: tuple(torch.topk(x, count[0], axis, largest, True)), 1)


def _cumsum(call: Call) -> Op:
    axis = call.ints("axis", 1)
    assert axis is not None
    back, less = bool(call.whole("reverse", 0)), bool(call.whole("exclusive", 0))

    def run(x: Tensor) -> Tensor:
        turned = x.flip(axis[0]) if back else x
        found = turned.cumsum(axis[0]) - (turned if less else 0)
        return found.flip(axis[0]) if back else found

    return call.op(run, 1)


def _matmul(call: Call) -> Op:
    right = call.inputs[1]
    if right in call.scope.known and call.rank(1) == 2 and call.rank() > 1:
        return Op(F.linear, (call.inputs[0], call.scope.transposed(right)))
    left, other, wanted = call.shape(), call.shape(1), call.out_shape()
    if len(left) == len(other) == 3 and left[0] == other[0]:  # the form that engines take
        return call.op(torch.bmm)
    if len(left) > 2 and left[:-2] == other[:-2]:

        def run(x: Tensor, y: Tensor) -> Tensor:
            return torch.bmm(x.flatten(0, -3), y.flatten(0, -3)).reshape(call.sized(wanted))

        return call.op(run)
    return call.op(torch.matmul)


def _gemm(call: Call) -> Op:
    alpha, beta = call.number("alpha", 1.0), call.number("beta", 1.0)
    scope = call.scope
    left = scope.transposed(call.inputs[0]) if call.whole("transA", 0) else call.inputs[0]
    right = call.inputs[1] if call.whole("transB", 0) else scope.transposed(call.inputs[1])
    if not call.has(2):
        return Op(lambda x, w: _times(F.linear(x, w), alpha), (left, right))
    bias, columns = call.inputs[2], call.out_shape()[-1]
    args = (left, right, bias)
    if alpha == beta == 1.0 and scope.shapes.get(bias) in {(columns,), (1, columns), ()}:
        if scope.shapes[bias] != (columns,) and not scope.is_packed(bias):
            value = scope.known.get(bias)
            if value is not None:
                bias = scope.stored(f"{bias}.flat", value.reshape(-1).expand(columns))
                return Op(F.linear, (left, right, bias))
        elif scope.shapes[bias] == (columns,):
            return Op(F.linear, args)
    return Op(lambda x, w, b: _times(F.linear(x, w), alpha) + _times(b, beta), args)


def _times(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1.0 else x * factor


def _einsum(call: Call) -> Op:
    equation = call.text("equation", "").replace(" ", "")
    return call.op(lambda *values: torch.einsum(equation, *values))


def _shape(call: Call) -> Fixed:
    shape = call.shape()
    first, last = call.whole("start", 0), call.whole("end", len(shape))
    return Fixed(torch.tensor(shape[first:last], dtype=torch.int64))


def _size(call: Call) -> Fixed:
    return Fixed(torch.tensor(call.shape(), dtype=torch.int64).prod())


def _constant(call: Call) -> Fixed:
    for name, value in call.attributes.items():
        if name == "value":
            return Fixed(torch.from_numpy(onnx.numpy_helper.to_array(value).copy()))
        if name.startswith(("value_float", "value_int")):
            dtype = torch.float32 if "float" in name else torch.int64
            return Fixed(torch.tensor(value, dtype=dtype))
    raise call.refuse("holds no plain numbers")


def _constant_of_shape(call: Call) -> Fixed:
    shape = call.ints("shape", 0) or []
    given: Any = call.attributes.get("value")
    value = torch.zeros(1)
    if given is not None:
        value = torch.from_numpy(onnx.numpy_helper.to_array(given).copy())
    return Fixed(value.reshape(()).expand(shape).contiguous())


def _range(call: Call) -> Fixed:
    first, last, step = (call.constant(i) for i in range(3))
    assert first is not None
    assert last is not None
    assert step is not None
    return Fixed(torch.arange(first.item(), last.item(), step.item(), dtype=first.dtype))


_ELEMENTWISE: Mapping[str, Run] = {
    "Abs": torch.abs, "Acos": torch.acos, "Acosh": torch.acosh, "And": torch.logical_and,
    "Asin": torch.asin, "Asinh": torch.asinh, "Atan": torch.atan, "Atanh": torch.atanh,
    "Ceil": torch.ceil, "Cos": torch.cos, "Cosh": torch.cosh, "Equal": torch.eq,
    "Erf": torch.erf, "Exp": torch.exp, "Floor": torch.floor, "Greater": torch.gt,
    "GreaterOrEqual": torch.ge, "HardSwish": F.hardswish, "Identity": lambda x: x,
    "IsInf": torch.isinf, "IsNaN": torch.isnan, "Less": torch.lt, "LessOrEqual": torch.le,
    "Log": torch.log, "Mish": F.mish, "Mul": torch.mul, "Neg": torch.neg,
    "Not": torch.logical_not, "Or": torch.logical_or, "Pow": torch.pow,
    "Reciprocal": torch.reciprocal, "Relu": F.relu, "Round": torch.round,
    "Sigmoid": torch.sigmoid, "Sign": torch.sign, "Sin": torch.sin, "Sinh": torch.sinh,
    "Softplus": F.softplus, "Softsign": F.softsign, "Sqrt": torch.sqrt, "Sub": torch.sub,
    "Tan": torch.tan, "Tanh": torch.tanh, "Where": torch.where, "Xor": torch.logical_xor,
    "Add": torch.add,
}  # fmt: skip

MATH: Mapping[str, Rule] = {
    **{op: _plain(run) for op, run in _ELEMENTWISE.items()},
    "Sum": _folded(torch.add),
    "Max": _folded(torch.maximum),
    "Min": _folded(torch.minimum),
    "Mean": _mean,
    "Div": _div,
    "Mod": _mod,
    "Clip": _clip,
    "LeakyRelu": _leaky,
    "PRelu": _prelu,
    "Elu": _elu,
    "Celu": _celu,
    "Selu": _selu,
    "ThresholdedRelu": _thresholded,
    "HardSigmoid": _hard_sigmoid,
    "Gelu": _gelu,
    "QuickGelu": _quick_gelu,
    "FastGelu": _fast_gelu,
    "Softmax": _softmax(F.softmax),
    "LogSoftmax": _softmax(F.log_softmax),
    "Cast": _cast,
    "CastLike": _cast_like,
    "ReduceMean": _reduce_mean,
    "ReduceSum": _reduce(lambda x, axes, keep: x.sum(axes, keep)),
    "ReduceMax": _reduce(lambda x, axes, keep: x.amax(axes, keep)),
    "ReduceMin": _reduce(lambda x, axes, keep: x.amin(axes, keep)),
    "ReduceProd": _reduce(_prod),
    "ReduceL1": _reduce(lambda x, axes, keep: x.abs().sum(axes, keep)),
    "ReduceL2": _reduce(lambda x, axes, keep: (x * x).sum(axes, keep).sqrt()),
    "ReduceSumSquare": _reduce(lambda x, axes, keep: (x * x).sum(axes, keep)),
    "ReduceLogSum": _reduce(lambda x, axes, keep: x.sum(axes, keep).log()),
    "ReduceLogSumExp": _reduce(lambda x, axes, keep: x.logsumexp(axes, keep)),
    "ArgMax": _arg(torch.argmax),
    "ArgMin": _arg(torch.argmin),
    "TopK": _top_k,
    "CumSum": _cumsum,
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Einsum": _einsum,
    "Shape": _shape,
    "Size": _size,
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "Range": _range,
}
