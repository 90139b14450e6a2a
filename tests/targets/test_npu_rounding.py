"""The CPU stand-in for Arm's NPU: bit for bit what the TOSA reference model computes."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgebudget import graph as graphs
from edgebudget import target_registry
from edgebudget_passes import quantize_int8
from edgebudget_targets._npu_rounding import _factors, rounded_as_npu
from tests.passes.quant_nets import Net, Noise, context, residual

_COUNT = 6


def _gated() -> onnx.ModelProto:
    """Clipped, thinned and gated, with a difference."""
    net = Net(seed=1)
    six = [net.store(np.float32(v)) for v in (0, 6)]
    a = net.add("Clip", net.conv("x", 3, 16, strides=[2, 2]), *six)
    b = net.conv(a, 16, 16, group=16)
    c = net.add("Mul", a, net.add("Relu", b))
    d = net.add("Sub", c, net.conv(a, 16, 16, k=1))
    e = net.add("AveragePool", d, kernel_shape=[2, 2], strides=[2, 2])
    flat = net.add("Flatten", e)
    return net.model(net.add("Gemm", flat, net.weight(7, 256), transB=1, out="y"))


def _wide() -> onnx.ModelProto:
    """Sums beyond what single precision holds exactly."""
    net = Net(seed=2)
    ones = net.store(np.abs(net.rng.standard_normal((300, 3, 1, 1))))
    a = net.add("Relu", net.add("Conv", "x", ones))
    w = net.store(np.abs(net.rng.standard_normal((4, 300, 3, 3))) + 1)
    b = net.add("Conv", a, w, strides=[4, 4])
    return net.model(net.add("Flatten", b, out="y"))


def _products() -> onnx.ModelProto:
    """Rows times a stored matrix, and times each other."""
    net = Net(shape=(1, 12, 16), seed=3)
    a, b = (
        net.add("MatMul", "x", net.store(net.rng.standard_normal((16, 20)) / 4)) for _ in range(2)
    )
    turned = net.add("Transpose", b, perm=[0, 2, 1])
    return net.model(net.add("MatMul", a, turned, out="y"))


def _branches() -> onnx.ModelProto:
    """Operators that the compiler takes to have one grid, with another behind than before."""
    net = Net(seed=4)
    low, high = (net.store(np.float32(v)) for v in (-0.3, 0.41))
    a = net.conv("x", 3, 8)
    b = net.add("Conv", "x", net.store(net.rng.standard_normal((8, 3, 3, 3)) * 0.4), pads=[1] * 4)
    product = net.add("Mul", a, b)
    mean = net.add("GlobalAveragePool", b)
    over = net.store(np.asarray([2, 3]))
    branches = [
        net.add("Relu", product),
        net.add("Clip", product, low, high),
        net.add("Relu", net.add("MaxPool", a, kernel_shape=[2, 2], strides=[2, 2])),
        net.add("Concat", net.add("Relu", a), b, axis=1),
        net.add("Mul", a, net.add("ReduceMax", b, over, keepdims=1)),
        net.add("Mul", a, net.add("ReduceMin", b, over, keepdims=1)),
        net.add("Mul", a, net.add("Relu", mean)),
        net.add("Sub", net.add("Expand", mean, net.store(np.asarray([1, 8, 16, 16]))), a),
    ]
    means = [net.add("Flatten", net.add("GlobalAveragePool", v)) for v in branches]
    joined = net.add("Concat", *means, axis=1)
    return net.model(net.add("Gemm", joined, net.weight(20, 72), transB=1, out="y"))


_NETS = [residual, _gated, _wide, _products, _branches]


@pytest.mark.parametrize("build", _NETS)
def test_bit_for_bit_what_the_reference_model_computes(
    build: Callable[[], onnx.ModelProto], tmp_path: Path
) -> None:
    for package in ("executorch", "ethosu", "tosa_reference_model"):
        pytest.importorskip(package, reason='needs pip install "edgebudget[ethos-u]"')
    target = target_registry.get("npu:ethos-u85-256")
    program = graphs.program(build())
    data = Noise(shape=tuple(program.inputs[0].shape[1:]))
    config = quantize_int8.Config(label_bias="off")
    integer = quantize_int8.run(program, config, context(data, target.spec)).program
    file = target.lower(integer, tmp_path, "main").file
    assert not target.placement(file).fallback
    x = np.stack([data.sample(100 + i).inputs["x"] for i in range(_COUNT)])
    npu, cpu = (target.open(file, exact=e).run({"x": x})["y"] for e in (True, False))
    assert len(np.unique(npu)) > 10
    assert np.array_equal(npu, cpu)


def test_every_weighted_layer_is_rewritten() -> None:
    """None falls back to the engine's own rounding."""
    config = quantize_int8.Config(label_bias="off")
    for build in _NETS:
        program = graphs.program(build())
        data = Noise(shape=tuple(program.inputs[0].shape[1:]))
        target = target_registry.get("npu:ethos-u85-256").spec
        made = rounded_as_npu(
            quantize_int8.run(program, config, context(data, target)).program.body
        )
        by = {o: n for n in made.graph.node for o in n.output}
        for node in made.graph.node:
            if node.op_type in ("Conv", "Gemm", "MatMul"):
                assert not any(_is_rounding(by[i]) for i in node.input if i in by)


def _is_rounding(node: onnx.NodeProto) -> bool:
    return node.op_type in ("QuantizeLinear", "DequantizeLinear")


@given(
    scale=st.floats(1e-6, 4.0, allow_subnormal=False),
    total=st.integers(-(2**30), 2**30),
)
def test_factors_round_as_a_multiplication_by_31_bits(scale: float, total: int) -> None:
    """TOSA's RESCALE: (total * multiplier + 2^(shift - 1)) >> shift, in whole numbers."""
    factor: Any = _factors(np.float64(scale))
    exact = Fraction(float(factor))
    assert abs(exact / Fraction(scale) - 1) <= Fraction(1, 2**31)
    shift = exact.denominator.bit_length() - 1
    want = (total * exact.numerator * 2 + 2**shift) >> (shift + 1)
    if abs(want) < 2**15:
        assert int(np.floor(np.float64(total) * factor + 0.5)) == want
