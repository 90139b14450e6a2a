"""A `.pte` artifact from compile to answer, and what goes wrong with it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import edgebudget
from edgebudget.cli import main
from edgebudget.count_onnx import count_graph
from edgebudget.elastic_compile import Elastic
from edgebudget.segment_graph import graph_hash, read_graph
from edgebudget_runtime import Budget, Runner, executorch_program
from edgebudget_runtime.errors import ArtifactError, TargetError, UsageError
from edgebudget_runtime.manifest import Manifest

pytest.importorskip("executorch", reason="ExecuTorch is not installed")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """digits for XNNPACK, at two thirds of its MACs."""
    folder = tmp_path_factory.mktemp("digits")
    with pytest.MonkeyPatch.context() as m:
        m.setenv("EDGEBUDGET_CACHE", str(folder / "cache"))
        budget = Budget.parse(macs="250K", size="40KB", max_drop="3%")
        edgebudget.compile("digits", out=folder / "out", target="cpu:xnnpack", budget=budget)
    return folder / "out"


def test_the_manifest_says_what_was_counted_and_how(artifact: Path) -> None:
    manifest = Manifest.load(artifact)
    cost, segment = manifest.subnetworks[0].cost, manifest.segments[0]
    file = artifact / segment.file
    assert segment.file == "segments/main.pte"
    assert cost.size_bytes.value == file.stat().st_size == segment.bytes
    assert cost.macs.value == count_graph(read_graph(file)).macs <= 250e3
    assert graph_hash(file) in cost.macs.how
    assert [t.name for t in segment.inputs] == ["image"]
    assert manifest.target.engine == "executorch-xnnpack"
    assert manifest.placement is not None
    assert manifest.placement.processor == "xnnpack"
    assert "executorch" in manifest.provenance.versions
    assert all(limit.holds for limit in manifest.limits)


def test_the_runner_answers_as_the_target_does(artifact: Path) -> None:
    from edgebudget import target_registry

    x = np.random.default_rng(0).random((1, 1, 8, 8), dtype=np.float32)
    with Runner(artifact) as runner:
        outcome = runner.run({"image": x})
    assert outcome.engine.startswith("executorch")
    own = target_registry.get("cpu:xnnpack").open(artifact / "segments/main.pte")
    np.testing.assert_array_equal(outcome.outputs["output"], own.run({"image": x})["output"])


def test_commands_read_it(
    artifact: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(artifact), "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["macs"] == Manifest.load(artifact).subnetworks[0].cost.macs.value
    assert {x["processor"] for x in found["layers"]} == {"xnnpack"}
    assert main(["eval", str(artifact), "--json"]) == 0
    assert "0." in capfd.readouterr().out
    assert main(["report", str(artifact), "--out", str(tmp_path / "r.html")]) == 0
    capfd.readouterr()
    np.save(tmp_path / "x.npy", np.zeros((1, 1, 8, 8), np.float32))
    code = "import sys; from edgebudget.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, "run", str(artifact), str(tmp_path / "x.npy"), "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert len(json.loads(done.stdout)[0]["outputs"]["output"][0]) == 10
    assert done.stderr == ""  # the engine reports on the processor: not to the user


def test_a_runner_without_executorch_says_what_to_install(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executorch_program, "installed_version", lambda: "")
    x = np.zeros((1, 1, 8, 8), np.float32)
    with Runner(artifact) as runner, pytest.raises(TargetError, match=r"EB601.*executorch"):
        runner.run({"image": x})


def test_a_runner_with_another_provider_is_refused(artifact: Path) -> None:
    x = np.zeros((1, 1, 8, 8), np.float32)
    with (
        Runner(artifact, providers=("CUDAExecutionProvider",)) as runner,
        pytest.raises(UsageError, match=r"EB175.*ExecuTorch"),
    ):
        runner.run({"image": x})


def test_a_damaged_file_is_found_before_it_is_loaded(artifact: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(artifact), str(copy)], check=True)
    file = copy / "segments/main.pte"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(ArtifactError, match="EB502"):
        Runner(copy)


def test_several_sub_networks_share_their_segments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exits are segments one after the other, so that each weight is stored once."""
    monkeypatch.setenv("EDGEBUDGET_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "out"
    edgebudget.compile("digits", out=out, target="cpu:xnnpack", elastic=Elastic(("exit",)))
    manifest = Manifest.load(out)
    paths = [s.path for s in manifest.subnetworks]
    longest = max(paths, key=len)
    assert len(longest) > 1
    assert all(longest[: len(p)] == p for p in paths)
    assert {s.file.rpartition(".")[2] for s in manifest.segments} == {"pte"}
    assert manifest.sharing is not None
    assert manifest.sharing.stored_bytes == manifest.sharing.largest_bytes
    x = np.random.default_rng(0).random((1, 1, 8, 8), dtype=np.float32)
    with Runner(out) as runner:
        for subnetwork in manifest.subnetworks:
            outcome = runner.run({"image": x}, policy=f"fixed:{subnetwork.id}")
            assert outcome.ran == subnetwork.path
