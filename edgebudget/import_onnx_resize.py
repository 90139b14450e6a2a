"""Import rules of Resize: what torch interpolates natively, and any nearest neighbour."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from edgebudget.import_onnx_call import Call, Op, Rule

_LINEAR: Mapping[int, str] = {3: "linear", 4: "bilinear", 5: "trilinear"}
_CUBIC = -0.75  # the only coefficient that torch knows
_HALF = frozenset({"half_pixel", "pytorch_half_pixel"})


def _resize(call: Call) -> Op:
    source, wanted = call.shape(), call.out_shape()
    if source == wanted:
        return call.op(lambda x: x, 1)
    if source[:2] != wanted[:2] or not 3 <= len(source) <= 5:
        raise call.refuse(f"resizes {source} to {wanted}", "resize the axes of a picture only")
    if call.whole("antialias", 0) or call.text("coordinate_transformation_mode", "") == (
        "tf_crop_and_resize"
    ):
        raise call.refuse("smooths or crops while it resizes")
    mode = call.text("mode", "nearest")
    how = call.text("coordinate_transformation_mode", "half_pixel")
    if call.node.op_type == "Upsample":
        how = "asymmetric"
    if mode == "nearest":
        return _nearest(call, how)
    if how not in _HALF and how != "align_corners":
        raise call.refuse(f"interpolates by {mode} with {how!r} coordinates", "use 'half_pixel'")
    if how == "pytorch_half_pixel" and 1 in wanted[2:]:
        raise call.refuse("makes a picture one pixel wide", "use 'half_pixel'")
    if mode == "linear":
        kind = _LINEAR[len(source)]
    elif len(source) == 4 and call.number("cubic_coeff_a", _CUBIC) == _CUBIC:
        kind = "bicubic"
        if call.whole("exclude_outside", 0):
            raise call.refuse("leaves pixels outside the picture out of its sums")
    else:
        raise call.refuse(f"interpolates by {mode} in a way torch does not")
    scales = _scales(call)
    align = how == "align_corners"
    if align or scales is None:
        size = wanted[2:]
        return call.op(lambda x: F.interpolate(x, size, mode=kind, align_corners=align), 1)

    # With scales whose product is no whole number, both place pixels by the scale itself.
    def run(x: Tensor) -> Tensor:
        found = F.interpolate(
            x, scale_factor=scales, mode=kind, align_corners=False, recompute_scale_factor=False
        )
        if tuple(found.shape[1:]) != wanted[1:]:
            raise call.refuse(f"makes {wanted} in ONNX and {tuple(found.shape)} in torch")
        return found

    return call.op(run, 1)


def _scales(call: Call) -> list[float] | None:
    """Scales of the picture's axes where they, not sizes, were given and are not whole."""
    index = 1 if call.node.op_type == "Upsample" else 2
    found = call.constant(index) if call.has(index) else None
    if found is None or found.numel() == 0:
        return None
    scales = [float(s) for s in found.tolist()[-(call.rank() - 2) :]]
    pairs = zip(call.out_shape()[2:], call.shape()[2:], strict=True)
    exact = all(
        math.isclose(s, o / i, rel_tol=1e-6) for s, (o, i) in zip(scales, pairs, strict=True)
    )
    return None if exact else scales


_ROUND: Mapping[str, Callable[[Tensor], Tensor]] = {
    "floor": torch.floor,
    "ceil": torch.ceil,
    "round_prefer_floor": lambda x: torch.ceil(x - 0.5),
    "round_prefer_ceil": lambda x: torch.floor(x + 0.5),
}


def _nearest(call: Call, how: str) -> Op:
    """Each axis by the list of pixels it takes; torch's own form where that takes the same."""
    source, wanted = call.shape(), call.out_shape()
    rounding = _ROUND[call.text("nearest_mode", "round_prefer_floor")]
    if call.node.op_type == "Upsample":
        rounding = torch.floor
    factors = _scales(call)
    lists = []
    for i, (old, new) in enumerate(zip(source[2:], wanted[2:], strict=True)):
        scale = factors[i] if factors else new / old
        taken = rounding(_places(how, old, new, scale)).clamp(0, old - 1).to(torch.int64)
        lists.append(taken)
    size = wanted[2:]
    plain = [(torch.arange(n) * o) // n for o, n in zip(source[2:], size, strict=True)]
    if all(torch.equal(a, b) for a, b in zip(lists, plain, strict=True)):
        return call.op(lambda x: F.interpolate(x, size, mode="nearest"), 1)
    names = [
        call.scope.stored(f"{call.node.name}.pixels{i}", taken) for i, taken in enumerate(lists)
    ]

    def run(x: Tensor, *pixels: Tensor) -> Tensor:
        for axis, taken in enumerate(pixels):
            x = x.index_select(axis + 2, taken)
        return x

    return Op(run, (call.inputs[0], *names))


def _places(how: str, old: int, new: int, scale: float) -> Tensor:
    """Where each new pixel lies among the old ones."""
    at = torch.arange(new, dtype=torch.float64)
    if how == "asymmetric":
        return at / scale
    if how == "align_corners":
        return at * ((old - 1) / (new - 1)) if new > 1 else torch.zeros_like(at)
    if how == "pytorch_half_pixel" and new == 1:
        return torch.zeros_like(at)
    return (at + 0.5) / scale - 0.5


RESIZE: Mapping[str, Rule] = {"Resize": _resize, "Upsample": _resize}
