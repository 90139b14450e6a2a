"""Single nodes of an artifact: what they move, where their times come from, how they are drawn."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgebudget import layer_times, measure_roof
from edgebudget.cli import main
from edgebudget.layer_loads import Anatomy, Load, Roof, anatomy, graph_loads
from edgebudget.report import render
from edgebudget.report_layers import chapter, rate, reachable, roofline
from edgebudget_runtime import manifest as m
from edgebudget_runtime import profile
from edgebudget_runtime.cost import Figure
from edgebudget_runtime.device_id import here
from edgebudget_runtime.errors import ArtifactError


def _qdq() -> onnx.ModelProto:
    """A convolution of 8-bit integers: 1x4x8x8 to 1x8x8x8, 3x3."""
    weights = {
        "s": np.float32(0.1), "z": np.uint8(0), "ws": np.ones(8, np.float32),
        "wz": np.zeros(8, np.int8), "w": np.ones((8, 4, 3, 3), np.int8),
    }  # fmt: skip
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], "q"),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["xr"], "dq"),
            helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wr"], "wdq", axis=0),
            helper.make_node("Conv", ["xr", "wr"], ["c"], "conv", pads=[1] * 4),
            helper.make_node("QuantizeLinear", ["c", "s", "z"], ["cq"], "cq"),
            helper.make_node("DequantizeLinear", ["cq", "s", "z"], ["y"], "ydq"),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 8, 8, 8])],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_integers_are_counted_as_they_are_stored() -> None:
    (load,) = graph_loads(_qdq(), "main")
    assert (load.name, load.op) == ("conv", "Conv")
    assert load.macs == 8 * 8 * 8 * 4 * 9
    assert load.bytes == 4 * 64 + 8 * 64 + 8 * 4 * 9  # one byte each


def _roof(peak: float = 1e9, bandwidth: float = 1e8) -> Roof:
    return Roof(Figure(value=peak, evidence="measured", how="p", device="d"),
                Figure(value=bandwidth, evidence="modelled", how="b", device="d"))  # fmt: skip


def test_the_roof_binds_by_bytes_first_and_arithmetic_then() -> None:
    slim, fat = (
        Load("main", "a", "Conv", 100.0, 100.0, 1.0),
        Load("main", "b", "Conv", 1e6, 1e3, 2.0),
    )
    assert (reachable(slim, _roof()), reachable(fat, _roof())) == (1e8, 1e9)
    assert rate(fat) == 5e8
    drawn = roofline([slim, fat], _roof())
    assert drawn.count("<circle") == 2
    assert "50% of what the roof allows" in drawn


def test_evidence_is_said_and_nothing_is_drawn_without_times() -> None:
    untimed = Anatomy((Load("main", "a", "Conv", 10.0, 10.0),))
    assert "No node was timed" in chapter(untimed, None)
    assert "<circle" not in chapter(untimed, None)
    assert chapter(Anatomy(()), None) == ""
    timed = Anatomy((Load("main", "<a>", "Conv", 10.0, 10.0, 0.5),), _roof(), "modelled", "guess")
    text = chapter(timed, m.Placement("npu", {"npu": 0, "cpu": 1},
                                      (m.FallbackNode("<a>", "Conv", "cpu", "wide"),)))  # fmt: skip
    assert "(modelled: guess)" in text
    assert "(measured: p)" in text
    assert "(modelled: b)" in text
    assert "on cpu: wide" in text
    assert "<a>" not in text


def _onnxruntime_profile(folder: Path, file: Path) -> Path:
    options = ort.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "ort")
    session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    feed: dict[str, Any] = {
        i.name: np.zeros([d if isinstance(d, int) else 1 for d in i.shape], np.float32)
        for i in session.get_inputs()
    }
    for _ in range(5):
        session.run(None, feed)
    return Path(session.end_profiling())


def test_equal_artifacts_give_equal_pages(artifact: Path) -> None:
    manifest = m.Manifest.load(artifact)
    pages = {render(manifest, anatomy(artifact, manifest)) for _ in range(2)}
    assert len(pages) == 1
    assert "Node by node" in pages.pop()


def test_the_command_takes_onnxruntimes_own_profile(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = m.Manifest.load(artifact)
    first = manifest.segments[0]
    file = _onnxruntime_profile(tmp_path, artifact / first.file)
    with pytest.raises(ArtifactError, match=r"EB580.*several segments"):
        layer_times.read(file, manifest, "")
    sub = dataclasses.replace(manifest.subnetworks[0], path=(first.id,))
    dataclasses.replace(manifest, segments=(first,), subnetworks=(sub,)).save(artifact)
    out = tmp_path / "r.html"
    code = main(["report", str(artifact), "--profile", str(file), "--out", str(out)])
    assert code == 0, capsys.readouterr().err
    text = out.read_text()
    assert re.search(r"\d+ nodes take [0-9.e-]+ ms \(measured: ONNX Runtime", text)
    assert "Roofline" not in text  # the file does not say where it was made: no roof


def test_a_profile_of_this_machine_gets_its_roofline(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = m.Manifest.load(artifact)
    layers = [{"segment": s.segment, "name": s.name, "op": s.op, "ms": 0.01, "share": 0.1}
              for s in anatomy(artifact, manifest).loads]  # fmt: skip
    layers.append({"segment": "main", "name": layers[0]["name"], "op": "x", "ms": 9.0,
                   "share": 0.1, "added": True})  # fmt: skip
    device = {"cpu": here("", "", 1).cpu, "threads": 1}
    found = {"artifact": profile.digest(artifact), "device": device, "detail": {"layers": layers}}
    file, out = tmp_path / "p.json", tmp_path / "r.html"
    file.write_text(json.dumps(found))
    monkeypatch.setattr(measure_roof, "_SECONDS", 0.01)
    assert main(["report", str(artifact), "--profile", str(file), "--out", str(out)]) == 0
    assert "Roofline" in out.read_text()
    assert "9 ms" not in out.read_text()  # the engine's own node is not the file's
    times = layer_times.read(file, manifest, profile.digest(artifact))
    assert set(times.ms.values()) == {0.01}


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("no json", "EB580"),
        ("{}", "EB580"),
        ("[]", "EB580"),
        ('[{"cat": "Node", "name": "a_kernel_time", "dur": -1}]', "EB580"),
        ('{"artifact": "0", "device": {}, "detail": null}', "EB581"),
    ],
)
def test_what_is_no_profile_of_this_artifact_is_refused(
    artifact: Path, tmp_path: Path, text: str, code: str
) -> None:
    manifest, file = m.Manifest.load(artifact), tmp_path / "p.json"
    file.write_text(text)
    with pytest.raises(ArtifactError, match=code):
        layer_times.read(file, manifest, profile.digest(artifact))
    with pytest.raises(ArtifactError, match="EB580"):
        layer_times.read(tmp_path / "absent", manifest, "")
