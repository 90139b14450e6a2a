"""Cost of single ATen operators; shapes only, no torch needed."""

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
    Shape,
    einsum_macs,
    interpolation,
    recurrent,
)


@dataclass(frozen=True, slots=True)
class AtenCall:
    """One ATen call: every tensor among its arguments replaced by its shape.

    A list of tensors becomes a list of shapes; scalars stay; defaults are not filled in.
    """

    args: Sequence[Any]
    out: Shape

    def shape(self, index: int) -> Shape:
        """The shape of a tensor argument that must be there."""
        found: Shape = self.args[index]
        return found

    def has(self, index: int) -> bool:
        """Whether an optional argument was given."""
        return index < len(self.args) and self.args[index] is not None

    @property
    def elements(self) -> int:
        """Elements of the (first) output."""
        return math.prod(self.out)


Rule = Callable[[AtenCall], int]


def _conv(c: AtenCall) -> int:
    return c.elements * math.prod(c.shape(1)[1:])


def _conv_transpose(c: AtenCall) -> int:
    return math.prod(c.shape(0)) * math.prod(c.shape(1)[1:])


def _convolution(c: AtenCall) -> int:
    return _conv_transpose(c) if c.args[6] else _conv(c)


def _product(left: int) -> Rule:
    """A matrix product whose left operand is argument `left`."""
    return lambda c: c.elements * c.shape(left)[-1]


def _sum_of_products(c: AtenCall) -> int:
    return math.prod(c.shape(1)) * c.shape(2)[-1]


def _einsum(c: AtenCall) -> int:
    return einsum_macs(c.args[0], c.args[1])


def _attention(c: AtenCall) -> int:
    """Query times keys, then scores times values; fewer key heads are shared, not skipped."""
    return (math.prod(c.shape(0)) + c.elements) * c.shape(1)[-2]


def _recurrent(c: AtenCall) -> int:
    steps = math.prod(c.shape(0)[:-1])
    weights: list[Shape] = [w for w in c.args[2] if len(w) == 2]
    return steps * sum(math.prod(w) for w in weights)


def _cell(c: AtenCall) -> int:
    return math.prod(c.shape(0)[:-1]) * (math.prod(c.shape(2)) + math.prod(c.shape(3)))


MACS: dict[str, Rule] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _conv),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _conv_transpose),
    **dict.fromkeys(("convolution", "_convolution"), _convolution),
    **dict.fromkeys(("linear", "mm", "bmm", "matmul", "mv", "dot", "vdot", "inner"), _product(0)),
    **dict.fromkeys(("addmm", "baddbmm", "addmv"), _product(1)),
    "addbmm": _sum_of_products,
    "einsum": _einsum,
    "scaled_dot_product_attention": _attention,
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), _recurrent),
    **dict.fromkeys(("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"), _cell),
}


def _each(ops: int) -> Rule:
    return lambda c: ops * c.elements


def _per_input(ops: int) -> Rule:
    return lambda c: ops * math.prod(c.shape(0))


def _bias(index: int) -> Rule:
    return lambda c: c.elements * c.has(index)


def _window(spatial: int) -> Rule:
    def rule(c: AtenCall) -> int:
        size = c.args[1] if isinstance(c.args[1], (list, tuple)) else [c.args[1]]
        return c.elements * math.prod(size if len(size) > 1 else [*size] * spatial)

    return rule


def _interpolation(mode: str, spatial: int) -> Rule:
    return lambda c: c.elements * interpolation(mode, spatial)


def _cell_ops(kind: str) -> Rule:
    """Element-wise work of a recurrent layer; gates with a bias add it twice."""

    def rule(c: AtenCall) -> int:
        steps = math.prod(c.shape(0)[:-1])
        tensors: list[Shape] = c.args[2]
        hidden = sum(w[-1] for w in [w for w in tensors if len(w) == 2][1::2])
        biases = sum(w[0] for w in tensors if len(w) == 1)
        return steps * (recurrent(kind) * hidden + biases)

    return rule


_MOVES = (
    "view reshape _unsafe_view transpose permute t mT numpy_T swapaxes movedim moveaxis expand"
    " expand_as view_as reshape_as slice select narrow squeeze unsqueeze cat concat stack hstack"
    " vstack split split_with_sizes chunk tensor_split unbind clone contiguous alias detach"
    " detach_ _to_copy to type_as unfold pixel_shuffle pixel_unshuffle channel_shuffle roll flip"
    " pad constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d"
    " replication_pad2d replication_pad3d index index_select gather scatter embedding repeat"
    " repeat_interleave tile arange zeros ones full empty zeros_like ones_like full_like"
    " empty_like new_zeros new_ones new_full new_empty scalar_tensor eye tril triu lift_fresh_copy"
    " lift_fresh dropout dropout_ feature_dropout alpha_dropout native_dropout flatten unflatten"
    " meshgrid diagonal broadcast_to index_put slice_scatter select_scatter copy copy_ fill fill_"
    " zero_ one_hot _assert_tensor_metadata _assert_scalar _assert_async rot90 im2col atleast_1d"
    " atleast_2d atleast_3d unsafe_split unsafe_chunk as_strided select_copy"
)
_ONES = "outer ger prelu diff lerp clamp_ relu_ where masked_fill rrelu cumsum"
_REDUCE = (
    "sum mean amax amin max min argmax argmin prod any all norm linalg_vector_norm logsumexp"
    " cumprod topk sort argsort adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d"
    " adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d median mode count_nonzero"
)
_NORMS = "layer_norm group_norm instance_norm rms_norm native_layer_norm native_group_norm"
_FAKE = (
    "fake_quantize_per_tensor_affine fake_quantize_per_channel_affine"
    " _fake_quantize_per_tensor_affine_cachemask_tensor_qparams"
)

OTHER: dict[str, Rule] = {
    **dict.fromkeys(_MOVES.split(), _each(0)),
    **dict.fromkeys(_ONES.split(), _each(1)),
    **dict.fromkeys(_REDUCE.split(), _per_input(1)),
    **dict.fromkeys(("var", "std", "var_mean", "std_mean"), _per_input(3)),
    **dict.fromkeys(_NORMS.split(), _each(NORMALIZE)),
    **dict.fromkeys(("softmax", "_softmax"), _each(SOFTMAX)),
    **dict.fromkeys(_FAKE.split(), _each(QUANTIZE + DEQUANTIZE)),
    **{name: _each(ops) for name, ops in COMPOSITE.items()},
    "_log_softmax": _each(COMPOSITE["log_softmax"]),
    "hardsigmoid": _each(COMPOSITE["hard_sigmoid"]),
    "hardswish": _each(COMPOSITE["hard_swish"]),
    "glu": _each(COMPOSITE["sigmoid"] + 1),
    **dict.fromkeys(
        ("batch_norm", "_native_batch_norm_legit_no_training", "native_batch_norm"),
        _each(BATCH_NORM),
    ),
    **{f"{kind}_pool{d}d": _window(d) for kind in ("max", "avg") for d in (1, 2, 3)},
    **{f"max_pool{d}d_with_indices": _window(d) for d in (2, 3)},
    **{f"upsample_nearest{d}d": _each(0) for d in (1, 2, 3)},
    **{f"_upsample_nearest_exact{d}d": _each(0) for d in (1, 2, 3)},
    "upsample_linear1d": _interpolation("linear", 1),
    "upsample_bilinear2d": _interpolation("linear", 2),
    "_upsample_bilinear2d_aa": _interpolation("linear", 2),
    "upsample_trilinear3d": _interpolation("linear", 3),
    "upsample_bicubic2d": _interpolation("cubic", 2),
    "_upsample_bicubic2d_aa": _interpolation("cubic", 2),
    "grid_sampler": _interpolation("linear", 2),
    "grid_sampler_2d": _interpolation("linear", 2),
    **dict.fromkeys([n for n in MACS if n.startswith("conv")], _bias(2)),
    **dict.fromkeys(("convolution", "_convolution", "linear"), _bias(2)),
    **dict.fromkeys(("mm", "bmm", "matmul", "mv", "dot", "vdot", "inner", "einsum"), _each(0)),
    **dict.fromkeys(("addmm", "baddbmm", "addmv", "addbmm"), _each(1)),
    "scaled_dot_product_attention": lambda c: (
        math.prod(c.shape(0)[:-1]) * c.shape(1)[-2] * (SOFTMAX + 1 + c.has(3))
    ),
    **{n: _cell_ops(n.partition("_")[0]) for n in ("lstm", "gru", "rnn_tanh", "rnn_relu")},
    **{
        f"{n}_cell": _each(recurrent(n.partition("_")[0]))
        for n in ("lstm", "gru", "rnn_tanh", "rnn_relu")
    },
}
