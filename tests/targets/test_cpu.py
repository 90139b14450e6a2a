from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from edgebudget import target_registry
from edgebudget.cpu_features import CpuFeatures
from edgebudget.program import Program
from edgebudget_runtime.errors import ArtifactError, UnsupportedError, UsageError
from edgebudget_targets.onnxruntime_cpu import CpuTarget

Array = np.ndarray[Any, Any]


@pytest.fixture
def cpu() -> CpuTarget:
    target = target_registry.get("cpu")
    assert isinstance(target, CpuTarget)
    return target


def test_numbers_equal_a_direct_session(cpu: CpuTarget, qdq_file: Path, batch: Array) -> None:
    session = ort.InferenceSession(str(qdq_file), providers=["CPUExecutionProvider"])
    direct = np.concatenate([session.run(None, {"x": batch[i : i + 1]})[0] for i in range(3)])
    np.testing.assert_array_equal(cpu.open(qdq_file).run({"x": batch})["y"], direct)


def test_every_node_is_on_the_cpu(cpu: CpuTarget, erf_file: Path) -> None:
    placement = cpu.placement(erf_file)
    assert [n.op for n in placement.nodes] == [n.op_type for n in onnx.load(erf_file).graph.node]
    assert placement.fallback == ()


def test_lowering_gives_the_same_bytes_without_traces(
    cpu: CpuTarget, qdq_file: Path, tmp_path: Path, batch: Array
) -> None:
    clean, noisy = onnx.load(qdq_file), onnx.load(qdq_file)
    noisy.doc_string = "made on Tuesday"
    noisy.producer_version = "1"
    noisy.graph.node[0].doc_string = "File /home/me/net.py, line 3"
    noisy.graph.node[0].metadata_props.add(key="trace", value="x" * 1000)
    one = cpu.lower(Program("graph", clean, (), ()), tmp_path / "a", "main").file
    two = cpu.lower(Program("graph", noisy, (), ()), tmp_path / "b", "main").file
    assert one.name == "main.onnx"
    assert one.read_bytes() == two.read_bytes()
    assert noisy.graph.node[0].doc_string  # the program itself is left alone
    assert [p.name for p in one.parent.iterdir()] == ["main.onnx"]
    np.testing.assert_array_equal(
        cpu.open(one).run({"x": batch})["y"], cpu.open(qdq_file).run({"x": batch})["y"]
    )


def test_a_module_cannot_be_lowered(cpu: CpuTarget, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="EB241"):
        cpu.lower(Program("module", object(), (), ()), tmp_path, "main")


def test_latency_states_how_it_was_measured(
    cpu: CpuTarget, qdq_file: Path, erf_file: Path, batch: Array
) -> None:
    figure = cpu.latency(qdq_file, {"x": batch}, 7)
    assert figure.value is not None
    assert figure.value > 0
    assert (figure.evidence, figure.count) == ("measured", 7)
    assert figure.spread is not None
    assert "median of 7" in figure.how
    assert "1 thread" in figure.how
    assert figure.device == cpu.spec.device != "this machine"
    assert "in a process of its own" in figure.how
    pair = cpu.measure([qdq_file, erf_file], {"x": batch}, 3)
    assert [f.count for f in pair] == [3, 3]
    assert "2 files in turn" in pair[0].how
    ratio = cpu.compare(qdq_file, erf_file, {"x": batch})
    assert ratio is not None
    assert ratio > 0


@pytest.mark.parametrize(
    ("inputs", "code"),
    [
        ({}, "EB142"),
        ({"x": np.zeros((1, 3, 31, 32), np.float32)}, "EB142"),
        ({"x": np.zeros((3, 32, 32), np.float32)}, "EB142"),
        ({"x": np.zeros((0, 3, 32, 32), np.float32)}, "EB142"),
        ({"x": np.zeros((1, 3, 32, 32), np.float64)}, "EB143"),
    ],
)
def test_wrong_inputs_are_named(
    cpu: CpuTarget, qdq_file: Path, inputs: dict[str, Array], code: str
) -> None:
    with pytest.raises(UsageError, match=code):
        cpu.open(qdq_file).run(inputs)


def test_a_broken_file_is_refused(cpu: CpuTarget, qdq_file: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(qdq_file.read_bytes()[:999])
    with pytest.raises(ArtifactError, match="EB510"):
        cpu.open(broken)
    with pytest.raises(UsageError, match="EB144"):
        cpu.latency(qdq_file, {}, 0)


def test_signedness_follows_the_processor() -> None:
    old = CpuFeatures("old", "x86_64", frozenset({"avx2"}))
    new = CpuFeatures("new", "x86_64", frozenset({"avx2", "vnni"}))
    arm = CpuFeatures("arm", "aarch64", frozenset({"dotprod"}))
    assert (old.activations, new.activations, arm.activations) == (
        ("uint8",),
        ("uint8",),
        ("int8", "uint8"),
    )
    assert (old.saturates, new.saturates, arm.saturates) == (True, False, False)
