"""A cascade of two artifacts: files joined under one set of names, figures that come true."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import tomli_w
from onnx import TensorProto, helper, numpy_helper

from edgebudget import cli
from edgebudget.cascade import Wish, cascade
from edgebudget.workload import Array
from edgebudget_runtime import integrity
from edgebudget_runtime import manifest as m
from edgebudget_runtime.confidence import signal
from edgebudget_runtime.cost import Cost, counted
from edgebudget_runtime.errors import InfeasibleError, MissedError, UsageError
from edgebudget_runtime.integrity import verify
from edgebudget_runtime.runner import Runner

_CLASSES, _FEATURES = 4, 8


@dataclass(frozen=True)
class Pair:
    """Two artifacts of one path, and data whose labels the large one knows better."""

    small: Path
    large: Path
    data: str
    inputs: Array  # of the evaluation set
    labels: Array


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("pair")
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(_FEATURES, _CLASSES))
    arrays: dict[str, Array] = {}
    for use, count in (("calibration", 900), ("evaluation", 700)):
        x = rng.normal(size=(count, _FEATURES)).astype(np.float32)
        arrays[f"{use}_x"] = x
        arrays[f"{use}_labels"] = (x @ truth + 0.8 * rng.gumbel(size=(count, 4))).argmax(axis=1)
    np.savez(folder / "data.npz", **arrays)
    weak = truth + 0.7 * rng.normal(size=truth.shape)
    return Pair(
        _artifact(folder / "weak", weak, ("x", "scores"), 100.0, folder),
        _artifact(folder / "strong", truth, ("pixels", "x"), 1000.0, folder),
        f"npz:{folder / 'data.npz'}",
        arrays["evaluation_x"],
        arrays["evaluation_labels"],
    )


def _artifact(out: Path, weight: Array, names: tuple[str, str], macs: float, source: Path) -> Path:
    """A linear classifier as `compile` would leave it; the large one's output is called `x`."""
    (out / "segments").mkdir(parents=True)
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", [names[0], "w"], ["scores_"], name="a"),
            helper.make_node("Identity", ["scores_"], [names[1]], name="b"),
        ],
        "linear",
        [helper.make_tensor_value_info(names[0], TensorProto.FLOAT, [1, _FEATURES])],
        [helper.make_tensor_value_info(names[1], TensorProto.FLOAT, [1, _CLASSES])],
        [numpy_helper.from_array(weight.astype(np.float32), "w")],
    )
    opset = [helper.make_opsetid("", 20)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=10)
    file = out / "segments" / "main.onnx"
    file.write_bytes(model.SerializeToString(deterministic=True))
    original = source / f"{out.name}.onnx"
    original.write_bytes(file.read_bytes())
    f = integrity.described(out, file)
    cost = Cost(
        macs=counted(macs, "counted"), params=counted(32, "counted"),
        size_bytes=counted(f.bytes, "size"), memory_bytes=counted(500, "planned"),
        fallback_nodes=counted(0, "placed"),
    )  # fmt: skip
    segment = m.Segment(
        "main", f.file, f.sha256, f.bytes,
        (m.Tensor(names[0], (1, _FEATURES), "float32"),),
        (m.Tensor(names[1], (1, _CLASSES), "float32"),),
    )  # fmt: skip
    m.Manifest(
        name=out.name,
        target=m.TargetInfo("cpu", "onnxruntime-cpu", "x86_64"),
        workload=m.WorkloadInfo(out.name, "classification", "top1", "ab" * 32),
        preprocessing={},
        segments=(segment,),
        subnetworks=(m.SubNetwork("main", ("main",), cost, None, None),),
        limits=(), quality_limits=(),
        placement=m.Placement("cpu", {"cpu": 2}),
        baseline=m.Baseline(cost),
        passes=(), candidates=(),
        layers_before=(), layers_after=(m.Layer("a", "MatMul", macs, 32.0, "float32"),),
        provenance=m.Provenance({}, 0),
    ).save(out)  # fmt: skip
    settings = {"model": str(original), "data": f"npz:{source / 'data.npz'}"}
    recipe = {"format": 1, "settings": settings, "reasons": [], "step": []}
    (out / "recipe.toml").write_text(tomli_w.dumps(recipe))
    return out


def answered(folder: Path, manifest: m.Manifest, inputs: Array) -> tuple[Array, Array]:
    """Class scores [N, classes] of the small and the large segment, by the engine alone."""
    found = []
    for segment in manifest.segments:
        session = ort.InferenceSession(str(folder / segment.file))
        assert [i.name for i in session.get_inputs()] == ["x"]
        assert [o.name for o in session.get_outputs()] == ["scores"]
        found.append(np.concatenate([session.run(None, {"x": row[None]})[0] for row in inputs]))
    return found[0], found[1]


def test_figures_come_true_on_the_files(pair: Pair, tmp_path: Path) -> None:
    out = tmp_path / "joined"
    result = cascade(pair.small, pair.large, out=out, wish=Wish(macs_mean=600.0))
    manifest = m.Manifest.load(out)
    verify(out, manifest)
    assert manifest == result.manifest
    small, large = answered(out, manifest, pair.inputs)
    (exit,) = manifest.exits
    sure = signal(small, exit.signal, exit.temperature)
    assert len(manifest.operating_points) >= 4
    for point in manifest.operating_points:
        early = sure >= point.thresholds["small"]
        mixed = np.where(early[:, None], small, large)
        assert point.shares["small"] == pytest.approx(early.mean())
        assert point.mean_cost.macs.value == pytest.approx(100 + 1000 * (~early).mean())
        assert point.quality is not None
        assert point.quality.value == pytest.approx((mixed.argmax(axis=1) == pair.labels).mean())
    (limit,) = manifest.limits
    assert limit.holds
    assert limit.statistic == "mean"
    assert result.chosen is not None
    assert limit.proven == result.chosen.mean_cost.macs
    assert 500 < (limit.proven.value or 0) <= 600
    paths = {s.id: (s.path, s.cost.macs.value) for s in manifest.subnetworks}
    assert paths == {
        "cascade": (("small", "large"), 1100.0),
        "small": (("small",), 100.0),
        "large": (("large",), 1000.0),
    }
    assert (out / "small/segments/main.onnx").read_bytes() == (
        pair.small / "segments/main.onnx"
    ).read_bytes()
    assert "cascade" in (out / "report.html").read_text()


def test_the_runtime_stops_where_the_figures_say(pair: Pair, tmp_path: Path) -> None:
    out = tmp_path / "run"
    manifest = cascade(pair.small, pair.large, out=out).manifest
    point = manifest.operating_points[1]
    (exit,) = manifest.exits
    small, large = answered(out, manifest, pair.inputs[:80])
    early = signal(small, exit.signal, exit.temperature) >= point.thresholds["small"]
    assert 10 < early.sum() < 70
    with Runner(out, profile=False) as runner:
        outcomes = [runner.run(x[None], policy=f"point:{point.id}") for x in pair.inputs[:80]]
    for outcome, leaves, mine, theirs in zip(outcomes, early, small, large, strict=True):
        assert outcome.ran == (("small",) if leaves else ("small", "large"))
        assert (outcome.outputs["scores"][0] == (mine if leaves else theirs)).all()


def test_the_same_inputs_give_the_same_bytes(pair: Pair, tmp_path: Path) -> None:
    wish = Wish(max_drop=0.1, confidence=0.9)
    for name in ("a", "b"):
        cascade(pair.small, pair.large, out=tmp_path / name, wish=wish)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.*"))
    assert len(files) == 5
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_certified_drop_is_in_the_manifest(pair: Pair, tmp_path: Path) -> None:
    wish = Wish(max_drop=0.08, confidence=0.9)
    result = cascade(pair.small, pair.large, out=tmp_path / "c", wish=wish)
    assert result.chosen is not None
    certificate = result.chosen.certificate
    assert certificate is not None
    assert (certificate.max_drop, certificate.confidence, certificate.count) == (0.08, 0.9, 450)
    (limit,) = result.manifest.quality_limits
    assert limit.holds
    assert "0.9 sure" in limit.how
    with pytest.raises(UsageError, match="EB195"):
        cascade(pair.small, pair.large, out=tmp_path / "d", wish=Wish(max_drop=0.001), force=True)
    assert not (tmp_path / "d").exists()


def test_half_of_the_evaluation_set_may_be_held_back(pair: Pair, tmp_path: Path) -> None:
    result = cascade(pair.small, pair.large, out=tmp_path / "h", wish=Wish(held_back=0.4))
    counts = {p.quality.count for p in result.manifest.operating_points if p.quality}
    assert counts == {420}
    assert "280 held-back" in " ".join(result.manifest.notes)


def test_a_bound_that_fails_on_the_evaluation_set_is_missed(pair: Pair, tmp_path: Path) -> None:
    with np.load(pair.data.removeprefix("npz:")) as arrays:
        shifted = dict(arrays)
    shifted["calibration_x"] = shifted["calibration_x"] * 4.0  # surer than what comes later
    np.savez(tmp_path / "shifted.npz", **shifted)
    with pytest.raises(MissedError, match="EB410"):
        cascade(
            pair.small, pair.large, out=tmp_path / "m",
            wish=Wish(macs_mean=300.0), data=f"npz:{tmp_path / 'shifted.npz'}",
        )  # fmt: skip
    assert not (tmp_path / "m").exists()
    assert not m.Manifest.load(tmp_path / "m.missed").holds


def test_refuses_what_does_not_fit(pair: Pair, tmp_path: Path) -> None:
    def refused(code: str, small: Path, large: Path, wish: Wish | None = None) -> None:
        with pytest.raises((UsageError, InfeasibleError), match=code):
            cascade(small, large, out=tmp_path / "x", wish=wish)

    refused("EB190.*MACs", pair.large, pair.small)
    refused("EB401", pair.small, pair.large, Wish(macs_mean=99.0))
    refused("EB194", pair.small, pair.large, Wish(held_back=1.5))
    other = tmp_path / "other"
    manifest = m.Manifest.load(pair.large)
    for field, changed in (
        ("target", m.TargetInfo("npu:hexagon", "onnxruntime-qnn", "phone")),
        ("preprocessing", {"layout": "NHWC"}),
    ):
        other.mkdir(exist_ok=True)
        (other / "segments").mkdir(exist_ok=True)
        (other / "segments/main.onnx").write_bytes((pair.large / "segments/main.onnx").read_bytes())
        replace(manifest, **{field: changed}).save(other)  # type: ignore[arg-type]
        refused(f"EB190.*{field}", pair.small, other)
    assert not (tmp_path / "x").exists()


def test_a_joined_artifact_cannot_be_joined_again(pair: Pair, tmp_path: Path) -> None:
    cascade(pair.small, pair.large, out=tmp_path / "once")
    with pytest.raises(UsageError, match="EB191"):
        cascade(pair.small, tmp_path / "once", out=tmp_path / "twice")


def test_a_task_without_right_and_wrong_is_refused(pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="EB192"):
        cascade(pair.small, pair.large, out=tmp_path / "r", task="agreement")


def test_renaming_makes_way_for_names_in_use(pair: Pair, tmp_path: Path) -> None:
    cascade(pair.small, pair.large, out=tmp_path / "n")
    model = onnx.load_model(str(tmp_path / "n/large/segments/main.onnx"))
    onnx.checker.check_model(model)
    before = onnx.load_model(str(pair.large / "segments/main.onnx"))
    x = np.ones((1, _FEATURES), np.float32)
    ours, theirs = (
        ort.InferenceSession(b.SerializeToString()).run(None, {name: x})[0]
        for b, name in ((model, "x"), (before, "pixels"))
    )
    assert (ours == theirs).all()


def test_the_command_prints_what_was_chosen(
    pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["cascade", str(pair.small), str(pair.large), "--out", str(tmp_path / "cli")]
    assert cli.main([*given, "--macs-mean", "600", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["holds"]
    assert told["operating_point"].startswith("mean-")
    assert cli.main([*given, "--confidence", "95%"]) == 2
    assert "EB194" in capsys.readouterr().err
    assert cli.main([*given, "--force", "--held-back", "half"]) == 2
    assert "EB194" in capsys.readouterr().err
