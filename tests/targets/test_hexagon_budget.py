"""Latency limits on a Hexagon SoC with an estimate: planned by the cost model, proven by it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from edgebudget import target_registry
from edgebudget.compiler import compile
from edgebudget.target import Predicts, Target
from edgebudget_runtime.budget import Budget
from edgebudget_runtime.errors import InfeasibleError

pytest.importorskip(
    "onnxruntime_qnn", reason='needs the NPU emulator: pip install "edgebudget[qnn]"'
)


def test_both_forms_of_the_target_predict() -> None:
    for name in ("npu:hexagon/sa8255", "npu:hexagon/sa8255+qcs9100"):
        target: Target = target_registry.get(name)
        assert isinstance(target, Predicts)


def test_a_latency_limit_is_proven_by_the_compilers_estimate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEBUDGET_CACHE", str(tmp_path / "cache"))
    done = compile("digits", out=tmp_path / "out", target="npu:hexagon/sa8255",
                   budget=Budget.parse(latency="0.02ms"))  # fmt: skip
    (limit,) = [x for x in done.manifest.limits if x.resource == "latency_ms"]
    assert limit.holds
    assert limit.proven.evidence == "simulated"
    assert "not compared with silicon" in limit.proven.how
    page = (tmp_path / "out" / "report.html").read_text()
    assert "modelled: model fitted on the compiler" in page
    assert "Roofline" in page
    context = onnx.load(tmp_path / "out" / "segments" / "main_ctx.onnx")
    assert [n.op_type for n in context.graph.node] == ["EPContext"]
    assert np.isfinite(done.manifest.subnetworks[0].cost.latency_ms.value or np.nan)


def test_what_no_smaller_network_reaches_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEBUDGET_CACHE", str(tmp_path / "cache"))
    with pytest.raises(InfeasibleError):
        compile("digits", out=tmp_path / "out", target="npu:hexagon/sa8255",
                budget=Budget.parse(latency="0.001ms"))  # fmt: skip
    assert not (tmp_path / "out").exists()
