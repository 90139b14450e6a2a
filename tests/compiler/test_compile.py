"""A compile, end to end, on the smallest zoo model: what is proven is recounted here."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import onnx
import pytest

import edgebudget
from edgebudget.count_onnx import count_graph
from edgebudget.events import Advanced, Event
from edgebudget.session import CpuSession
from edgebudget_models import catalogue
from edgebudget_runtime import Budget, Runner
from edgebudget_runtime.errors import InfeasibleError, MissedError, UsageError
from edgebudget_runtime.manifest import Manifest

MACS = 378_176  # of the digits model, as both counters find it


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compile")


@pytest.fixture(autouse=True)
def own_cache(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEBUDGET_CACHE", str(work / "cache"))


@pytest.fixture(scope="module")
def halved(work: Path) -> Path:
    """digits at 60 % of its MACs and a quarter of its bytes, losing at most 3 %."""
    with pytest.MonkeyPatch.context() as m:
        m.setenv("EDGEBUDGET_CACHE", str(work / "cache"))
        budget = Budget.parse(macs=0.6 * MACS, size="40KB", max_drop="3%")
        edgebudget.compile("digits", out=work / "halved", budget=budget)
    return work / "halved"


def tree(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_limits_hold_when_recounted_from_the_file(halved: Path) -> None:
    manifest = Manifest.load(halved)
    assert manifest.holds
    file = halved / manifest.segments[0].file
    counted = count_graph(onnx.load_model(str(file)))
    (sub,) = manifest.subnetworks
    assert counted.macs == sub.cost.macs.value
    assert counted.macs <= 0.6 * MACS
    assert file.stat().st_size == sub.cost.size_bytes.value
    assert file.stat().st_size <= 40_000
    assert any(n.op_type == "DequantizeLinear" for n in onnx.load_model(str(file)).graph.node)


def test_quality_is_that_of_the_exported_file(halved: Path) -> None:
    entry = catalogue.get("digits")
    data = entry.data("evaluation", None)
    with Runner(halved) as runner:
        hits = 0
        for i in range(len(data)):
            inputs, label = data.sample(i)
            out = runner.run({k: v[None] for k, v in inputs.items()}).outputs
            hits += int(next(iter(out.values())).argmax() == label)
    (sub,) = Manifest.load(halved).subnetworks
    assert sub.quality is not None
    assert sub.original_quality is not None
    assert sub.quality.value == pytest.approx(hits / len(data))
    assert sub.quality.value >= sub.original_quality.value * 0.97


def test_the_runner_gives_what_the_file_gives(halved: Path) -> None:
    manifest = Manifest.load(halved)
    spec = manifest.segments[0].inputs[0]
    shape = tuple(d or 1 for d in spec.shape)
    x = np.random.default_rng(0).random(shape, dtype=np.float32)
    direct = CpuSession(halved / manifest.segments[0].file, exact=False).run({spec.name: x})
    with Runner(halved) as runner:
        ours = runner.run({spec.name: x}).outputs
    for name, value in direct.items():
        np.testing.assert_array_equal(ours[name], value)


def test_the_same_compile_gives_the_same_bytes_without_its_cache(
    halved: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEBUDGET_CACHE", str(work / "other-cache"))
    budget = Budget.parse(macs=0.6 * MACS, size="40KB", max_drop="3%")
    edgebudget.compile("digits", out=work / "again", budget=budget)
    assert tree(work / "again") == tree(halved)


def test_the_recipe_replays(halved: Path, work: Path) -> None:
    budget = Budget.parse(macs=0.6 * MACS, size="40KB", max_drop="3%")
    edgebudget.compile("digits", out=work / "replay", budget=budget, plan=halved / "recipe.toml")
    assert tree(work / "replay" / "segments") == tree(halved / "segments")


def test_an_impossible_budget_is_refused_before_anything_is_spent(work: Path) -> None:
    heard: list[Event] = []
    with pytest.raises(InfeasibleError, match="smallest reachable point") as e:
        edgebudget.compile(
            "digits", out=work / "none", budget=Budget.parse(macs=100), on_event=heard.append
        )
    assert e.value.exit_code == 3
    assert not (work / "none").exists()
    assert not any(isinstance(x, Advanced) for x in heard)  # no sample was looked at


def test_a_missed_quality_exits_4_and_keeps_the_best_so_far(work: Path) -> None:
    budget = Budget.parse(macs=0.08 * MACS, max_drop="0.01%")
    with pytest.raises(MissedError, match="quality drop") as e:
        edgebudget.compile("digits", out=work / "missed", budget=budget)
    assert e.value.exit_code == 4
    assert not (work / "missed").exists()
    kept = Manifest.load(work / "missed.missed")
    assert not kept.holds
    assert kept.subnetworks[0].cost.macs.value <= 0.08 * MACS  # type: ignore[operator]


def test_more_quality_than_the_original_has_is_infeasible(work: Path) -> None:
    with pytest.raises(InfeasibleError, match="EB405") as e:
        edgebudget.compile("digits", out=work / "no", budget=Budget.parse(min_quality="0.9999"))
    assert e.value.exit_code == 3


def test_an_existing_artifact_is_kept_without_force(halved: Path) -> None:
    before = tree(halved)
    with pytest.raises(UsageError, match="EB122"):
        edgebudget.compile("digits", out=halved, budget=Budget())
    assert tree(halved) == before


def test_npu_artifact_has_no_fallback(work: Path) -> None:
    pytest.importorskip("onnxruntime_qnn", reason="needs the extra `qnn`")
    edgebudget.compile("digits", out=work / "npu", target="npu", budget=Budget())
    manifest = Manifest.load(work / "npu")
    assert manifest.holds
    assert manifest.placement is not None
    assert set(manifest.placement.counts) == {"npu"}
    assert not manifest.placement.fallback
    assert any("target's own engine ran 4 samples" in n for n in manifest.notes)
