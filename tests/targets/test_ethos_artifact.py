"""An Ethos-U artifact from compile to answer, on a machine that has no such NPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

import edgebudget
from edgebudget import target_registry
from edgebudget.cli import main
from edgebudget.count_onnx import count_graph
from edgebudget.layer_loads import anatomy
from edgebudget.segment_graph import read_graph
from edgebudget.verify import output_steps
from edgebudget_runtime import Budget, Runner
from edgebudget_runtime.errors import ArtifactError, MissedError, UsageError
from edgebudget_runtime.executorch_program import stand_in
from edgebudget_runtime.manifest import Manifest
from tests.passes.quant_nets import Net, Noise

for _package in ("executorch", "ethosu", "tosa_reference_model"):
    pytest.importorskip(_package, reason='needs pip install "edgebudget[ethos-u]"')

_TARGET = "npu:ethos-u55-128"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """digits for a microcontroller's NPU, at two thirds of its MACs."""
    folder = tmp_path_factory.mktemp("digits")
    with pytest.MonkeyPatch.context() as m:
        m.setenv("EDGEBUDGET_CACHE", str(folder / "cache"))
        budget = Budget.parse(macs="250K", size="40KB", latency="1ms", max_drop="3%")
        edgebudget.compile("digits", out=folder / "out", target=_TARGET, budget=budget)
    return folder / "out"


def test_the_manifest_says_what_the_npu_needs(artifact: Path) -> None:
    manifest = Manifest.load(artifact)
    cost, segment = manifest.subnetworks[0].cost, manifest.segments[0]
    file = artifact / segment.file
    assert segment.file == "segments/main.pte"
    assert {Path(f.file).name for f in segment.extra} == {"main.graph.onnx", "main.tosa"}
    assert cost.size_bytes.value == file.stat().st_size
    assert cost.macs.value == count_graph(read_graph(file)).macs <= 250e3
    assert (cost.latency_ms.evidence, cost.memory_bytes.evidence) == ("simulated", "simulated")
    assert cost.fallback_nodes.value == 0
    assert manifest.placement is not None
    assert manifest.placement.processor == "npu"
    assert all(limit.holds for limit in manifest.limits)
    assert any("own engine ran" in n and "simulated" in n for n in manifest.notes)


def test_the_report_shows_every_layer_in_velas_cycles(artifact: Path) -> None:
    manifest = Manifest.load(artifact)
    target = target_registry.get(_TARGET)
    found = anatomy(artifact, manifest, target)
    assert found.evidence == "simulated"
    working = [x for x in found.loads if x.macs]
    assert working
    assert all(x.ms for x in working)
    total = manifest.subnetworks[0].cost.latency_ms.value
    assert total is not None
    assert 0.7 * total < sum(x.ms or 0.0 for x in found.loads) <= total * 1.001
    assert found.roof is not None
    assert found.roof.macs_per_s.value == 128 * 500e6
    page = (artifact / "report.html").read_text(encoding="utf-8")
    assert "Roofline" in page
    assert "(simulated: Vela" in page


def test_the_cpu_engine_stands_in_and_says_so(artifact: Path) -> None:
    x = np.random.default_rng(0).random((1, 1, 8, 8), dtype=np.float32)
    with Runner(artifact) as runner:
        outcome = runner.run({"image": x})
    assert "standing in for executorch-ethos-u" in outcome.engine
    file = artifact / "segments/main.pte"
    npu = target_registry.get(_TARGET).open(file, exact=True).run({"image": x})["output"]
    gap = np.abs(npu - outcome.outputs["output"]).max()
    assert gap <= output_steps(file)["output"] * 1.001


def test_nodes_beside_the_npu_are_refused_or_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """U55 has no softmax: the TOSA model cannot run such a graph, and nothing says it has."""
    monkeypatch.setenv("EDGEBUDGET_CACHE", str(tmp_path / "cache"))
    net = Net()
    soft = net.add("Softmax", net.add("Relu", net.conv("x", 3, 8)), axis=1)
    flat = net.add("Flatten", net.add("GlobalAveragePool", net.conv(soft, 8, 8)))
    model, data = tmp_path / "net.onnx", tmp_path / "data.npz"
    onnx.save_model(
        net.model(net.add("Gemm", flat, net.weight(5, 8), transB=1, out="y")), str(model)
    )
    pictures = np.stack([Noise().sample(i).inputs["x"] for i in range(40)])
    np.savez(data, x=pictures, labels=np.arange(40) % 5)

    def compiled(budget: Budget) -> None:
        out, source = tmp_path / "out", f"npz:{data}"
        edgebudget.compile(str(model), out=out, target=_TARGET, data=source, budget=budget)

    with pytest.raises(MissedError, match="fallback_nodes"):
        compiled(Budget())
    compiled(Budget.parse(max_fallback=9))
    manifest = Manifest.load(tmp_path / "out")
    assert any("not checked on the target's own engine" in n for n in manifest.notes)
    assert not any("own engine ran" in n for n in manifest.notes)


def test_without_the_graph_the_device_is_asked_for(artifact: Path) -> None:
    manifest = Manifest.load(artifact)
    bare = replace(manifest.segments[0], extra=())
    with pytest.raises(ArtifactError, match=r"EB509.*Ethos-U55"):
        stand_in(manifest, bare)


def test_another_provider_is_refused(artifact: Path) -> None:
    x = np.zeros((1, 1, 8, 8), np.float32)
    with (
        Runner(artifact, providers=("CUDAExecutionProvider",)) as runner,
        pytest.raises(UsageError, match="EB175"),
    ):
        runner.run({"image": x})


def test_commands_read_it(
    artifact: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(artifact), "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert {x["processor"] for x in found["layers"]} <= {"npu", ""}
    assert main(["eval", str(artifact), "--json"]) == 0
    assert main(["report", str(artifact), "--out", str(tmp_path / "r.html")]) == 0
    np.save(tmp_path / "x.npy", np.zeros((1, 1, 8, 8), np.float32))
    capfd.readouterr()
    assert main(["run", str(artifact), str(tmp_path / "x.npy"), "--json"]) == 0
    assert len(json.loads(capfd.readouterr().out)[0]["outputs"]["output"][0]) == 10
