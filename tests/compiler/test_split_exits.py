"""Chains of segments: the whole graph's answers to the last bit, nothing multiplied twice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgebudget import graph as graphs
from edgebudget.count_onnx import count_graph
from edgebudget.exits import exit_name, exit_outputs
from edgebudget.session import CpuSession
from edgebudget.split_exits import Cut, split
from edgebudget.workload import Array
from edgebudget_passes import quantize_int8
from edgebudget_runtime.errors import UnsupportedError
from tests.passes.quant_nets import CPU, NPU, Net, Noise, context, program

IMAGE = (1, 3, 8, 8)
F, U8 = np.float32(0.1), np.uint8(3)


def names(count: int) -> list[str]:
    return [*(exit_name("y", k) for k in range(1, count)), "y"]


def head(net: Net, x: str, channels: int, out: str) -> None:
    pooled = net.add("Flatten", net.add("GlobalAveragePool", x))
    net.add("Gemm", pooled, net.weight(3, channels), net.store(np.ones(3)), transB=1, out=out)


@st.composite
def nets(draw: Any) -> tuple[onnx.ModelProto, int]:
    """Blocks with skips from anywhere before, and heads on what any block made last."""
    net = Net(IMAGE, seed=draw(st.integers(0, 99)))
    known = [net.conv("x", 3, 4)]
    exits = draw(st.integers(2, 4))
    for out in names(exits):
        for _ in range(draw(st.integers(1, 2))):
            x = net.conv(known[-1], 4, 4)
            kind = draw(st.sampled_from(["plain", "relu", "add", "concat"]))
            if kind == "relu":
                known.append(x)  # read before and after it
                x = net.add("Relu", x)
            elif kind == "add":
                x = net.add("Relu", net.add("Add", x, draw(st.sampled_from(known))))
            elif kind == "concat":
                both = net.add("Concat", x, draw(st.sampled_from([*known, "x"])), axis=1)
                x = net.conv(both, 7 if net.nodes[-1].input[1] == "x" else 8, 4, k=1)
            known.append(x)
        head(net, known[-1], 4, out)
    return net.model(*names(exits)), exits


def answers(cuts: Sequence[Cut], x: Array, *, optimize: bool) -> list[Array]:
    known, found = {"x": x}, []
    for cut in cuts:
        onnx.checker.check_model(cut.model, full_check=True)
        session = CpuSession(graphs.canonical_bytes(cut.model), optimize=optimize)
        made = session.run(known)
        found.append(made.pop("y"))
        for spec in cut.hidden:
            assert (made[spec.name].shape, made[spec.name].dtype.name) == (spec.shape, spec.dtype)
        assert set(made) == {s.name for s in cut.hidden}
        assert set(session.inputs) == {s.name for s in cut.inputs}
        known |= made
    return found


def same(model: onnx.ModelProto, exits: int, *, optimize: bool) -> tuple[Cut, ...]:
    cuts = split(model, names(exits), "y")
    x = Noise(IMAGE[1:]).sample(500).inputs["x"][None]
    whole = graphs.run(model, {"x": x}, optimize=optimize)
    for name, value in zip(names(exits), answers(cuts, x, optimize=optimize), strict=True):
        np.testing.assert_array_equal(value, whole[name])
    parts = [count_graph(c.model) for c in cuts]
    assert sum(p.macs for p in parts) == count_graph(model).macs
    macs = [layer.name for p in parts for layer in p.layers if layer.macs]
    assert len(set(macs)) == len(macs), "a layer runs twice"
    return cuts


def nodes(cut: Cut) -> list[str]:
    return [n.op_type for n in cut.model.graph.node]


def handed(cuts: Sequence[Cut]) -> list[set[str]]:
    return [{s.name for s in c.hidden} for c in cuts]


@given(nets())
@settings(deadline=None, derandomize=True, max_examples=40)
def test_a_chain_answers_as_the_whole_float_graph(made: tuple[onnx.ModelProto, int]) -> None:
    model, exits = made
    before = graphs.canonical_bytes(model)
    cuts = same(model, exits, optimize=False)
    assert graphs.canonical_bytes(model) == before
    again = split(model, names(exits), "y")
    assert [graphs.fingerprint(c.model) for c in again] == [
        graphs.fingerprint(c.model) for c in cuts
    ]


@given(nets(), st.sampled_from([CPU, NPU]))
@settings(deadline=None, derandomize=True, max_examples=12)
def test_a_quantized_chain_hands_over_integers(
    made: tuple[onnx.ModelProto, int], target: Any
) -> None:
    model, exits = made
    config = quantize_int8.Config(range_method="minmax", mixed="off", bias_correct=False)
    ctx = context(Noise(IMAGE[1:], count=8), target)
    quantized = quantize_int8.run(program(model), config, ctx).program.body
    for cut in same(quantized, exits, optimize=True):
        assert {s.dtype for s in cut.hidden} <= {"uint8"}
        hidden = {s.name for s in cut.inputs} - {"x"}
        for node in cut.model.graph.node:
            assert node.op_type == "DequantizeLinear" or hidden.isdisjoint(node.input)


def quantized_by(net: Net, x: str, name: str) -> str:
    s, z = f"{name}.s", f"{name}.z"
    net.stored |= {s: np.asarray(F), z: np.asarray(U8)}
    q = net.add("QuantizeLinear", x, s, z, out=f"{name}.q")
    return net.add("DequantizeLinear", q, s, z, out=name)


def test_what_a_later_segment_only_rounds_is_rounded_before_it_crosses() -> None:
    net = Net(IMAGE)
    float_ = net.conv("x", 3, 4)
    head(net, float_, 4, "y.exit1")
    rounded = quantized_by(net, net.add("Relu", float_), "r")
    head(net, net.conv(rounded, 4, 4), 4, "y")
    cuts = same(net.model("y.exit1", "y"), 2, optimize=False)
    assert [(s.name, s.dtype) for s in cuts[0].hidden] == [("r.q", "uint8")]
    assert nodes(cuts[1])[0] == "DequantizeLinear"


def test_both_sides_dequantize_for_themselves() -> None:
    net = Net(IMAGE)
    rounded = quantized_by(net, net.conv("x", 3, 4), "r")
    head(net, rounded, 4, "y.exit1")
    head(net, net.conv(rounded, 4, 4), 4, "y")
    cuts = same(net.model("y.exit1", "y"), 2, optimize=False)
    assert handed(cuts) == [{"r.q"}, set()]
    assert [nodes(c).count("DequantizeLinear") for c in cuts] == [1, 1]


@pytest.mark.parametrize("before", [True, False])
def test_the_cut_lies_on_the_narrow_side_of_what_both_read(before: bool) -> None:
    net = Net(IMAGE)
    narrow = wide = net.conv("x", 3, 4)
    if before:  # read by both sides only after it was enlarged
        sizes = net.store(np.asarray([1, 1, 2, 2], np.float32))
        wide = net.add("Resize", narrow, "", sizes, mode="nearest")
    head(net, wide, 4, "y.exit1")
    after = wide
    if not before:  # the later segment begins by making it smaller
        after = net.add("MaxPool", wide, kernel_shape=[2, 2], strides=[2, 2], out="small")
    head(net, net.conv(after, 4, 4), 4, "y")
    cuts = same(net.model("y.exit1", "y"), 2, optimize=False)
    assert handed(cuts)[0] == {narrow if before else "small"}
    assert nodes(cuts[0]).count("Resize") == nodes(cuts[1]).count("Resize") == int(before)
    assert nodes(cuts[1]).count("MaxPool") == 0


def test_a_skip_over_a_segment_and_the_raw_input_are_read_where_they_are_needed() -> None:
    net = Net(IMAGE)
    first = net.conv("x", 3, 4)
    head(net, first, 4, "y.exit1")
    second = net.add("Sigmoid", net.conv(first, 4, 4))
    head(net, second, 4, "y.exit2")
    third = net.add("Concat", net.conv(second, 4, 4), net.add("Tanh", first), "x", axis=1)
    head(net, third, 11, "y")
    cuts = same(net.model(*names(3)), 3, optimize=False)
    assert handed(cuts) == [{first}, {second}, set()]
    assert {s.name for s in cuts[1].inputs} == {first}
    assert {s.name for s in cuts[2].inputs} == {"x", first, second}


def test_an_exit_that_is_read_again_keeps_its_name_too() -> None:
    net = Net(IMAGE)
    first = net.conv("x", 3, 4)
    head(net, first, 4, "y.exit1")
    head(net, net.conv(first, 4, 4), 4, "rest")
    net.add("Add", "rest", "y.exit1", out="y")
    cuts = same(net.model("y.exit1", "y"), 2, optimize=False)
    assert handed(cuts)[0] == {first, "y.exit1"}


def test_one_exit_is_the_whole_graph() -> None:
    net = Net(IMAGE)
    head(net, net.conv("x", 3, 4), 4, "y")
    model = net.model("y")
    (cut,) = same(model, 1, optimize=False)
    assert nodes(cut) == [n.op_type for n in model.graph.node]
    assert cut.hidden == ()


def unlike(net: Net, x: str) -> list[str]:
    net.add("Relu", x, out="y.exit1")
    head(net, net.conv(x, 4, 4), 4, "y")
    return names(2)


def out_of_order(net: Net, x: str) -> list[str]:
    head(net, x, 4, "y")
    net.add("Softmax", "y", out="y.exit1")
    return ["y.exit1", "y"]


def not_exits(net: Net, x: str) -> list[str]:
    head(net, x, 4, "boxes")
    head(net, x, 4, "y")
    return ["boxes", "y"]


def not_by_sample(net: Net, x: str) -> list[str]:
    total = net.add("ReduceSum", x, keepdims=0)
    head(net, net.add("Div", x, total), 4, "y.exit1")
    head(net, net.add("Div", net.conv("x", 3, 4), total), 4, "y")
    return names(2)


@pytest.mark.parametrize(
    ("build", "code"),
    [(unlike, "EB235"), (out_of_order, "EB236"), (not_exits, "EB237"), (not_by_sample, "EB238")],
)
def test_what_is_no_chain_is_refused(build: Any, code: str) -> None:
    net = Net(IMAGE)
    outputs = build(net, net.conv("x", 3, 4))
    with pytest.raises(UnsupportedError) as error:
        split(net.model(*outputs), exit_outputs(outputs), "y")
    assert error.value.code == code


def test_exits_are_named_and_found_in_depth_order() -> None:
    assert exit_outputs(["y.exit2", "y.exit1", "y"]) == ("y.exit1", "y.exit2", "y")
    assert exit_outputs(["y"]) == ("y",)
    assert exit_outputs(["boxes.exit1", "boxes", "y"]) == ("y",)
