"""Standard stand-ins for ONNX Runtime's own operators, for shape inference only.

ONNX's shape inference knows no `com.microsoft` operator and gives up behind the first one. Each
stand-in has the same output shape and type, not the same values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from onnx import NodeProto, TensorProto, helper

CONTRIB = "com.microsoft"

_LIKE_FIRST = frozenset(
    {
        "BiasGelu", "FastGelu", "Gelu", "QuickGelu", "RotaryEmbedding",
        "SimplifiedLayerNormalization", "SkipLayerNormalization",
        "SkipSimplifiedLayerNormalization", "QLinearSigmoid", "QLinearLeakyRelu",
        "QLinearSoftmax",
    }
)  # fmt: skip
_FUSED_ATTRIBUTES = frozenset({"activation", "activation_params", "activation_alpha"})


def attributes(node: NodeProto) -> dict[str, Any]:
    """A node's attributes as Python values (text decoded)."""
    found = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    return {k: v.decode() if isinstance(v, bytes) else v for k, v in found.items()}


def is_contrib(node: NodeProto) -> bool:
    """Whether the operator is ONNX Runtime's, also where it poses as a standard one."""
    return node.domain == CONTRIB or (
        node.domain == "" and node.op_type == "SimplifiedLayerNormalization"
    )


def surrogate(node: NodeProto, stored: Mapping[str, tuple[int, ...]]) -> list[NodeProto] | None:
    """Standard nodes with the same outputs, or None for a node that needs or has none.

    `stored` holds the shapes of the graph's initializers.
    """
    if not is_contrib(node):
        return None
    if node.op_type in _LIKE_FIRST:
        return [_node("Identity", [node.input[0]], o) for o in (node.output[0], *node.output[3:])]
    if node.op_type == "Attention":
        return _attention(node, stored)
    make = _MAKERS.get(node.op_type)
    return make(node) if make else None


def _node(op: str, inputs: list[str], output: str, **attrs: Any) -> NodeProto:
    return helper.make_node(op, inputs, [output], **attrs)


def _renamed(op: str) -> Callable[[NodeProto], list[NodeProto]]:
    def make(node: NodeProto) -> list[NodeProto]:
        attrs = {k: v for k, v in attributes(node).items() if k not in _FUSED_ATTRIBUTES}
        return [_node(op, list(node.input[:3]), node.output[0], **attrs)]

    return make


def _fused_matmul(node: NodeProto) -> list[NodeProto] | None:
    attrs = attributes(node)
    if attrs.get("transBatchA") or attrs.get("transBatchB"):
        return None
    left = "...km" if attrs.get("transA") else "...mk"
    right = "...nk" if attrs.get("transB") else "...kn"
    return [
        _node("Einsum", list(node.input[:2]), node.output[0], equation=f"{left},{right}->...mn")
    ]


def _qgemm(node: NodeProto) -> list[NodeProto]:
    attrs = {k: v for k, v in attributes(node).items() if k in ("transA", "transB")}
    product = f"{node.output[0]}/product"
    quantized = len(node.input) > 7 and node.input[7] != ""
    last = (
        _node("CastLike", [product, node.input[8]], node.output[0])
        if quantized and len(node.input) > 8
        else _node("Cast", [product], node.output[0], to=TensorProto.FLOAT)
    )
    return [_node("Gemm", [node.input[0], node.input[3]], product, **attrs), last]


def _attention(node: NodeProto, stored: Mapping[str, tuple[int, ...]]) -> list[NodeProto] | None:
    weight = stored.get(node.input[1])
    if weight is None or len([o for o in node.output if o]) > 1:
        return None
    sizes = attributes(node).get("qkv_hidden_sizes") or [weight[1] // 3] * 3
    return _dense(node, weight[0], sizes[2])


def _dense(node: NodeProto, rows: int, width: int) -> list[NodeProto]:
    """input[..., rows] times a made-up [rows, width]."""
    shape, weight = f"{node.output[0]}/shape", f"{node.output[0]}/weight"
    value = helper.make_tensor("value", TensorProto.FLOAT, [1], [0.0])
    made = helper.make_tensor(shape, TensorProto.INT64, [2], [rows, width])
    return [
        _node("Constant", [], shape, value=made),
        _node("ConstantOfShape", [shape], weight, value=value),
        _node("MatMul", [node.input[0], weight], node.output[0]),
    ]


def _nbits(node: NodeProto) -> list[NodeProto]:
    attrs = attributes(node)
    return _dense(node, attrs["K"], attrs["N"])


def _integer_to_float(node: NodeProto) -> list[NodeProto]:
    return [_node("MatMul", list(node.input[:2]), f"{node.output[0]}/product"),
            _node("Cast", [f"{node.output[0]}/product"], node.output[0], to=TensorProto.FLOAT),
            ]  # fmt: skip


def _multi_head(node: NodeProto) -> list[NodeProto] | None:
    if len(node.input) < 3 or not node.input[2] or len([o for o in node.output if o]) > 1:
        return None
    return [_node("Einsum", [node.input[0], node.input[2]], node.output[0],
                  equation="blh,bkv->blv")]  # fmt: skip


def _q_binary(op: str) -> Callable[[NodeProto], list[NodeProto]]:
    return lambda node: [_node(op, [node.input[0], node.input[3]], node.output[0])]


def _q_pool(op: str) -> Callable[[NodeProto], list[NodeProto] | None]:
    def make(node: NodeProto) -> list[NodeProto] | None:
        attrs = attributes(node)
        if attrs.pop("channels_last", 0):
            return None
        return [_node(op, [node.input[0]], node.output[0], **attrs)]

    return make


def _q_concat(node: NodeProto) -> list[NodeProto]:
    return [_node("Concat", list(node.input[2::3]), node.output[0], **attributes(node))]


_MAKERS: dict[str, Callable[[NodeProto], list[NodeProto] | None]] = {
    "FusedConv": _renamed("Conv"),
    "FusedGemm": _renamed("Gemm"),
    "QuantizeLinear": _renamed("QuantizeLinear"),
    "DequantizeLinear": _renamed("DequantizeLinear"),
    "FusedMatMul": _fused_matmul,
    "QGemm": _qgemm,
    "MatMulNBits": _nbits,
    "MatMulIntegerToFloat": _integer_to_float,
    "DynamicQuantizeMatMul": _integer_to_float,
    "MultiHeadAttention": _multi_head,
    "QLinearAdd": _q_binary("Add"),
    "QLinearMul": _q_binary("Mul"),
    "QLinearGlobalAveragePool": _q_pool("GlobalAveragePool"),
    "QLinearAveragePool": _q_pool("AveragePool"),
    "QLinearConcat": _q_concat,
}
