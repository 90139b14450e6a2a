"""Chains of one kernel, again and again, for engines that tell the time of whole runs alone.

A run over the length of its chain is the time of the kernel: what cannot be told apart in a network
of many kinds is told here, one kind or two at a time. Imports onnx: reach it inside functions.
"""

from __future__ import annotations

import math
from functools import reduce

import numpy as np
import onnx

from edgebudget.calibration_nets import Draw, Family, Net, draw_channels, draw_log, draw_side, drawn

_ACTIVATIONS = ("HardSwish", "Silu", "Sigmoid", "Gelu", "Tanh", "LeakyRelu", "Elu", "HardSigmoid")


def chain(number: int, times: float = 1.0) -> onnx.ModelProto:
    """The chain of this number; the same number gives the same chain. `times`: as of `drawn`."""
    return drawn(CHAINS, 20212, number, times)


def _picture(rng: Draw, low: float, high: float) -> tuple[Net, int]:
    """An empty network on a picture, and its channels."""
    c = draw_channels(rng, low, high)
    return Net(rng, (1, c, side := draw_side(rng, c), side)), c


def _length(rng: Draw) -> int:
    """Short and long ones, so that what a run's ends take can be told from its kernels."""
    return int(rng.choice([2, 3, 5, 8]))


def _scaled(net: Net, channels: int) -> str:
    """The cheapest layer that is quantized, and makes what follows it integer too."""
    return net.conv("x", channels, 1, 1, channels)


def _between(rng: Draw, high: float, sizes: tuple[int, ...]) -> tuple[Net, str]:
    """Convolutions to and fro between two numbers of channels."""
    net, a = _picture(rng, 8, high)
    b, size, x = draw_channels(rng, 8, high), int(rng.choice(sizes)), "x"
    for i in range(_length(rng)):
        x = net.act(net.conv(x, a if i % 2 else b, size), "Relu")
    return net, x


def _pointwise(rng: Draw) -> tuple[Net, str]:
    return _between(rng, 768, (1,))


def _full(rng: Draw) -> tuple[Net, str]:
    return _between(rng, 384, (3, 3, 3, 5, 7))


def _deep(rng: Draw) -> tuple[Net, str]:
    c = draw_channels(rng, 8, 1024)
    net = Net(rng, (1, c, side := draw_side(rng, max(1, c // 3)), side))
    size, x = int(rng.choice([3, 3, 5, 7])), "x"
    for _ in range(_length(rng)):
        x = net.act(net.conv(x, c, size, 1, c), "Clip")
    return net, x


def _grouped(rng: Draw) -> tuple[Net, str]:
    groups, each = int(rng.choice([2, 4, 8, 16, 32])), int(rng.choice([4, 8, 16, 32]))
    c = groups * each
    net, x = Net(rng, (1, c, side := draw_side(rng, c), side)), "x"
    for _ in range(_length(rng)):
        x = net.act(net.conv(x, c, 3, 1, groups), "Relu")
    return net, x


def _strided(rng: Draw) -> tuple[Net, str]:
    """Convolutions of one input beside each other: behind each other their sizes would shrink."""
    c = int(rng.choice([1, 3, 3, 3, draw_channels(rng, 8, 256), draw_channels(rng, 8, 256)]))
    side = draw_log(rng, 24, 288, 8) if c <= 3 else 2 * draw_side(rng, c)
    net = Net(rng, (1, c, side, side))
    deep = c > 3 and rng.random() < 0.4
    out = c if deep else draw_channels(rng, 8, 64 if c <= 3 else 384)
    size, stride = int(rng.choice([3, 3, 5, 7])), int(rng.choice([1, 2, 2]) if c <= 3 else 2)
    uneven = int(rng.choice([0, 0, 1]))
    groups = c if deep else 1
    ends = [net.conv("x", out, size, stride, groups, uneven) for _ in range(_length(rng))]
    return net, reduce(net.add, ends)


def _gemm(rng: Draw) -> tuple[Net, str]:
    a, b = (draw_log(rng, 16, 2048, 8) for _ in range(2))
    net, x = Net(rng, (int(rng.choice([1, 1, 1, 4, 16])), a)), "x"
    for i in range(_length(rng)):
        x = net.act(net.linear(x, a if i % 2 else b, gemm=True), "Relu")
    return net, x


def _tokens(rng: Draw) -> tuple[Net, str]:
    a, b = (draw_log(rng, 32, 1024, 16) for _ in range(2))
    net, x = Net(rng, (1, draw_log(rng, 16, 260), a)), "x"
    for i in range(_length(rng)):
        x = net.linear(x, a if i % 2 else b)
    return net, x


def _heads(rng: Draw) -> tuple[Net, int, int]:
    """A network on queries [1, heads, length, each], its heads and its length."""
    heads, each = int(rng.choice([2, 3, 4, 6, 8])), int(rng.choice([16, 32, 32, 64]))
    length = draw_log(rng, 16, 260)
    return Net(rng, (1, heads, length, each)), heads, length


def _products(rng: Draw) -> tuple[Net, str]:
    """Products of computed values, as attention has them."""
    net, heads, length = _heads(rng)
    x, square = "x", (1, heads, length, length)
    for _ in range(_length(rng)):
        net.macs += 2 * length * math.prod(net.shapes[x])
        scores = net.op("MatMul", [x, net.turn(x, 0, 1, 3, 2)], square)
        shares = net.op("Softmax", [scores], square, axis=-1)  # without it values would explode
        x = net.op("MatMul", [shares, x], net.shapes[x])
    return net, x


def _shares(rng: Draw) -> tuple[Net, str]:
    _, heads, length = _heads(rng)
    net, x = Net(rng, (1, heads, length, length)), "x"
    for _ in range(_length(rng)):
        x = net.op("Softmax", [x], net.shapes[x], axis=-1)
    return net, x


def _turns(rng: Draw) -> tuple[Net, str]:
    net, *_ = _heads(rng)
    x = "x"
    for _ in range(_length(rng)):
        x = net.turn(net.add(x, x), 0, 2, 1, 3)  # two turns in a row would be none
    return net, x


def _norms(rng: Draw) -> tuple[Net, str]:
    net, x = Net(rng, (1, draw_log(rng, 16, 260), draw_log(rng, 32, 768, 16))), "x"
    for _ in range(_length(rng)):
        x = net.norm(x)
    return net, x


def _sums(rng: Draw) -> tuple[Net, str]:
    net, c = _picture(rng, 8, 768)
    x, kind = (first := _scaled(net, c)), str(rng.choice(["Add", "Add", "Mul"]))
    for _ in range(_length(rng)):
        x = net.add(x, first, kind)
    return net, x


def _gates(rng: Draw) -> tuple[Net, str]:
    """Means over pictures, and what multiplies by them."""
    net, c = _picture(rng, 8, 768)
    x = _scaled(net, c)
    for _ in range(_length(rng)):
        x = net.add(x, net.op("GlobalAveragePool", [x], (1, c, 1, 1)), "Mul")
    return net, x


def _curves(rng: Draw) -> tuple[Net, str]:
    net, _ = _picture(rng, 8, 512)
    x, kind = "x", str(rng.choice(_ACTIVATIONS))
    for _ in range(_length(rng)):
        x = net.act(x, kind)
    return net, x


def _pools(rng: Draw) -> tuple[Net, str]:
    net, _ = _picture(rng, 8, 512)
    x, kind = "x", str(rng.choice(["MaxPool", "MaxPool", "AveragePool"]))
    for _ in range(_length(rng)):
        x = net.pool(x, kind, 3, 1)
    return net, x


def _joins(rng: Draw) -> tuple[Net, str]:
    net, c = _picture(rng, 8, 192)
    x, (n, _, *rest) = (first := _scaled(net, c)), net.shapes["x"]
    for k in range(_length(rng)):
        x = net.op("Concat", [x, first], (n, (k + 2) * c, *rest), axis=1)
    return net, x


def _enlarged(rng: Draw) -> tuple[Net, str]:
    net, c = _picture(rng, 8, 192)
    side, mode = net.shapes["x"][-1], str(rng.choice(["nearest", "linear"]))
    scales, large = net.weight(np.array([1, 1, 2, 2], np.float32)), (1, c, 2 * side, 2 * side)
    starts = _scaled(net, c), _scaled(net, c)  # two of one input would be made one
    ends = [net.op("Resize", [x, "", scales], large, mode=mode) for x in starts]
    return net, net.add(*ends)


CHAINS: tuple[Family, ...] = (
    _pointwise, _full, _deep, _gemm, _strided, _curves, _sums, _tokens, _pointwise, _full, _gates,
    _products, _deep, _strided, _pools, _norms, _pointwise, _full, _gemm, _grouped, _tokens,
    _joins, _strided, _shares, _pointwise, _full, _deep, _turns, _curves, _enlarged,
)  # fmt: skip
