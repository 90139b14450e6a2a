"""Kernels of a `.pte`: what XNNPACK fuses, with the sizes that they have."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgebudget import graph as graphs
from edgebudget import predictors, target_registry
from edgebudget.calibrate import as_exported
from edgebudget.calibration_nets import network
from edgebudget.counter import count
from edgebudget.kernels import FEATURES
from edgebudget.layer_loads import TellsNodes
from edgebudget.predictor import Errors, Predictor, Regressor
from edgebudget.program import Program, TensorSpec
from edgebudget.segment_graph import read_graph
from edgebudget.target import CalibratedTarget, TellsKernels
from edgebudget_runtime.errors import TargetError
from tests.passes.quant_nets import Net

pytest.importorskip("executorch", reason="ExecuTorch is not installed")


@pytest.fixture(scope="module")
def target() -> CalibratedTarget:
    found = target_registry.get("cpu:xnnpack")
    assert isinstance(found, TellsKernels)
    return found


@pytest.mark.parametrize("number", [1, 3, 5, 8])
@pytest.mark.parametrize("integer", [False, True])
def test_kernels_have_the_macs_that_are_counted(
    target: CalibratedTarget, tmp_path: Path, number: int, integer: bool
) -> None:
    body = network(number)
    shape = tuple(d.dim_value for d in body.graph.input[0].type.tensor_type.shape.dim)
    program = as_exported(
        Program("graph", body, (TensorSpec("x", shape),), ("y",)), target, integer
    )
    file = target.lower(program, tmp_path, "main").file
    kernels = target.kernels(file)
    assert sum(k.macs for k in kernels) == count(program).macs
    assert all(k.moved > 0 for k in kernels)
    assert integer == any(k.kind.startswith("Q") and k.macs for k in kernels)


def test_what_clips_is_part_of_what_feeds_it(target: CalibratedTarget, tmp_path: Path) -> None:
    net = Net()
    a = net.add("Relu", net.conv("x", 3, 8))
    b = net.add("Relu", net.add("Add", net.conv(a, 8, 8, group=8), a))
    model = net.model(net.add("Sigmoid", net.conv(b, 8, 4, k=1), out="y"))
    kernels = target.kernels(target.lower(graphs.program(model), tmp_path, "main").file)
    ends, inner = kernels[:2], kernels[2:]
    assert [(k.kind, k.in_bytes) for k in ends] == [("Input", 3072), ("Output", 4096)]
    assert [k.kind for k in inner] == ["Conv", "Conv.dw", "Add", "Conv.1x1", "Sigmoid"]
    assert (inner[0].cin, inner[0].cout, inner[0].size, inner[0].rows) == (3, 8, 3, 256)
    assert inner[1].parts == 8


def test_pads_that_differ_are_written_out_for_integers(
    target: CalibratedTarget, tmp_path: Path
) -> None:
    """A float convolution does them itself; what XNNPACK does not take computes in float."""
    net = Net()
    a = net.add("Conv", "x", net.weight(8, 3, 3, 3), pads=[0, 0, 1, 1], strides=[2, 2])
    model = net.model(net.add("Elu", net.conv(a, 8, 8), out="y"))
    program = graphs.program(model)
    for integer in (False, True):
        body = as_exported(program, target, integer)
        lowered = target.lower(body, tmp_path, f"{integer}")
        kernels = {k.kind: k for k in target.kernels(lowered.file)}
        assert kernels["portable.Elu"].in_bytes == 4 * 8 * 64
        assert ("QPad" in kernels) == integer
    assert (kernels["QPad"].in_bytes, kernels["QPad"].out_bytes) == (3 * 256, 3 * 289)


def test_average_pools_run_in_xnnpack_as_torch_exports_them(
    target: CalibratedTarget, tmp_path: Path
) -> None:
    """Torch counts pads in the mean, also where there are none, which XNNPACK refuses to do."""
    net = Net()
    pool = {"kernel_shape": [2, 2], "strides": [2, 2], "count_include_pad": 1}
    model = net.model(net.add("AveragePool", net.conv("x", 3, 8), out="y", **pool))
    lowered = target.lower(graphs.program(model), tmp_path, "main")
    assert target.placement(lowered.file).fallback == ()


def test_a_run_is_timed_and_its_kernels_are_not(target: CalibratedTarget, tmp_path: Path) -> None:
    net = Net()
    model = net.model(net.add("Relu", net.conv("x", 3, 8), out="y"))
    file = target.lower(graphs.program(model), tmp_path, "main").file
    seen = target.observe(file)
    assert seen.total_ms > 0
    assert seen.kernels == target.kernels(file)
    assert seen.kernel_us == ()


def test_nodes_take_what_the_predictor_says_of_their_kernels(
    target: CalibratedTarget, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = network(1)
    shape = tuple(d.dim_value for d in body.graph.input[0].type.tensor_type.shape.dim)
    program = as_exported(Program("graph", body, (TensorSpec("x", shape),), ("y",)), target, True)
    file = target.lower(program, tmp_path, "main").file
    assert isinstance(target, TellsNodes)
    monkeypatch.setattr(predictors, "find", lambda device: (None, "nothing was calibrated"))
    with pytest.raises(TargetError, match="EB653"):
        target.node_times(file, read_graph(file))
    law = Regressor(9, 1.0, (0.1, *(0.0,) * (FEATURES - 1)), -2.0, 9.0)
    known = Predictor(
        device=target.device(), errors=Errors(9, 0.05, 0.12, 0.99), floor_us=10.0, each_us=1.0,
        regressors={"*": law},
    )  # fmt: skip
    monkeypatch.setattr(predictors, "find", lambda device: (known, ""))
    found = target.node_times(file, read_graph(file))
    assert found.evidence == "modelled"
    assert known.errors.words in found.how
    whole = known.milliseconds(target.kernels(file)) - 0.01
    assert sum(found.ms.values()) == pytest.approx(whole)
    convs = {n.name for n in program.body.graph.node if n.op_type == "Conv"}
    assert convs <= found.ms.keys()
