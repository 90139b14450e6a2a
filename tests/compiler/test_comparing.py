"""One network on several targets: rows, missing engines, crashes and hangs."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgebudget import comparing
from edgebudget.cli import main
from edgebudget.compare_text import markdown, table
from edgebudget.comparing import Comparison, Row, compare
from edgebudget.target_registry import families
from edgebudget_runtime.cost import Cost, Figure, counted
from edgebudget_runtime.errors import UsageError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A small float network without data."""
    rng = np.random.default_rng(0)
    weight = numpy_helper.from_array(rng.standard_normal((8, 3, 3, 3)).astype(np.float32), "w")
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w"], ["c"], "conv", pads=[1] * 4),
            helper.make_node("Relu", ["c"], ["y"], "relu"),
        ],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 8, 8, 8])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, tmp_path / "net.onnx")
    return tmp_path / "net.onnx"


def test_costs_need_no_data(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "compare.md"
    code = main(["compare", str(file), "--targets", "cpu", "--quick", "--json",
                 "--markdown", str(out)])  # fmt: skip
    printed, err = capsys.readouterr()
    assert code == 0, err
    (row,) = json.loads(printed)["rows"]
    assert row["why"] == ""
    assert row["cost"]["macs"]["value"] == 8 * 8 * 8 * 27
    assert row["cost"]["latency_ms"]["evidence"] == "measured"
    assert row["cost"]["energy_mj"]["value"] is None
    assert row["cost"]["fallback_nodes"]["value"] == 0
    assert row["quality"] is None
    assert "quantized on noise" in row["notes"][0]
    assert json.loads(printed)["original"]["macs"]["value"] == 8 * 8 * 8 * 27
    assert "| cpu | 13.82 kMACs |" in out.read_text()


def test_another_input_size_is_not_taken_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEBUDGET_CACHE", str(tmp_path / "cache"))
    macs = [
        compare("cifar10-resnet20", ["cpu"], quick=True, input_shape=(1, 3, side, side))
        .rows[0]
        .cost.macs
        for side in (16, 32)
    ]
    assert macs[0].value is not None
    assert macs[1].value is not None
    assert macs[1].value > 3 * macs[0].value


def test_without_data_quality_is_refused_once_not_per_target(file: Path) -> None:
    with pytest.raises(UsageError, match="EB130"):
        compare(str(file), ["cpu"])


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("import os; os.abort()", "EB610] crashed (SIGABRT)"),
        ("print('tile too wide'); raise SystemExit(3)", "exit status 3) after saying 'tile too"),
        ("import time; time.sleep(60)", "EB611] no answer within 2 s"),
    ],
)
def test_a_crash_or_hang_is_a_row_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, file: Path, code: str, told: str
) -> None:
    """The first worker that starts does `code`, the next one works."""
    real, started = comparing._run, list[str]()

    def run(folder: Path, limit_s: float) -> int | None:
        started.append(json.loads((folder / "job.json").read_text())["target"])
        if len(started) > 1:
            return real(folder, 120.0)
        with monkeypatch.context() as patch:
            patch.setattr(comparing, "COMMAND", (sys.executable, "-c", code))
            return real(folder, limit_s)

    monkeypatch.setattr(comparing, "_run", run)
    # The vendor's name is not asked: both are rows of the CPU's engine.
    monkeypatch.setattr(comparing, "_refused", lambda name: None)
    found = compare(str(file), ["npu", "cpu"], quick=True, limit_s=2.0)
    assert started == ["npu", "cpu"]
    assert told in found.rows[0].why
    assert found.rows[0].cost.latency_ms.value is None
    assert found.rows[1].why == ""
    assert found.rows[1].cost.latency_ms.value is not None


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_what_hangs_is_killed_with_all_that_it_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    proof = tmp_path / "pid"
    child = f"import subprocess,sys,time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); open({str(proof)!r}, 'w').write(str(p.pid)); time.sleep(60)"  # noqa: E501
    monkeypatch.setattr(comparing, "COMMAND", (sys.executable, "-c", child))
    assert comparing._run(tmp_path, 5.0) is None
    # The signal is sent when _run returns; a busy system may take a while to act on it.
    until = time.monotonic() + 30.0
    while _alive(int(proof.read_text())) and time.monotonic() < until:
        time.sleep(0.05)
    assert not _alive(int(proof.read_text()))


def test_targets_that_cannot_work_say_why(file: Path) -> None:
    found = compare(str(file), ["npu:coreml"], quick=True)
    assert "not built yet" in found.rows[0].why
    with pytest.raises(UsageError, match="EB140"):
        compare(str(file), ["cpu", "no-such-thing"], quick=True)
    with pytest.raises(UsageError, match="EB155"):
        compare(str(file), [], quick=True)
    assert {"cpu", "npu:hexagon"} <= set(families())
    assert not {"npu", "npu:ethos-u55-64", "gpu:webgpu/h200"} & set(families())


def test_a_table_never_shows_an_unknown_as_a_number() -> None:
    latency = Figure(value=0.25, evidence="simulated", how="estimate")
    good = Row(target="a|b", cost=Cost(macs=counted(1e6, ""), latency_ms=latency), nodes=3)
    bad = Row(target="c", why="x" * 90, hint="pip install y")
    titles, rows = table(Comparison(model="m", original=Cost(), rows=(good, bad)))
    assert rows[0][:6] == ["a|b", "1 MMACs", "unknown", "0.25 ms simulated", "unknown", "unknown"]
    assert len(rows[1]) == len(titles)
    text = markdown(Comparison(model="m", original=Cost(), rows=(good, bad)))
    assert "| a/b |" in text
    assert f"{'x' * 90}; pip install y" in text
    assert "latency simulated: estimate" in text
