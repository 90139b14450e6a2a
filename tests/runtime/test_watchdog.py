"""A late segment is stopped, and the answer of the exit before it stands."""

from __future__ import annotations

import time
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from threading import active_count
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from edgebudget_runtime import Runner, engine
from edgebudget_runtime.errors import ArtifactError
from edgebudget_runtime.inputs import Array
from edgebudget_runtime.watchdog import Watchdog
from tests.runtime import elastic_artifact as ea

X = ea.unsure()


def products(count: int, side: int = 256) -> ort.InferenceSession:
    """A chain of matrix products of x [side, side] with itself."""
    names = ["x", *(f"y{i}" for i in range(count))]
    nodes = [helper.make_node("MatMul", ["x", a], [b]) for a, b in pairwise(names)]
    x, y = (
        helper.make_tensor_value_info(n, TensorProto.FLOAT, [side, side]) for n in ("x", names[-1])
    )
    model = helper.make_model(
        helper.make_graph(nodes, "products", [x], [y]),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def test_the_engine_stops_when_told_and_serves_again() -> None:
    session, watchdog = products(3000), Watchdog()
    feed: Mapping[str, Array] = {"x": np.eye(256, dtype=np.float32)}
    with watchdog.limit(0.01) as options, pytest.raises(ArtifactError, match="terminate"):
        engine.run_session(session, feed, None, options)
    assert options.terminate
    with watchdog.limit(600.0) as options:
        (found,) = engine.run_session(session, feed, None, options).values()
    assert not options.terminate
    np.testing.assert_array_equal(found, feed["x"])
    watchdog.close()


def test_deadlines_are_kept_in_any_order_by_one_thread() -> None:
    before, watchdog = active_count(), Watchdog()
    with watchdog.limit(600.0) as late, watchdog.limit(0.02) as soon:
        while not soon.terminate:
            time.sleep(0.001)
        with watchdog.limit(0.0) as now:
            while not now.terminate:
                time.sleep(0.001)
        assert not late.terminate
        assert active_count() == before + 1
    watchdog.close()
    assert active_count() == before


def test_the_exit_before_a_late_segment_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ea.write(tmp_path / "toy")
    real = engine.run_session

    def stalls(session: Any, feed: Mapping[str, Array], names: Any, options: Any = None) -> Any:
        if session.get_modelmeta().graph_name != "s1" or options is None:
            return real(session, feed, names, options)
        while not options.terminate:
            time.sleep(0.001)
        raise ArtifactError("EB509", "ONNX Runtime failed: the terminate flag is set", hint="")

    monkeypatch.setattr(engine, "run_session", stalls)
    profile = ea.profile_of(tmp_path / "toy", dict.fromkeys(ea.MS, 1.0))
    with Runner(tmp_path / "toy", profile=profile, threads=1) as runner:
        runner.warm_up()
        out = runner.run(X, latency_ms=400.0)
        assert (out.exit, out.degraded) == ("s0", True)
        assert "s1 was stopped" in out.why
        assert out.ran == ("s0", "s1")
        np.testing.assert_allclose(out.outputs["scores"], ea.expected(X, "s0"))
        assert runner.run(X, latency_ms=400.0, policy="fixed:exit1").exit == "s0"
        assert not runner.run(X).degraded  # no deadline: nothing is watched
