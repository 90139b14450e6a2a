"""Cost of single ONNX operators: multiply-accumulates, and other operations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from edgebudget.count_rules import (
    BATCH_NORM,
    COMPOSITE,
    DEQUANTIZE,
    NORMALIZE,
    QUANTIZE,
    SOFTMAX,
    einsum_macs,
    interpolation,
    recurrent,
)
from edgebudget.onnx_shapes import TensorInfo
from edgebudget_runtime.errors import UnsupportedError


@dataclass(frozen=True, slots=True)
class Call:
    """One node with everything about its operands; an absent optional operand is None."""

    name: str
    op: str
    attrs: dict[str, Any]
    inputs: Sequence[TensorInfo | None]
    out: TensorInfo

    def at(self, index: int) -> TensorInfo:
        """An operand that must be there."""
        found = self.inputs[index] if index < len(self.inputs) else None
        if found is None:
            raise UnsupportedError(
                "EB213",
                f"{self.op} {self.name!r} without its input {index} has no counting rule",
                hint="export the operator in its plain form",
            )
        return found

    def has(self, index: int) -> bool:
        """Whether an optional operand is there."""
        return index < len(self.inputs) and self.inputs[index] is not None


Rule = Callable[[Call], int]


def _conv(weight: int = 1) -> Rule:
    def rule(c: Call) -> int:
        w = c.at(weight)
        return c.out.elements * (w.elements // w.shape[0])

    return rule


def _conv_transpose(c: Call) -> int:
    w = c.at(1)
    return c.at(0).elements * (w.elements // w.shape[0])


def _matmul(c: Call) -> int:
    return c.out.elements * c.at(0).shape[-1]


def _gemm(c: Call) -> int:
    return c.out.elements * c.at(0).shape[0 if c.attrs.get("transA") else 1]


def _fused_matmul(c: Call) -> int:
    return c.out.elements * c.at(0).shape[-2 if c.attrs.get("transA") else -1]


def _einsum(c: Call) -> int:
    return einsum_macs(c.attrs["equation"], [i.shape for i in c.inputs if i is not None])


def _recurrent(c: Call) -> int:
    x = c.at(0)
    return x.shape[0] * x.shape[1] * (c.at(1).elements + c.at(2).elements)


def _keys(c: Call, key: int, past: int) -> int:
    """Number of keys each query is compared with; [B, L, H] and [B, heads, L, D] alike."""
    return c.at(key).shape[-2] + (c.at(past).shape[-2] if c.has(past) else 0)


def _attention(c: Call) -> int:
    """Query times keys, then scores times values."""
    past = 4 if c.op == "Attention" else 6
    return (c.at(0).elements + c.out.elements) * _keys(c, 1, past)


def _packed_attention(c: Call) -> int:
    x, w = c.at(0), c.at(1)
    sizes: list[int] = c.attrs.get("qkv_hidden_sizes") or [w.shape[1] // 3] * 3
    rows = x.elements // x.shape[-1]
    project = rows * w.elements
    return project + (rows * sizes[0] + c.out.elements) * _keys(c, 0, 4)


MACS: dict[str, Rule] = {
    "Conv": _conv(),
    "ConvInteger": _conv(),
    "DeformConv": _conv(),
    "FusedConv": _conv(),
    "QLinearConv": _conv(3),
    "ConvTranspose": _conv_transpose,
    "Gemm": _gemm,
    "FusedGemm": _gemm,
    "QGemm": _gemm,
    "MatMul": _matmul,
    "MatMulInteger": _matmul,
    "QLinearMatMul": _matmul,
    "MatMulNBits": _matmul,
    "MatMulIntegerToFloat": _matmul,
    "DynamicQuantizeMatMul": _matmul,
    "FusedMatMul": _fused_matmul,
    "Einsum": _einsum,
    "LSTM": _recurrent,
    "GRU": _recurrent,
    "RNN": _recurrent,
    "Attention": _attention,
    "MultiHeadAttention": _attention,
    "com.microsoft:Attention": _packed_attention,
}


def _each(ops: int) -> Rule:
    return lambda c: ops * c.out.elements


def _per_input(ops: int) -> Rule:
    return lambda c: ops * c.at(0).elements


def _window(c: Call) -> int:
    return c.out.elements * math.prod(int(k) for k in c.attrs["kernel_shape"])


def _variadic(c: Call) -> int:
    return c.out.elements * (sum(i is not None for i in c.inputs) - 1)


def _resize(c: Call) -> int:
    mode = c.attrs.get("mode", "nearest")
    before, after = c.at(0).shape, c.out.shape
    changed = sum(a != b for a, b in zip(before, after, strict=True))
    return c.out.elements * interpolation(mode, changed)


def _grid_sample(c: Call) -> int:
    mode = c.attrs.get("mode", "linear").removeprefix("bi")
    return c.out.elements * interpolation(str(mode), len(c.out.shape) - 2)


def _bias(index: int, extra: int = 0) -> Rule:
    """A bias that may be there, an activation fused behind, `extra` operations an element."""

    def rule(c: Call) -> int:
        fused = "activation" in c.attrs
        return c.out.elements * (c.has(index) + fused + extra)

    return rule


def _cell_ops(c: Call) -> int:
    # [seq, dirs, batch, hidden]; every gate adds two biases when there are any.
    bias = c.at(1).shape[1] * c.at(0).shape[0] * c.at(0).shape[1] * c.at(1).shape[0]
    hidden = c.at(0).shape[0] * c.at(0).shape[1] * c.at(2).shape[0] * c.at(2).shape[2]
    return recurrent(c.op.lower()) * hidden + (2 * bias if c.has(3) else 0)


def _scores(c: Call) -> int:
    """Scale, soft-max and mask of the score matrix."""
    packed = c.op == "com.microsoft:Attention"
    key, past = (0, 4) if packed else (1, 4 if c.op == "Attention" else 6)
    heads = int(c.attrs.get("q_num_heads") or c.attrs.get("num_heads") or c.at(0).shape[1])
    rows = c.at(0).shape[0] * heads * c.at(0).shape[-2]
    return rows * _keys(c, key, past) * (SOFTMAX + 2)


_MOVES = (
    "Reshape Flatten Squeeze Unsqueeze Identity Transpose Concat Split Slice Gather GatherElements"
    " GatherND Pad Expand Tile DepthToSpace SpaceToDepth Shape Size ConstantOfShape Dropout Range"
    " Scatter ScatterElements ScatterND Trilu EyeLike OneHot ReverseSequence CenterCropPad"
    " TensorScatter If Loop Scan"
)
_ONES = (
    "Abs Acos Acosh Add And Asin Asinh Atan Atanh BitShift BitwiseAnd BitwiseNot"
    " BitwiseOr BitwiseXor Cast CastLike Ceil Clip Cos Cosh Div Equal Erf Exp Floor Greater"
    " GreaterOrEqual IsInf IsNaN LeakyRelu Less LessOrEqual Log Mod Mul Neg Not Or PRelu Pow"
    " Reciprocal Relu Round Shrink Sign Sin Sinh Softsign Sqrt Sub Tan Tanh ThresholdedRelu"
    " Where Xor BitCast Bernoulli RandomNormal RandomNormalLike RandomUniform RandomUniformLike"
)
_REDUCE = (
    "ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd"
    " ReduceSum ReduceSumSquare GlobalAveragePool GlobalMaxPool GlobalLpPool ArgMax ArgMin TopK"
    " CumSum CumProd QLinearGlobalAveragePool"
)
_NORMS = (
    "LayerNormalization InstanceNormalization GroupNormalization MeanVarianceNormalization"
    " LpNormalization RMSNormalization SimplifiedLayerNormalization"
)

OTHER: dict[str, Rule] = {
    **dict.fromkeys(_MOVES.split(), _each(0)),
    **dict.fromkeys(_ONES.split(), _each(1)),
    **dict.fromkeys(_REDUCE.split(), _per_input(1)),
    **dict.fromkeys(_NORMS.split(), _each(NORMALIZE)),
    **dict.fromkeys(("Sum", "Max", "Min", "Mean"), _variadic),
    **dict.fromkeys(("MaxPool", "AveragePool", "LpPool", "QLinearAveragePool"), _window),
    **dict.fromkeys(("Resize", "Upsample"), _resize),
    "GridSample": _grid_sample,
    **dict.fromkeys(("LSTM", "GRU", "RNN"), _cell_ops),
    **dict.fromkeys(("Attention", "MultiHeadAttention", "com.microsoft:Attention"), _scores),
    **{
        op: _each(COMPOSITE[key])
        for op, key in {
            "Sigmoid": "sigmoid",
            "HardSigmoid": "hard_sigmoid",
            "HardSwish": "hard_swish",
            "Swish": "silu",
            "Gelu": "gelu",
            "FastGelu": "gelu",
            "QuickGelu": "gelu",
            "Mish": "mish",
            "Softplus": "softplus",
            "Elu": "elu",
            "Selu": "selu",
            "Celu": "celu",
            "LogSoftmax": "log_softmax",
        }.items()
    },
    "Softmax": _each(SOFTMAX),
    "Hardmax": _each(2),
    "BatchNormalization": _each(BATCH_NORM),
    "LRN": lambda c: c.out.elements * (3 + 2 * int(c.attrs["size"])),
    "QuantizeLinear": _each(QUANTIZE),
    "DequantizeLinear": _each(DEQUANTIZE),
    "DynamicQuantizeLinear": _per_input(QUANTIZE + 2),
    "RotaryEmbedding": _each(3),
    "BiasGelu": _each(COMPOSITE["gelu"] + 1),
    "SkipLayerNormalization": _each(NORMALIZE + 1),
    "SkipSimplifiedLayerNormalization": _each(NORMALIZE + 1),
    **dict.fromkeys(("QLinearAdd", "QLinearMul"), _each(2 * DEQUANTIZE + 1 + QUANTIZE)),
    "QLinearSigmoid": _each(DEQUANTIZE + COMPOSITE["sigmoid"] + QUANTIZE),
    "QLinearLeakyRelu": _each(DEQUANTIZE + 1 + QUANTIZE),
    "QLinearSoftmax": _each(DEQUANTIZE + SOFTMAX + QUANTIZE),
    "QLinearConcat": _each(DEQUANTIZE + QUANTIZE),
    **dict.fromkeys(("Conv", "ConvTranspose", "Gemm", "FusedConv", "FusedGemm"), _bias(2)),
    "DeformConv": _bias(3, interpolation("linear", 2)),
    "QLinearConv": _bias(8, QUANTIZE),
    "QGemm": _bias(6, QUANTIZE),
    "QLinearMatMul": _each(QUANTIZE),
    **dict.fromkeys(("MatMul", "FusedMatMul", "Einsum"), _each(0)),
    **dict.fromkeys(("MatMulInteger", "ConvInteger"), _each(0)),
    "MatMulNBits": _bias(5),
    "MatMulIntegerToFloat": _bias(6, 1),
    "DynamicQuantizeMatMul": _bias(4, 1 + QUANTIZE),
}
