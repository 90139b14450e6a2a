"""Kernels are those that the engine runs, with the sizes that they have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edgebudget import target_registry
from edgebudget.calibration_nets import network
from edgebudget.counter import count
from edgebudget.kernels import FEATURES, Kernel, matrix
from edgebudget.program import Program, TensorSpec
from edgebudget.target import TellsKernels
from edgebudget_runtime.errors import ArtifactError
from edgebudget_targets._ort_kernels import kernel_of

Array = np.ndarray[Any, Any]


@pytest.fixture
def cpu() -> TellsKernels:
    target = target_registry.get("cpu")
    assert isinstance(target, TellsKernels)
    return target


def test_a_convolution_and_its_activation_are_one_kernel(cpu: TellsKernels, qdq_file: Path) -> None:
    kernels = cpu.kernels(qdq_file)
    convolutions = [k for k in kernels if k.kind.startswith("QLinearConv")]
    assert [(k.cin, k.cout, k.size, k.stride, k.rows) for k in convolutions] == [
        (3, 16, 3, 1, 32 * 32),
        (16, 32, 3, 2, 16 * 16),
    ]
    assert convolutions[0].macs == 32 * 32 * 16 * 3 * 9
    assert convolutions[1].weight_bytes == 32 * 16 * 9  # int8
    assert not any("Relu" in k.kind for k in kernels)


@pytest.mark.parametrize("number", range(15))
def test_kernels_have_the_macs_that_are_counted_and_padding(
    cpu: TellsKernels, tmp_path: Path, number: int
) -> None:
    body = network(number)
    onnx.checker.check_model(body, full_check=True)
    assert body.SerializeToString() == network(number).SerializeToString()
    file = tmp_path / "main.onnx"
    onnx.save(body, file)
    kernels = cpu.kernels(file)
    assert all(k.macs >= 0 and k.moved > 0 for k in kernels)
    shape = tuple(d.dim_value for d in body.graph.input[0].type.tensor_type.shape.dim)
    program = Program("graph", body, (TensorSpec("x", shape),), ("y",))
    counted = count(program).macs  # the engine fills up the last block of channels
    assert 0.98 * counted <= sum(k.macs for k in kernels) <= 2.5 * counted


def test_every_kernel_is_timed(cpu: TellsKernels, qdq_file: Path) -> None:
    seen = cpu.observe(qdq_file)
    assert seen.kernels == cpu.kernels(qdq_file)
    assert len(seen.kernel_us) == len(seen.kernels)
    assert seen.total_ms > 0
    assert min(seen.kernel_us) >= 0


def test_a_file_that_the_engine_refuses(cpu: TellsKernels, tmp_path: Path) -> None:
    node = helper.make_node("NoSuchOperator", ["x"], ["y"])
    value = helper.make_tensor_value_info
    body = helper.make_graph(
        [node], "g", [value("x", TensorProto.FLOAT, [1])], [value("y", TensorProto.FLOAT, [1])]
    )
    file = tmp_path / "odd.onnx"
    onnx.save(helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)]), file)
    for look in (cpu.kernels, cpu.observe):
        with pytest.raises(ArtifactError, match="EB510"):
            look(file)


def test_layouts_and_groups_are_told_apart() -> None:
    def conv(x: list[int], y: list[int]) -> dict[str, Any]:
        return {"op_name": "QLinearConv", "input_type_shape": [{"uint8": x}],
                "output_type_shape": [{"uint8": y}]}  # fmt: skip

    last = kernel_of("c", conv([1, 14, 14, 96], [1, 7, 7, 96]), ((96, 1, 5, 5), 2400.0))
    assert (last.kind, last.cin, last.parts, last.stride) == ("QLinearConv.dw", 96, 96, 2)
    first = {**conv([1, 96, 14, 14], [1, 24, 14, 14]), "op_name": "FusedConv"}
    point = kernel_of("a_nchwc", first, ((24, 96, 1, 1), 9216.0))
    assert (point.kind, point.cin, point.cout) == ("Conv.nchwc.1x1", 96, 24)


def test_a_kernel_survives_the_log() -> None:
    kernel = Kernel("Conv.dw", 1.5e6, 10.0, 20.0, 30.0, 4, 2, 8, 8, 3, 1, 8)
    assert Kernel.from_list(kernel.as_list()) == kernel
    assert matrix([kernel]).shape == (1, FEATURES)
    for broken in ([], ["Conv"], ["Conv", *["x"] * 11], ["Conv", *[-1.0] * 11], None):
        with pytest.raises((ArtifactError, TypeError)):
            Kernel.from_list(broken)  # type: ignore[arg-type]
