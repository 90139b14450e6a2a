"""Pictures handed over channels last: the same numbers, and no transposes left in the engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings

from edgebudget import graph as graphs
from edgebudget.channels_last import hand_over_channels_last
from edgebudget.split_exits import Cut, split
from edgebudget_passes import quantize_int8
from tests.compiler.test_split_exits import IMAGE, answers, head, names, nets
from tests.passes.quant_nets import CPU, Net, Noise, context, program


def integer(model: onnx.ModelProto) -> onnx.ModelProto:
    config = quantize_int8.Config(label_bias="off")
    done = quantize_int8.run(program(model), config, context(Noise(IMAGE[1:]), CPU))
    made: onnx.ModelProto = done.program.body
    return made


@given(nets())
@settings(deadline=None, derandomize=True, max_examples=8)
def test_the_chain_answers_as_before(made: tuple[onnx.ModelProto, int]) -> None:
    model, exits = integer(made[0]), made[1]
    cuts = split(model, names(exits), "y")
    turned = hand_over_channels_last(cuts)
    x = Noise(IMAGE[1:]).sample(500).inputs["x"][None]
    for was, now in zip(
        answers(cuts, x, optimize=False), answers(turned, x, optimize=False), strict=True
    ):
        np.testing.assert_array_equal(now, was)
    for before, after in zip(cuts, turned, strict=True):
        assert [s.name for s in after.hidden] == [s.name for s in before.hidden]
        for was_spec, spec in zip(before.hidden, after.hidden, strict=True):
            n, c, h, w = (was_spec.shape + (0,) * 4)[:4]
            picture = len(was_spec.shape) == 4 and was_spec.dtype == "uint8"
            assert spec.shape == ((n, h, w, c) if picture else was_spec.shape)


@pytest.fixture
def residual_chain() -> tuple[Cut, ...]:
    net = Net(IMAGE)
    x = net.conv("x", 3, 16)
    for k in range(6):
        x = net.add("Relu", net.add("Add", x, net.conv(net.conv(x, 16, 16), 16, 16)))
        if k == 2:
            head(net, x, 16, names(2)[0])
    head(net, x, 16, "y")
    return split(integer(net.model(*names(2))), names(2), "y")


def test_the_engine_keeps_no_transpose_between_blocks(
    residual_chain: tuple[Cut, ...], tmp_path: Path
) -> None:
    def transposes(cut: Cut) -> int:
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        options.log_severity_level = 4
        ort.InferenceSession(graphs.canonical_bytes(cut.model), options)
        nodes = onnx.load(tmp_path / "optimized.onnx").graph.node
        return sum(n.op_type == "Transpose" for n in nodes)

    second = hand_over_channels_last(residual_chain)[1]
    assert transposes(residual_chain[1]) > 3
    assert transposes(second) <= 1
