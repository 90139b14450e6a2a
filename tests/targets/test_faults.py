"""The NPU engine missing, crashing, hanging or answering nonsense; needs no engine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from edgebudget import doctor, target_registry
from edgebudget.program import Program
from edgebudget.target import Availability
from edgebudget_runtime.errors import TargetError
from edgebudget_targets import _qnn_process, onnxruntime_qnn
from edgebudget_targets._qnn_emulator import Limits
from edgebudget_targets._qnn_report import place, read_estimate, refusals
from edgebudget_targets.onnxruntime_qnn import HexagonTarget

Array = np.ndarray[Any, Any]


def _target(limits: Limits | None = None) -> HexagonTarget:
    return HexagonTarget(target_registry.get("npu").spec, limits)


@pytest.fixture
def present(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HexagonTarget, "available", lambda self: Availability(ok=True))


def _worker(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    monkeypatch.setattr(_qnn_process, "COMMAND", (sys.executable, "-c", code))


def test_a_missing_engine_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, qdq_file: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(onnxruntime_qnn, "find_spec", lambda name: None)
    target = _target()
    state = target.available()
    assert not state.ok
    assert "onnxruntime-qnn is not installed" in state.why
    assert state.install == 'pip install "edgebudget[qnn]"'
    for attempt in (
        lambda: target.placement(qdq_file),
        lambda: target.estimate(qdq_file),
        lambda: target.open(qdq_file, exact=True),
    ):
        with pytest.raises(TargetError, match="EB601") as caught:
            attempt()
        assert caught.value.exit_code == 6
    lowered = target.lower(Program("graph", onnx.load(qdq_file), (), ()), tmp_path, "main")
    assert lowered.extra == ()
    assert "not installed" in lowered.notes[0]
    engines = {f["name"]: f for f in doctor.diagnose() if f["kind"] == "engine"}
    assert engines["onnxruntime-cpu (cpu)"]["ok"]
    assert not engines["onnxruntime-qnn (npu)"]["ok"]
    assert "edgebudget[qnn]" in engines["onnxruntime-qnn (npu)"]["install"]


@pytest.mark.usefixtures("present")
@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("import os; os.abort()", "SIGABRT"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        ("raise SystemExit(3)", "exit status 3"),
        ("print(' <E> graph too deep'); raise SystemExit(1)", "graph too deep"),
    ],
)
def test_a_crash_is_one_clear_error(
    monkeypatch: pytest.MonkeyPatch, qdq_file: Path, batch: Array, code: str, told: str
) -> None:
    _worker(monkeypatch, code)
    with pytest.raises(TargetError, match="EB610") as caught:
        _target().open(qdq_file, exact=True).run({"x": batch})
    assert told in caught.value.what


@pytest.mark.usefixtures("present")
def test_a_hanging_engine_is_killed(
    monkeypatch: pytest.MonkeyPatch, qdq_file: Path, batch: Array, tmp_path: Path
) -> None:
    proof = tmp_path / "pid"
    _worker(
        monkeypatch,
        f"import os, time; open({str(proof)!r}, 'w').write(str(os.getpid())); time.sleep(60)",
    )
    limits = Limits(start_s=3.0, input_s=0.0)
    with pytest.raises(TargetError, match="EB611"):
        _target(limits).open(qdq_file, exact=True).run({"x": batch})
    assert not Path(f"/proc/{proof.read_text()}").exists()


@pytest.mark.usefixtures("present")
def test_an_engine_failure_keeps_its_words(monkeypatch: pytest.MonkeyPatch, qdq_file: Path) -> None:
    _worker(
        monkeypatch,
        "open('result.json', 'w').write('{\"ok\": false, \"error\": \"Fail: no such\\\\nthing\"}')",
    )
    with pytest.raises(TargetError, match=r"EB613.*Fail: no such thing"):
        _target().placement(qdq_file)


_LOG = """\
2026-01-01 [V:x.cc:1 LogNodeSupport] Validation PASSED for 1 nodes in OrtNodeUnit (Relu) :
\tOperator type: Relu Node name: ebn0x Node index: 0

2026-01-01 [V:x.cc:1 LogNodeSupport] Validation FAILED for 2 nodes in OrtNodeUnit (Sort) :
\tOperator type: DequantizeLinear Node name: ebn1x_token_7 Node index: 1
\tOperator type: Sort Node name: ebn2x Node index: 2
\tREASON : bad type.Sort node `ebn2x`
 is too wide
2026-01-01 [I:y.cc:1 Other] something else
"""


def test_reasons_are_read_with_the_names_of_the_file() -> None:
    found = refusals(_LOG, ["relu", "dq", "my sort"])
    assert found == {i: "bad type. Sort node `my sort` is too wide" for i in (1, 2)}


def test_a_node_that_the_engine_adds_on_the_cpu_counts_as_fallback() -> None:
    cpu, npu = "CPUExecutionProvider", "QNNExecutionProvider"
    rows = place(
        [("a", "Relu"), ("b", "Sort"), ("c", "Relu")],
        [(npu, "Relu", "ebn0x_token_1"), (cpu, "Sort", "ebn1x"), (npu, "Sort", "ebn1x"),
         (cpu, "Cast", "InsertedCast"), (npu, "Transpose", "Transpose_token_3")],
        {},
    )  # fmt: skip
    assert [(r.name, r.processor) for r in rows] == [
        ("a", "npu"),
        ("b", "cpu"),
        ("c", "npu"),
        ("InsertedCast", "cpu"),
    ]
    assert rows[1].why == "the engine gave no reason"


def test_no_estimate_is_not_a_zero(tmp_path: Path) -> None:
    assert read_estimate(tmp_path / "absent.csv") == {}
    file = tmp_path / "p.csv"
    file.write_text(
        "Msg Timestamp,Message,Time,Event Identifier\n0,FINALIZE,9,QNN (finalize) time\n"
    )
    assert read_estimate(file) == {}
