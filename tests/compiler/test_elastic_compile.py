"""Artifacts of several sub-networks, end to end on the smallest zoo model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import edgebudget
from edgebudget import shared_weights
from edgebudget.cli import app
from edgebudget.count_onnx import count_graph
from edgebudget.elastic_compile import AUTO, Elastic
from edgebudget_models import catalogue
from edgebudget_runtime import Budget, Runner
from edgebudget_runtime.errors import MissedError, UnsupportedError, UsageError
from edgebudget_runtime.manifest import Manifest
from edgebudget_targets.onnxruntime_cpu import CpuTarget


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("elastic")


@pytest.fixture(autouse=True)
def own_cache(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEBUDGET_CACHE", str(work / "cache"))


@pytest.fixture(scope="module")
def exits(work: Path) -> Path:
    """digits with early exits for the CPU."""
    with pytest.MonkeyPatch.context() as m:
        m.setenv("EDGEBUDGET_CACHE", str(work / "cache"))
        edgebudget.compile("digits", out=work / "exits", elastic=Elastic(("exit",)))
    return work / "exits"


def tree(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_costs_of_every_path_are_recounted_from_its_files(exits: Path) -> None:
    manifest = Manifest.load(exits)
    assert len(manifest.subnetworks) >= 2
    for segment in manifest.segments:
        model = shared_weights.read(exits / segment.file)
        assert count_graph(model).macs == segment.macs
    for sub in manifest.subnetworks:
        own = [manifest.segment(i) for i in sub.path]
        assert sum(s.macs for s in own) == sub.cost.macs.value
        files = {f.file: f.bytes for s in own for f in s.files()}
        assert sum(files.values()) == sub.cost.size_bytes.value
        assert all((exits / f).stat().st_size == n for f, n in files.items())
    assert manifest.sharing is not None
    assert manifest.sharing.stored_bytes == manifest.sharing.largest_bytes  # prefixes share all
    listed = {f.file for s in manifest.segments for f in s.files()}
    there = {p.relative_to(exits).as_posix() for p in (exits / "segments").rglob("*.*")}
    assert there == listed  # nothing that no path uses


def test_each_sub_network_answers_as_well_as_the_manifest_says(exits: Path) -> None:
    manifest = Manifest.load(exits)
    data = catalogue.get("digits").data("evaluation", None)
    samples = [data.sample(i) for i in range(len(data))]
    with Runner(exits) as runner:
        for sub in manifest.subnetworks:
            hits = 0
            for inputs, label in samples:
                given = {k: v[None] for k, v in inputs.items()}
                out = runner.run(given, policy=f"fixed:{sub.id}")
                assert out.ran == sub.path
                hits += int(out.outputs["output"].argmax() == label)
            assert sub.quality is not None
            assert sub.quality.value == pytest.approx(hits / len(samples))
    best = max(manifest.subnetworks, key=lambda s: s.cost.macs.value or 0.0)
    assert manifest.subnetworks[0].id == best.id  # the deepest is the best here, and comes first


def test_an_operating_point_spends_and_scores_what_it_says(exits: Path) -> None:
    manifest = Manifest.load(exits)
    point = manifest.operating_points[len(manifest.operating_points) // 2]
    macs = {s.id: s.macs for s in manifest.segments}
    data = catalogue.get("digits").data("evaluation", None)
    spent, hits = [], 0
    with Runner(exits) as runner:
        for i in range(len(data)):
            inputs, label = data.sample(i)
            given = {k: v[None] for k, v in inputs.items()}
            out = runner.run(given, policy=f"point:{point.id}")
            spent.append(sum(macs[s] for s in out.ran))
            hits += int(out.outputs["output"].argmax() == label)
    assert np.mean(spent) == pytest.approx(point.mean_cost.macs.value, rel=0.02)
    assert point.quality is not None
    assert hits / len(data) == pytest.approx(point.quality.value, abs=0.005)
    assert sum(point.shares.values()) == pytest.approx(1.0)


def test_equal_compiles_and_replays_give_equal_bytes(
    exits: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEBUDGET_CACHE", str(work / "cache2"))
    edgebudget.compile("digits", out=work / "again", elastic=Elastic(("exit",)))
    assert tree(work / "again") == tree(exits)
    recipe = exits / "recipe.toml"
    edgebudget.compile("digits", out=work / "replay", elastic=Elastic(("exit",)), plan=recipe)
    kept = {k: v for k, v in tree(work / "replay").items() if k.startswith("segments")}
    assert kept == {k: v for k, v in tree(exits).items() if k.startswith("segments")}


def test_a_certified_drop_is_in_the_manifest(work: Path) -> None:
    elastic = Elastic(("exit",), confidence=0.8)
    budget = Budget.parse(max_drop="10%")
    found = edgebudget.compile("digits", out=work / "sure", elastic=elastic, budget=budget)
    certified = [p for p in found.manifest.operating_points if p.certificate is not None]
    assert certified
    assert certified[0].certificate is not None
    assert (certified[0].certificate.max_drop, certified[0].certificate.confidence) == (0.1, 0.8)


def test_a_missed_limit_is_said_and_what_was_built_is_kept(work: Path) -> None:
    elastic, tight = Elastic(("exit",)), Budget.parse(macs=90_000, max_drop="0.01%")
    with pytest.raises(MissedError, match="max drop"):
        edgebudget.compile("digits", out=work / "tight", elastic=elastic, budget=tight)
    assert not (work / "tight").exists()
    missed = Manifest.load(work / "tight.missed")
    assert not missed.holds
    assert all(x.holds for x in missed.limits)  # the MACs are kept, the quality is not


def test_what_cannot_be_elastic_is_refused_with_the_reason(tiny: Path, work: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"EB245.*without exits of its own"):
        edgebudget.compile(
            str(tiny / "model.onnx"),
            data=f"npz:{tiny / 'data.npz'}",
            out=work / "graph",
            elastic=Elastic(("exit",)),
        )


def slow(self: Any, files: Any, inputs: Any, repeats: int) -> list[Any]:
    """A device on which a segment takes 1 ms, and 3 ms in one run of eight, each in its own."""
    return [np.where(np.arange(repeats) % 8 == i, 3.0, 1.0) for i in range(len(files))]


def timed(out: Path, monkeypatch: pytest.MonkeyPatch, latency: str) -> Manifest:
    monkeypatch.setattr(CpuTarget, "chain_times", slow)
    monkeypatch.setattr(CpuTarget, "compare", lambda self, new, old, inputs: 0.5)
    budget = Budget.parse(latency=latency)
    edgebudget.compile("digits", out=out, elastic=Elastic(("exit",)), budget=budget)
    return Manifest.load(out)


@pytest.mark.parametrize(
    ("limit", "each", "more"), [("1s", 1.0, 0.0), ("1s@mean", 1.25, 0.0), ("1s@p99", 1.0, 2.0)]
)
def test_every_sub_network_is_timed_as_a_chain(
    limit: str, each: float, more: float, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = timed(work / f"timed-{limit}", monkeypatch, limit)
    assert manifest.holds
    assert {len(s.path) for s in manifest.subnetworks} >= {1, 2}
    for sub in manifest.subnetworks:
        figure = sub.cost.latency_ms
        assert figure.evidence == "measured"
        assert figure.value == pytest.approx(len(sub.path) * each + more, rel=0.01)
    assert manifest.operating_points
    for point in manifest.operating_points:
        assert point.mean_cost.latency_ms.value is not None


def test_what_is_too_slow_is_left_out(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = timed(work / "cut", monkeypatch, "1.5ms")
    assert manifest.holds
    assert [len(s.path) for s in manifest.subnetworks] == [1]
    assert len(manifest.segments) == 1
    assert manifest.operating_points == ()
    assert any("left out: it breaks a limit on time" in n for n in manifest.notes)
    with Runner(work / "cut") as runner:
        outcome = runner.run({"image": np.zeros((1, 1, 8, 8), np.float32)})
    assert outcome.subnetwork == manifest.subnetworks[0].id


def test_where_every_exit_is_too_slow_the_miss_is_told(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(MissedError, match="EB410") as e:
        timed(work / "late", monkeypatch, "0.9ms")
    assert "latency_ms 1, limit 0.9" in e.value.what


def test_an_energy_is_the_sum_of_the_segments(work: Path) -> None:
    edgebudget.compile(
        "digits", out=work / "joules", elastic=Elastic(("exit",)),
        budget=Budget.parse(energy="1J"), energy_model="7nm",
    )  # fmt: skip
    manifest = Manifest.load(work / "joules")
    energies = {len(s.path): s.cost.energy_mj for s in manifest.subnetworks}
    assert {f.evidence for f in energies.values()} == {"modelled"}
    values = [energies[n].value or 0.0 for n in sorted(energies)]
    assert values == sorted(values)
    assert values[0] > 0


def test_options_are_read_and_refused() -> None:
    assert Elastic.parse("auto").dimensions == AUTO
    assert Elastic.parse("width, exit,exit").dimensions == ("width", "exit")
    for bad in (("height", 6, None), ("exit", 0, None), ("exit", 6, 0.2)):
        with pytest.raises(UsageError, match="EB156"):
            Elastic.parse(*bad)
    run = CliRunner().invoke(app, ["compile", "digits", "--confidence", "95%", "--out", "x"])
    assert isinstance(run.exception, UsageError)
    assert run.exception.code == "EB156"


def test_the_frontier_lists_every_way_and_draws_it(exits: Path, tmp_path: Path) -> None:
    manifest = Manifest.load(exits)
    plot = tmp_path / "front.svg"
    run = CliRunner().invoke(app, ["frontier", str(exits), "--json", "--plot", str(plot)])
    assert run.exit_code == 0, run.output
    ways = json.loads(run.stdout)["ways"]
    expected = {s.id for s in manifest.subnetworks} | {p.id for p in manifest.operating_points}
    assert {w["id"] for w in ways} == expected
    macs = [w["macs"]["value"] for w in ways]
    assert macs == sorted(macs)
    assert all(w["latency_ms"]["evidence"] in ("unknown", "measured") for w in ways)
    assert plot.read_text().startswith("<svg")
    assert "One artifact, every budget" in (exits / "report.html").read_text()
