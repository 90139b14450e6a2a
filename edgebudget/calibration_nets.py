"""Small random networks whose kernels a calibration times: blocks as networks use them, any size.

Each is a short chain, so that a kernel reads what another has just written, as in a real network.
The same number gives the same network. Imports onnx: reach this module inside functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgebudget import graph

if TYPE_CHECKING:
    from edgebudget.workload import Array

_MOST_MACS = 3e8  # of one network
_MOST_VALUES = 2e6  # of one activation
_ACTIVATIONS = ("Relu", "Relu", "Relu", "Clip", "HardSwish", "Silu", "Sigmoid", "LeakyRelu",
                "Gelu", "Tanh", "Elu", "HardSigmoid")  # fmt: skip


class Net:
    """A graph under construction; methods add an operator and return its output's name."""

    def __init__(self, rng: np.random.Generator, shape: tuple[int, ...]) -> None:
        self.rng, self.nodes, self.weights = rng, list[onnx.NodeProto](), list[onnx.TensorProto]()
        self.shapes: dict[str, tuple[int, ...]] = {"x": shape}
        self.macs = 0.0

    def op(self, kind: str, inputs: list[str], shape: tuple[int, ...], **attributes: Any) -> str:
        name = f"n{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], f"{name}/{kind}", **attributes))
        self.shapes[name] = shape
        return name

    def weight(self, value: Array) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(value, name))
        return name

    def random(self, *shape: int) -> str:
        scale = 1.0 / math.sqrt(max(1, math.prod(shape[1:])))
        return self.weight((self.rng.standard_normal(shape) * scale).astype(np.float32))

    def conv(
        self, x: str, cout: int, size: int = 3, stride: int = 1, groups: int = 1, uneven: int = 0
    ) -> str:
        """A convolution; `uneven` pads go from the near edges to the far ones, as TensorFlow's."""
        _, cin, high, wide = self.shapes[x]
        pad = (size - 1) // 2
        out = [(n + 2 * pad - size) // stride + 1 for n in (high, wide)]
        self.macs += cout * math.prod(out) * cin // groups * size * size
        inputs = [x, self.random(cout, cin // groups, size, size), self.random(cout)]
        return self.op(
            "Conv", inputs, (1, cout, *out),
            pads=[pad - uneven] * 2 + [pad + uneven] * 2, strides=[stride] * 2, group=groups,
            kernel_shape=[size] * 2,
        )  # fmt: skip

    def act(self, x: str, kind: str) -> str:
        shape = self.shapes[x]
        if kind == "Clip":
            low, high = (self.weight(np.array(v, np.float32)) for v in (0.0, 6.0))
            return self.op("Clip", [x, low, high], shape)
        if kind == "Silu":
            return self.op("Mul", [x, self.op("Sigmoid", [x], shape)], shape)
        return self.op(kind, [x], shape)

    def add(self, a: str, b: str, kind: str = "Add") -> str:
        return self.op(kind, [a, b], self.shapes[a])

    def pool(self, x: str, kind: str, size: int, stride: int) -> str:
        n, c, high, wide = self.shapes[x]
        pad = (size - 1) // 2
        out = [(v + 2 * pad - size) // stride + 1 for v in (high, wide)]
        return self.op(
            kind, [x], (n, c, *out), kernel_shape=[size] * 2, strides=[stride] * 2, pads=[pad] * 4
        )

    def head(self, x: str, classes: int) -> str:
        n, c, *_ = self.shapes[x]
        flat = self.op("Flatten", [self.op("GlobalAveragePool", [x], (n, c, 1, 1))], (n, c))
        return self.linear(flat, classes, gemm=True)

    def linear(self, x: str, columns: int, *, gemm: bool = False) -> str:
        *rows, inner = self.shapes[x]
        self.macs += math.prod(rows) * inner * columns
        if gemm:
            inputs = [x, self.random(columns, inner), self.random(columns)]
            return self.op("Gemm", inputs, (*rows, columns), transB=1)
        product = self.op("MatMul", [x, self.random(inner, columns)], (*rows, columns))
        return self.op("Add", [product, self.random(columns)], (*rows, columns))

    def reshape(self, x: str, *shape: int) -> str:
        return self.op("Reshape", [x, self.weight(np.array(shape, np.int64))], shape)

    def turn(self, x: str, *order: int) -> str:
        shape = tuple(self.shapes[x][i] for i in order)
        return self.op("Transpose", [x], shape, perm=list(order))

    def norm(self, x: str) -> str:
        width = self.shapes[x][-1]
        one = self.weight(np.ones(width, np.float32))
        return self.op("LayerNormalization", [x, one, self.random(width)], self.shapes[x])

    def model(self, out: str) -> onnx.ModelProto:
        """The finished graph; `out` becomes its output `y`."""
        self.nodes.append(helper.make_node("Identity", [out], ["y"], "y"))
        value = helper.make_tensor_value_info
        body = helper.make_graph(
            self.nodes, "calibration",
            [value("x", TensorProto.FLOAT, self.shapes["x"])],
            [value("y", TensorProto.FLOAT, self.shapes[out])], self.weights,
        )  # fmt: skip
        opset = [helper.make_opsetid("", graph.OPSET)]
        return helper.make_model(body, opset_imports=opset, ir_version=10)


class Draw(np.random.Generator):
    """Random numbers, and how much longer the sides of pictures may be than one CPU likes."""

    times: float = 1.0


Family = Callable[[Draw], tuple[Net, str]]


def network(number: int, times: float = 1.0) -> onnx.ModelProto:
    """The calibration network of this number: blocks of one family, sizes drawn at random."""
    return drawn(FAMILIES, 20211, number, times)


def drawn(
    families: Sequence[Family], seed: int, number: int, times: float = 1.0
) -> onnx.ModelProto:
    """The network of this number among these families, small enough to be timed in a moment.

    `times`: how much longer the sides of pictures may be than one CPU likes.
    """
    rng = Draw(np.random.PCG64(np.random.SeedSequence([seed, number])))
    rng.times = times
    family = families[number % len(families)]
    for _ in range(200):
        net, out = family(rng)
        largest = max(math.prod(s) for s in net.shapes.values())
        if net.macs <= _MOST_MACS * times**2 and largest <= _MOST_VALUES * times**2:
            return net.model(out)
    raise AssertionError(f"no network {number} within the limits")


def draw_log(rng: np.random.Generator, low: float, high: float, multiple: int = 1) -> int:
    """A whole number whose logarithm is uniform, rounded to a multiple."""
    value = math.exp(rng.uniform(math.log(low), math.log(high)))
    return max(multiple, round(value / multiple) * multiple)


def draw_channels(rng: np.random.Generator, low: float, high: float) -> int:
    """Mostly multiples of 8, as pruning and designers leave them, now and then any number."""
    return draw_log(rng, low, high, int(rng.choice([8, 8, 16, 16, 16, 4, 1])))


def draw_side(rng: Draw, channels: int) -> int:
    """A picture's side that goes with so many channels: large pictures have few."""
    most = min(224.0, 6000.0 / channels) * rng.times
    return draw_log(rng, 4, max(6.0, most))


def _act(rng: Draw) -> str:
    return str(rng.choice(_ACTIVATIONS))


def _plain(rng: Draw) -> tuple[Net, str]:
    c = draw_channels(rng, 8, 384)
    net = Net(rng, (1, c, side := draw_side(rng, c), side))
    x, kind = "x", _act(rng)
    for _ in range(4):
        size = int(rng.choice([1, 3, 3, 3, 5, 7]))
        x = net.act(net.conv(x, draw_channels(rng, 8, 384), size, int(rng.choice([1, 1, 2]))), kind)
    return net, x


def _residual(rng: Draw) -> tuple[Net, str]:
    c = draw_channels(rng, 8, 512)
    net = Net(rng, (1, c, side := draw_side(rng, c), side))
    x = "x"
    for stride in (1, int(rng.choice([1, 2]))):
        out = c if stride == 1 else c * 2
        y = net.act(net.conv(x, out, 3, stride), "Relu")
        short = x if stride == 1 else net.conv(x, out, 1, 2)
        x = net.act(net.add(net.conv(y, out), short), "Relu")
        c = out
    return net, net.head(x, 10)


def _bottleneck(rng: Draw) -> tuple[Net, str]:
    c = draw_channels(rng, 16, 256)
    net = Net(rng, (1, 4 * c, side := draw_side(rng, 2 * c), side))
    x, groups = "x", int(rng.choice([1, 1, 4])) if c % 4 == 0 else 1
    for _ in range(2):
        y = net.act(net.conv(x, c, 1), "Relu")
        y = net.act(net.conv(y, c, 3, 1, groups), "Relu")
        x = net.act(net.add(net.conv(y, 4 * c, 1), x), "Relu")
    return net, x


def _inverted(rng: Draw) -> tuple[Net, str]:
    c, times = draw_channels(rng, 8, 192), int(rng.choice([1, 3, 4, 6]))
    net = Net(rng, (1, c, side := draw_side(rng, 2 * c), side))
    x, kind = "x", str(rng.choice(["Relu", "Clip", "HardSwish", "Silu", "Clip"]))
    for stride in (1, int(rng.choice([1, 2]))):
        out = c if stride == 1 else draw_channels(rng, 8, 256)
        y = net.act(net.conv(x, c * times, 1), kind)
        size = int(rng.choice([3, 3, 5, 7]))
        y = net.act(net.conv(y, c * times, size, stride, c * times), kind)
        if rng.random() < 0.3:
            y = _squeeze(net, y, max(8, c * times // 4), rng)
        y = net.conv(y, out, 1)
        x, c = (net.add(y, x) if stride == 1 else y), out
    return net, x


def _squeeze(net: Net, x: str, inner: int, rng: Draw) -> str:
    """Squeeze and excitation."""
    n, c, *_ = net.shapes[x]
    y = net.op("GlobalAveragePool", [x], (n, c, 1, 1))
    y = net.act(net.conv(y, inner, 1), "Relu")
    gate = net.act(net.conv(y, c, 1), str(rng.choice(["Sigmoid", "HardSigmoid"])))
    return net.add(x, gate, "Mul")


def _gated(rng: Draw) -> tuple[Net, str]:
    c = draw_channels(rng, 16, 384)
    net = Net(rng, (1, c, side := draw_side(rng, c), side))
    x = "x"
    for _ in range(2):
        y = net.act(net.conv(x, c, int(rng.choice([1, 3]))), _act(rng))
        x = net.add(_squeeze(net, y, max(8, c // 8), rng), x)
    return net, x


def _dense(rng: Draw) -> tuple[Net, str]:
    c, growth = draw_channels(rng, 16, 256), draw_channels(rng, 8, 64)
    net = Net(rng, (1, c, side := draw_side(rng, 2 * c), side))
    x = "x"
    for _ in range(3):
        y = net.act(net.conv(net.act(x, "Relu"), 4 * growth, 1), "Relu")
        y = net.conv(y, growth)
        n, have, *rest = net.shapes[x]
        x = net.op("Concat", [x, y], (n, have + growth, *rest), axis=1)
    return net, net.pool(net.conv(x, net.shapes[x][1] // 2, 1), "AveragePool", 2, 2)


def _stem(rng: Draw) -> tuple[Net, str]:
    side = draw_log(rng, 24, 288 * rng.times, 8)
    net = Net(rng, (1, int(rng.choice([1, 3, 3, 3])), side, side))
    c = draw_channels(rng, 8, 64)
    size, stride = [(3, 1), (3, 2), (5, 2), (7, 2), (4, 4)][int(rng.integers(5))]
    x = net.act(net.conv("x", c, size, stride), _act(rng))
    if rng.random() < 0.5:
        x = net.pool(x, str(rng.choice(["MaxPool", "MaxPool", "AveragePool"])), 3, 2)
    x = net.act(net.conv(x, draw_channels(rng, 8, 96), int(rng.choice([1, 3])), 1), "Relu")
    return net, net.head(x, draw_log(rng, 10, 1000))


def _grouped(rng: Draw) -> tuple[Net, str]:
    groups = int(rng.choice([2, 4, 8, 16, 32]))
    each = int(rng.choice([4, 8, 8, 16, 32]))
    c = groups * each
    net = Net(rng, (1, c, side := draw_side(rng, c), side))
    x = "x"
    for stride in (1, int(rng.choice([1, 2]))):
        x = net.act(net.conv(x, c, 3, stride, groups), "Relu")
        x = net.act(net.conv(x, c, 1), _act(rng))
    return net, x


def _resized(rng: Draw) -> tuple[Net, str]:
    c = draw_channels(rng, 8, 192)
    net = Net(rng, (1, c, side := max(4, draw_side(rng, 4 * c)), side))
    x = net.act(net.conv("x", c), "Relu")
    scales = net.weight(np.array([1, 1, 2, 2], np.float32))
    mode = str(rng.choice(["nearest", "linear"]))
    up = net.op("Resize", [x, "", scales], (1, c, 2 * side, 2 * side), mode=mode)
    y = net.act(net.conv(up, c), _act(rng))
    x = net.op("Concat", [up, y], (1, 2 * c, 2 * side, 2 * side), axis=1)
    return net, net.pool(net.conv(x, c, 1), "MaxPool", 2, 2)


def _linears(rng: Draw) -> tuple[Net, str]:
    rows = int(rng.choice([1, 1, 1, 4, 16]))
    net = Net(rng, (rows, draw_log(rng, 16, 2048, 8)))
    x, kind = "x", _act(rng)
    for _ in range(3):
        x = net.act(net.linear(x, draw_log(rng, 16, 2048, 8), gemm=True), kind)
    return net, net.linear(x, draw_log(rng, 10, 1000), gemm=True)


def _transformer(rng: Draw) -> tuple[Net, str]:
    heads, each = int(rng.choice([2, 3, 4, 6, 8])), int(rng.choice([16, 32, 32, 64]))
    width, length = heads * each, draw_log(rng, 16, 260)
    net = Net(rng, (1, length, width))
    x = "x"
    for _ in range(2):
        y = net.norm(x)
        q, k, v = (
            net.turn(net.reshape(net.linear(y, width), 1, length, heads, each), 0, 2, 1, 3)
            for _ in range(3)
        )
        square = (1, heads, length, length)
        net.macs += 2 * heads * length * length * each
        scores = net.op("MatMul", [q, net.turn(k, 0, 1, 3, 2)], square)
        scale = net.weight(np.array(1.0 / math.sqrt(each), np.float32))
        share = net.op("Softmax", [net.op("Mul", [scores, scale], square)], square, axis=-1)
        y = net.turn(net.op("MatMul", [share, v], (1, heads, length, each)), 0, 2, 1, 3)
        x = net.add(net.linear(net.reshape(y, 1, length, width), width), x)
        y = net.act(net.linear(net.norm(x), width * int(rng.choice([2, 4]))), "Gelu")
        x = net.add(net.linear(y, width), x)
    return net, x


def _patches(rng: Draw) -> tuple[Net, str]:
    """Cutting a picture into patches, tokens, and what mixes around them."""
    size = int(rng.choice([4, 8, 16]))
    side, width = size * int(rng.choice([6, 8, 12, 14])), draw_channels(rng, 32, 256)
    net = Net(rng, (1, 3, side, side))
    grid = side // size
    weight = [net.random(width, 3, size, size), net.random(width)]
    net.macs += width * 3 * side * side
    x = net.op("Conv", ["x", *weight], (1, width, grid, grid), strides=[size] * 2,
               kernel_shape=[size] * 2)  # fmt: skip
    x = net.turn(net.reshape(x, 1, width, grid * grid), 0, 2, 1)
    x = net.op("Concat", [net.random(1, 1, width), x], (1, grid * grid + 1, width), axis=1)
    x = net.op("Add", [x, net.random(1, grid * grid + 1, width)], net.shapes[x])
    y = net.act(net.linear(net.norm(x), 2 * width), "Gelu")
    return net, net.norm(net.add(net.linear(y, width), x))


FAMILIES: tuple[Family, ...] = (
    _plain, _inverted, _residual, _stem, _bottleneck, _transformer, _gated, _plain,
    _dense, _inverted, _linears, _grouped, _resized, _residual, _patches,
)  # fmt: skip
