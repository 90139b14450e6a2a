"""GPUs through ExecuTorch's Vulkan back end: what a PC shows of them, and what is not said."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import pytest

from edgebudget import graph as graphs
from edgebudget import target_registry
from edgebudget.cli import main
from edgebudget.program import Program
from edgebudget.target import Lowered
from edgebudget.verify import file_cost
from edgebudget_runtime import Runner
from edgebudget_runtime.errors import TargetError
from edgebudget_targets import executorch_vulkan
from edgebudget_targets.executorch_vulkan import VulkanTarget
from tests.passes.quant_nets import Net, Noise, residual

pytest.importorskip("executorch", reason='needs pip install "edgebudget[executorch]"')


def _target(name: str = "gpu:vulkan") -> VulkanTarget:
    found = target_registry.get(name)
    assert isinstance(found, VulkanTarget)
    return found


@pytest.fixture(scope="module")
def program() -> Program:
    return graphs.program(residual())


@pytest.fixture(scope="module")
def lowered(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Lowered:
    return _target().lower(program, tmp_path_factory.mktemp("vulkan"), "main")


def test_the_file_is_counted_placed_and_smaller_in_half_precision(
    program: Program, lowered: Lowered, tmp_path: Path
) -> None:
    assert lowered.file.read_bytes()[4:8] == b"ET12"
    placement = _target().placement(lowered.file)
    assert placement.nodes
    assert not placement.fallback
    single = _target("gpu:vulkan/fp32").lower(program, tmp_path, "main")
    half, whole = (file_cost(x, program) for x in (lowered, single))
    assert half.macs == whole.macs
    assert half.size_bytes.value is not None
    assert whole.size_bytes.value is not None
    assert half.size_bytes.value < whole.size_bytes.value
    assert any("half precision: outputs on noise" in n for n in lowered.notes)


def test_quality_is_that_of_rounded_values(program: Program, lowered: Lowered) -> None:
    given = np.stack([Noise().sample(i).inputs["x"] for i in range(4)])
    want = np.concatenate([graphs.run(program.body, {"x": x[None]})["y"] for x in given])
    found = _target().open(lowered.file).run({"x": given})["y"]
    gap = np.abs(found - want).max() / np.abs(want).max()
    assert 0 < gap < 0.01


def test_nothing_is_said_of_time_or_of_the_gpus_own_numbers(lowered: Lowered) -> None:
    target = _target()
    assert target.latency(lowered.file, {}, 1).evidence == "unknown"
    assert target.compare(lowered.file, lowered.file, {}) is None
    with pytest.raises(TargetError, match="EB616"):
        target.open(lowered.file, exact=True)


def test_a_node_that_the_gpu_does_not_take_is_named(tmp_path: Path) -> None:
    net = Net()
    x = net.conv("x", 3, 4)
    net.add("CumSum", x, net.store(np.asarray(3, np.int64)), out="y")
    file = _target().lower(graphs.program(net.model("y")), tmp_path, "main").file
    left = _target().placement(file).fallback
    assert [n.op for n in left] == ["CumSum"]
    assert "does not take" in left[0].why


def test_a_compiled_model_runs_here_by_its_graph_and_a_latency_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EDGEBUDGET_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "out"
    assert main(["compile", "digits", "--target", "gpu:vulkan", "--out", str(out)]) == 0
    with Runner(out) as runner:
        found = runner.run({"image": np.zeros((1, 1, 8, 8), np.float32)})
    assert next(iter(found.outputs.values())).shape == (1, 10)
    refused = ["compile", "digits", "--target", "gpu:vulkan", "--latency", "5ms"]
    assert main([*refused, "--out", str(tmp_path / "no")]) == 3
    assert "EB403" in capsys.readouterr().err


def test_executorch_missing(monkeypatch: pytest.MonkeyPatch, program: Program) -> None:
    def version(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(executorch_vulkan, "version", version)
    with pytest.raises(TargetError, match="EB601"):
        _target().lower(program, Path(), "main")
