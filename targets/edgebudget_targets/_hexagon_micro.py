"""Small quantized networks whose estimates teach the Hexagon cost model what kernels cost.

Weights and ranges are made up: the vendor's estimate depends on shapes and types alone.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx

    from edgebudget.workload import Array

SUITE = 2  # raise when the networks below change: kept estimates are of one suite
_SCALE, _ZERO = 0.02, 0


@dataclass
class Micro:
    """Writes one quantized network layer by layer; values are (name, channels, height, width)."""

    shape: tuple[int, int, int]
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: list[onnx.TensorProto] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._rng = np.random.default_rng(0)
        self._tensor("s", np.float32(_SCALE))
        self._tensor("z", np.uint8(_ZERO))
        self.x = self._rounded("x")
        self.c, self.h, self.w = self.shape

    def conv(self, out: int, kernel: int = 3, stride: int = 1, *, depthwise: bool = False) -> Micro:
        """A convolution with padding; its ReLU is the rounding itself, as in what we compile."""
        groups = self.c if depthwise else 1
        out = self.c if depthwise else out
        weight = self._weight((out, self.c // groups, kernel, kernel))
        bias = self._bias(out)
        y = self._node(
            "Conv", [self.x, weight, bias], group=groups,
            pads=[kernel // 2] * 4, strides=[stride] * 2,
        )  # fmt: skip
        self.c = out
        self.h, self.w = ((n - 1) // stride + 1 for n in (self.h, self.w))
        self.x = self._rounded(y)
        return self

    def add(self, other: str) -> Micro:
        """A residual sum with an earlier value of the same shape."""
        self.x = self._rounded(self._node("Add", [self.x, other]))
        return self

    def halve(self, channels: int) -> Micro:
        """Every second pixel, then zero channels up to `channels`: a shortcut without weights."""
        ends = [self._ints(v) for v in ([0, 0], [self.h, self.w], [2, 3], [2, 2])]
        self.x = self._rounded(self._node("Slice", [self.x, *ends]))
        self.h, self.w = (self.h + 1) // 2, (self.w + 1) // 2
        if channels > self.c:
            more = channels - self.c
            room = self._ints([0, more // 2, 0, 0, 0, more - more // 2, 0, 0])
            self.x = self._rounded(self._node("Pad", [self.x, room]))
            self.c = channels
        return self

    def join(self, other: str, channels: int) -> Micro:
        """Concatenated with an earlier value of so many channels."""
        self.x = self._rounded(self._node("Concat", [self.x, other], axis=1))
        self.c += channels
        return self

    def enlarge(self) -> Micro:
        """Twice the height and width, by nearest neighbour."""
        scales = self._tensor(f"r{len(self.weights)}", np.array([1, 1, 2, 2], np.float32))
        place = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        y = self._node("Resize", [self.x, "", scales], mode="nearest", **place)
        self.h, self.w = 2 * self.h, 2 * self.w
        self.x = self._rounded(y)
        return self

    def shrink(self, height: int, width: int) -> Micro:
        """To another size, bilinear: what `scale_resolution` puts before a network."""
        sizes = self._ints([1, self.c, height, width])
        place = {"coordinate_transformation_mode": "half_pixel", "nearest_mode": "floor"}
        y = self._node("Resize", [self.x, "", "", sizes], mode="linear", **place)
        self.h, self.w = height, width
        self.x = self._rounded(y)
        return self

    def apply(self, op: str) -> Micro:
        """An operator of one input that keeps the shape."""
        self.x = self._rounded(self._node(op, [self.x]))
        return self

    def pool(self, op: str = "MaxPool") -> Micro:
        """2x2 pooling, or to one pixel for GlobalAveragePool."""
        if op.startswith("Global"):
            y = self._node(op, [self.x])
            self.h = self.w = 1
        else:
            y = self._node(op, [self.x], kernel_shape=[2, 2], strides=[2, 2])
            self.h, self.w = self.h // 2, self.w // 2
        self.x = self._rounded(y)
        return self

    def linear(self, out: int) -> Micro:
        """A matrix of weights on the flattened value."""
        flat = self._rounded(self._node("Flatten", [self.x]))
        weight, bias = self._weight((out, self.c * self.h * self.w)), self._bias(out)
        self.x = self._rounded(self._node("Gemm", [flat, weight, bias], transB=1))
        self.c, self.h, self.w = out, 1, 1
        return self

    def model(self) -> onnx.ModelProto:
        """The finished network, input `x` and output `y` in float."""
        from onnx import TensorProto, helper

        self.nodes[-1].output[0] = "y"
        graph = helper.make_graph(
            self.nodes,
            "micro",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, *self.shape])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, self._out_shape())],
            self.weights,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)

    def _out_shape(self) -> list[int]:
        return [1, self.c] if self.nodes[-3].op_type == "Gemm" else [1, self.c, self.h, self.w]

    def _tensor(self, name: str, value: Array | np.generic) -> str:
        from onnx import numpy_helper

        self.weights.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def _node(self, op: str, inputs: list[str], **attributes: Any) -> str:
        from onnx import helper

        name = f"{op}{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [f"{name}_out"], name, **attributes))
        return f"{name}_out"

    def _rounded(self, name: str) -> str:
        stored = self._node("QuantizeLinear", [name, "s", "z"])
        return self._node("DequantizeLinear", [stored, "s", "z"])

    def _ints(self, values: list[int]) -> str:
        return self._tensor(f"i{len(self.weights)}", np.array(values, np.int64))

    def _weight(self, shape: tuple[int, ...]) -> str:
        at = f"w{len(self.weights)}"
        self._tensor(at, self._rng.integers(-127, 128, shape, dtype=np.int8))
        self._tensor(f"{at}s", np.full(shape[0], 0.01, np.float32))
        self._tensor(f"{at}z", np.zeros(shape[0], np.int8))
        return self._node("DequantizeLinear", [at, f"{at}s", f"{at}z"], axis=0)

    def _bias(self, size: int) -> str:
        at = f"b{len(self.weights)}"
        self._tensor(at, np.zeros(size, np.int32))
        self._tensor(f"{at}s", np.full(size, 0.01 * _SCALE, np.float32))
        return self._node("DequantizeLinear", [at, f"{at}s"], axis=0)


def networks(seed: int = 0) -> Iterator[tuple[str, Micro]]:
    """Names and networks: chains of one kind of kernel, and random mixtures of kinds.

    All take one to four planes, as real networks do: what crosses the edge with many channels
    costs this NPU far more than what is inside.
    """
    dice = random.Random(seed)
    for size, c in ((4, 16), (8, 64), (8, 256), (16, 32), (16, 160), (32, 16), (32, 64),
                    (56, 24), (56, 128), (112, 32), (160, 16)):  # fmt: skip
        for kind in ("dense3", "dense1", "depthwise3"):
            for depth in (2, dice.choice((6, 10, 14))):
                net = Micro((3, size, size)).conv(c, 1)
                for _ in range(depth):
                    net.conv(c, int(kind[-1]), depthwise=kind.startswith("depth"))
                yield f"{kind}-{size}-{c}-x{depth}", net
    for size, c in ((8, 64), (16, 32), (32, 32), (56, 64), (112, 16)):
        for op in (
            "Add",
            "HardSwish",
            "Sigmoid",
            "MaxPool",
            "AveragePool",
            "Slice",
            "Concat",
            "Resize",
        ):
            net = Micro((3, size, size)).conv(c)
            for _ in range(3):
                _then(net, op, c)
            yield f"{op}-{size}-{c}", net
    for width in (64, 256, 1024, 2048):
        net = Micro((3, 8, 8)).conv(width, 1, 2).pool("GlobalAveragePool")
        yield f"linear-{width}", net.linear(width).linear(1000)
    for size in (96, 128, 160, 192, 224):
        for part in (0.3, 0.45, 0.6, 0.75, 0.9):
            to = round(size * part / 8) * 8
            net = Micro((3, size, size))
            if part < 0.5:
                net.pool("AveragePool")
            yield f"shrink-{size}-{to}", net.shrink(to, to).conv(16, 3, 2)
    for number in range(150):
        yield f"mixed-{number}", _mixed(dice)


def _then(net: Micro, op: str, c: int) -> None:
    """A convolution to `c` channels, then the operator."""
    first = net.x
    net.conv(c)
    if op == "Add":
        net.add(first)
    elif op == "Concat":
        net.join(first, c).conv(c, 1)
    elif op == "Slice" and net.h > 1:
        net.halve(2 * net.c)
    elif op == "Resize" and net.h < 64:
        net.enlarge()
    elif op in ("Slice", "Resize"):
        return
    elif not op.endswith("Pool"):
        net.apply(op)
    elif net.h > 1:
        net.pool(op)


def _mixed(dice: random.Random) -> Micro:
    """A classifier-like network: a stem, stages of one kind of block each, pooling, a linear."""
    size = dice.choice((32, 48, 64, 96, 128, 160, 192, 224))
    width = dice.choice((8, 16, 24, 32, 48, 64))
    net = Micro((dice.choice((1, 3, 3, 4)), size, size)).conv(width, 3, 2 if size > 48 else 1)
    function = dice.choice(("", "", "HardSwish"))
    for stage in range(dice.choice((2, 3, 4, 5))):
        if net.h < 4:
            break
        out = min(512, round(net.c * dice.choice((1, 1.5, 2))))
        kind = dice.choice(("residual", "shortcut", "inverted", "plain", "separable"))
        for block in range(dice.choice((1, 2, 3, 5))):
            _block(net, kind, out, 2 if block == 0 and stage > 0 else 1, dice)
        if function:
            net.apply(function)
    return net.pool("GlobalAveragePool").linear(dice.choice((10, 100, 1000)))


def _block(net: Micro, kind: str, out: int, stride: int, dice: random.Random) -> None:
    start = (net.x, net.c, net.h, net.w)
    first, same = net.x, stride == 1 and net.c == out
    if kind == "residual":
        net.conv(out, 3, stride).conv(out, 3)
    elif kind == "shortcut":
        net.conv(out, 3, stride).conv(out, 3)
        if stride == 2:
            inside = net.x, net.c, net.h, net.w
            net.x, net.c, net.h, net.w = start
            side = net.halve(out).x
            net.x, net.c, net.h, net.w = inside
            net.add(side)
    elif kind == "inverted":
        net.conv(net.c * dice.choice((2, 4, 6)), 1)
        net.conv(0, dice.choice((3, 5)), stride, depthwise=True).conv(out, 1)
    elif kind == "separable":
        net.conv(0, 3, stride, depthwise=True).conv(out, 1)
    else:
        net.conv(out, dice.choice((1, 3, 5)), stride)
    if same and kind in ("residual", "shortcut", "inverted"):
        net.add(first)
