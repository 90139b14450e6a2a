"""Kernels of a `.pte`: what XNNPACK fuses, with the sizes that they have."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgebudget import graph as graphs
from edgebudget import target_registry
from edgebudget.calibrate import as_exported
from edgebudget.calibration_nets import network
from edgebudget.counter import count
from edgebudget.program import Program, TensorSpec
from edgebudget.target import CalibratedTarget, TellsKernels
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
    assert [k.kind for k in kernels] == ["Conv", "Conv.dw", "Add", "Conv.1x1", "Sigmoid"]
    assert (kernels[0].cin, kernels[0].cout, kernels[0].size, kernels[0].rows) == (3, 8, 3, 256)
    assert kernels[1].parts == 8


def test_a_run_is_timed_and_its_kernels_are_not(target: CalibratedTarget, tmp_path: Path) -> None:
    net = Net()
    model = net.model(net.add("Relu", net.conv("x", 3, 8), out="y"))
    file = target.lower(graphs.program(model), tmp_path, "main").file
    seen = target.observe(file)
    assert seen.total_ms > 0
    assert seen.kernels == target.kernels(file)
    assert seen.kernel_us == ()
