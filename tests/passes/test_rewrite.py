"""Rewrites give the forms that a target runs as integers, and never move the outputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

from edgebudget import events, graph
from edgebudget.export import to_graph
from edgebudget.facts import FACTS
from edgebudget.program import Context, PassResult, Program, TensorSpec
from edgebudget.target import Family, TargetSpec
from edgebudget.workload import Array, Data
from edgebudget_passes import rewrite_for_target
from edgebudget_passes._target_rules import Rule
from edgebudget_runtime.budget import Budget

_NODE = helper.make_node


def _program(
    nodes: Sequence[onnx.NodeProto],
    weights: dict[str, Array] | None = None,
    shape: tuple[int, ...] = (1, 4, 9, 11),
    opset: int = 20,
) -> Program:
    """A graph from x to y."""
    given_ = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    made = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * len(shape))
    stored = [numpy_helper.from_array(v, k) for k, v in (weights or {}).items()]
    body = helper.make_graph(list(nodes), "g", [given_], [made], stored)
    opsets = [helper.make_opsetid("", opset)]
    model = helper.make_model(body, opset_imports=opsets, ir_version=8)
    graph.name_nodes(model)
    return graph.program(graph.infer_shapes(model))


def _context(program: Program, family: Family, **options: str) -> Context:
    spec = TargetSpec(
        name=family,
        family=family,
        engine="",
        device="",
        channel_multiple=1,
        activation_dtypes=("uint8",),
        weight_dtypes=("int8",),
        float_fallback=family == "cpu",
        max_fallback=None,
        options=options,
    )
    rng, nowhere = np.random.default_rng(0), Path()
    task: Any = None
    return Context(
        Budget(), spec, task, Data(), program, 0, rng, nowhere, events.ignore, deadline=None
    )


def _run(program: Program, family: Family = "npu", **options: str) -> PassResult:
    before = onnx.ModelProto()
    before.CopyFrom(program.body)
    context = _context(program, family, **options)
    result = rewrite_for_target.run(program, rewrite_for_target.Config(), context)
    assert graph.compare(before, result.program.body, seed=1) <= graph.REORDERED
    assert result.did or result.declined
    assert FACTS["valid_graph"](result.program) is None
    assert FACTS["static_shapes"](result.program) is None
    return result


def _ops(result: PassResult) -> Counter[str]:
    return Counter(n.op_type for n in result.program.body.graph.node)


def _weight(*shape: int) -> Array:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def _module(*functions: Callable[[Tensor], Tensor]) -> Program:
    """An exported module with an input [1, 4, 9, 11] and an output for each function."""

    class Net(nn.Module):
        def forward(self, *xs: Tensor) -> list[Tensor]:
            return [f(x) for f, x in zip(functions, xs, strict=True)]

    names = range(len(functions))
    specs = tuple(TensorSpec(f"x{i}", (1, 4, 9, 11)) for i in names)
    outputs = tuple(f"y{i}" for i in names)
    return to_graph(Program("module", Net().eval(), specs, outputs))


_SIDES = st.tuples(*[st.integers(0, 2)] * 4)


@settings(max_examples=30, deadline=None)
@given(
    _SIDES, _SIDES, st.integers(1, 4), st.integers(1, 3), st.integers(1, 2), st.sampled_from([1, 4])
)
def test_padding_joins_a_convolution(
    pad: tuple[int, ...], own: tuple[int, ...], kernel: int, stride: int, dilation: int, groups: int
) -> None:
    amounts = np.array([0, 0, pad[0], pad[1], 0, 0, pad[2], pad[3]])
    conv = _NODE(
        "Conv", ["p", "w"], ["y"], pads=own, strides=[stride] * 2, dilations=[dilation] * 2,
        group=groups,
    )  # fmt: skip
    nodes = [_NODE("Pad", ["x", "a"], ["p"]), conv]
    program = _program(nodes, {"a": amounts, "w": _weight(8, 4 // groups, kernel, kernel)})
    result = _run(program)
    assert _ops(result) == {"Conv": 1}
    attributes = graph.attributes(result.program.body.graph.node[0])
    assert attributes["pads"] == [a + b for a, b in zip(pad, own, strict=True)]

    symmetric = _run(result.program, symmetric_pads="true")
    pads = graph.attributes(symmetric.program.body.graph.node[0])["pads"]
    if dilation == 1:
        assert pads[:2] == pads[2:]


@settings(max_examples=25, deadline=None)
@given(
    _SIDES,
    st.sampled_from(["MaxPool", "AveragePool"]),
    st.sampled_from([0.0, -np.inf, 1.0]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 1),
)
def test_padding_joins_a_pool_only_where_exact(
    pad: tuple[int, ...], op: str, value: float, relu: bool, counted: bool, own: int
) -> None:
    amounts = np.array([0, 0, pad[0], pad[1], 0, 0, pad[2], pad[3]])
    extra: dict[str, Any] = {"count_include_pad": int(counted)} if op == "AveragePool" else {}
    nodes = [
        _NODE("Relu" if relu else "Neg", ["x"], ["r"]),
        _NODE("Pad", ["r", "a", "v"], ["p"]),
        _NODE(op, ["p"], ["y"], kernel_shape=[3, 3], strides=[2, 2], pads=[own] * 4, **extra),
    ]
    weights = {"a": amounts, "v": np.array(value, np.float32)}
    if op == "AveragePool" and value == -np.inf:
        return
    if any(p + own > 2 for p in pad):  # the engine fuses this itself, and then refuses it
        return
    result = _run(_program(nodes, weights))
    if op == "MaxPool":
        exact = value == -np.inf or (value == 0 and relu)
    else:
        exact = value == 0 and (counted or own == 0)
    assert _ops(result)["Pad"] == (0 if exact else 1)
    assert exact or result.declined[0].why


def test_activations_are_recognised() -> None:
    functions = {
        lambda x: x * torch.clamp(x + 3, 0, 6) / 6: "HardSwish",
        lambda x: x * (torch.clamp(x + 3, 0, 6) * (1 / 6)): "HardSwish",
        lambda x: x * F.hardsigmoid(x): "HardSwish",
        lambda x: F.relu6(x + 3) / 6: "HardSigmoid",
        lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)): "Gelu",
        lambda x: 0.5 * (x * (1 + torch.tanh(0.7978845608 * (x + 0.044715 * x**3)))): "Gelu",
        lambda x: 1 / (1 + torch.exp(-x)): "Sigmoid",
        lambda x: x * torch.tanh(F.softplus(x)): "Mish",
        lambda x: torch.clamp(x, min=0): "Relu",
    }
    assert _ops(_run(_module(*functions))) == Counter(functions.values())


def test_other_functions_stay_as_written() -> None:
    program = _module(
        lambda x: x * torch.clamp(x + 3, 0, 5) / 6,  # not hard-swish
        lambda x: x * torch.sigmoid(1.702 * x),  # nearly Gelu
        lambda x: F.silu(x + 1),
        lambda x: F.relu6(x),
        lambda x: x * torch.clamp(x.abs().flip(2) + 3, 0, 6) / 6,  # two sources
    )
    before = Counter(n.op_type for n in program.body.graph.node)
    assert _ops(_run(program)) == before


def test_a_value_read_elsewhere_is_kept() -> None:
    def both(x: Tensor) -> Tensor:
        gate = torch.clamp(x + 3, 0, 6)
        return x * gate / 6 + gate.abs()

    result = _run(_module(both))
    assert _ops(result)["Clip"] == 1


def test_gelu_raises_the_operator_set_and_a_bare_erf_is_reported() -> None:
    half, one, root = (np.array(v, np.float32) for v in (0.5, 1, 2**0.5))
    nodes = [
        _NODE("Erf", ["x"], ["b"]),
        _NODE("Div", ["b", "root"], ["d"]),
        _NODE("Erf", ["d"], ["e"]),
        _NODE("Add", ["e", "one"], ["s"]),
        _NODE("Mul", ["b", "s"], ["m"]),
        _NODE("Mul", ["m", "half"], ["y"]),
    ]
    weights = {"half": half, "one": one, "root": root}
    result = _run(_program(nodes, weights, opset=17))
    assert _ops(result) == {"Erf": 1, "Gelu": 1}
    assert graph.opset(result.program.body) == 20
    assert [n.what for n in result.declined] == ["stays Erf"]


def test_means_over_the_picture_become_global_pooling() -> None:
    result = _run(
        _module(
            lambda x: x.mean((-1, -2)),
            lambda x: x.abs().mean((2, 3), keepdim=True),
            lambda x: F.avg_pool2d(x.relu(), (9, 11)),
            lambda x: x.mean(1),
        )
    )
    ops = {"GlobalAveragePool": 3, "Flatten": 1, "ReduceMean": 1, "Abs": 1, "Relu": 1}
    assert _ops(result) == ops


def test_matrix_product_and_bias_become_one_layer() -> None:
    nodes = [_NODE("MatMul", ["x", "w"], ["m"]), _NODE("Add", ["b", "m"], ["y"])]
    for bias in (_weight(5), _weight(1, 5)):
        result = _run(_program(nodes, {"w": _weight(4, 5), "b": bias}, (2, 4)))
        assert _ops(result) == {"Gemm": 1}
    kept = _run(_program(nodes, {"w": _weight(4, 5), "b": _weight(2, 5)}, (2, 4)))
    assert _ops(kept) == {"MatMul": 1, "Add": 1}


def _shortcut(x: Tensor) -> Tensor:
    return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)) + 1


def test_slices_in_a_row_become_one() -> None:
    result = _run(_module(_shortcut))
    assert _ops(result) == {"Slice": 1, "Pad": 1, "Add": 1}


def test_a_rule_that_errs_on_one_node_is_kept_on_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from edgebudget.program import Note

    def to_abs(node: Any) -> Note:
        node.op_type = "Abs"
        return Note(node.name, "became Abs")

    rule = Rule("abs", frozenset({"Relu"}), to_abs)
    monkeypatch.setattr(rewrite_for_target, "rules_for", lambda target: (rule,))
    nodes = [
        _NODE("Abs", ["x"], ["a"]),
        _NODE("Relu", ["a"], ["r"], name="same"),
        _NODE("Neg", ["r"], ["n"]),
        _NODE("Relu", ["n"], ["z"], name="other"),
        _NODE("Add", ["z", "r"], ["y"]),
    ]
    result = _run(_program(nodes))
    assert [n.where for n in result.did] == ["same"]
    assert [n.where for n in result.declined] == ["other"]
    assert "move the outputs" in result.declined[0].why


def test_equal_graphs_give_equal_bytes() -> None:
    first, second = (graph.fingerprint(_run(_module(_shortcut)).program.body) for _ in range(2))
    assert first == second


def test_nothing_to_do_is_said() -> None:
    result = _run(_program([_NODE("Relu", ["x"], ["y"])]))
    assert "nothing to rewrite" in result.declined[0].why
