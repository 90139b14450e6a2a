"""What an inference does, by type; and energies filled in where nothing measured any."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgebudget.cli import main
from edgebudget.energy_model import Sample, Work, fit
from edgebudget.work import work_of
from edgebudget_runtime import engine
from tests.runtime import elastic_artifact as ea


def test_work_is_counted_by_type() -> None:
    """A float convolution, then an integer one: Q, DQ around it."""
    weight = numpy_helper.from_array(np.ones((4, 3, 1, 1), np.float32), "w")
    small = numpy_helper.from_array(np.ones((2, 4, 1, 1), np.int8), "v8")
    step = numpy_helper.from_array(np.array(0.5, np.float32), "step")
    zero = numpy_helper.from_array(np.array(0, np.uint8), "zero")
    nought = numpy_helper.from_array(np.array(0, np.int8), "nought")
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], name="float"),
        helper.make_node("QuantizeLinear", ["a", "step", "zero"], ["a8"]),
        helper.make_node("DequantizeLinear", ["a8", "step", "zero"], ["b"]),
        helper.make_node("DequantizeLinear", ["v8", "step", "nought"], ["v"]),
        helper.make_node("Conv", ["b", "v"], ["c"], name="integer"),
        helper.make_node("QuantizeLinear", ["c", "step", "zero"], ["y"]),
    ]
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 5, 5])
    made = helper.make_tensor_value_info("y", TensorProto.UINT8, [1, 2, 5, 5])
    graph = helper.make_graph(nodes, "g", [given], [made], [weight, small, step, zero, nought])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    work = work_of([model], 0.5)
    assert work.macs == {"float32": 4 * 3 * 25, "int8": 2 * 4 * 25}
    weights = 4 * 3 * 4 + 2 * 4 + 4 + 1 + 1
    # x and a are floats, a8 and y are bytes; b and c never leave the integer kernel
    assert work.bytes["dram"] >= weights + 2 * (4 * 75 + 100 + 50)
    twice = work_of([model, model], 1.0)
    assert twice.macs["int8"] == 2 * work.macs["int8"]
    assert twice.bytes["dram"] == 2 * work.bytes["dram"]


def test_unmeasured_energies_are_filled_in_and_named_as_modelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EDGEBUDGET_CACHE", str(tmp_path / "cache"))
    ea.write(tmp_path / "toy")
    command = ["profile", str(tmp_path / "toy"), "--seconds", "0.1", "--no-energy", "--json"]
    assert main([*command, "--energy-model", "7nm"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert {e["evidence"] for e in said["energy_mj"].values()} == {"modelled"}
    assert said["energy_mj"].keys() == ea.PATHS.keys()
    assert main(["frontier", str(tmp_path / "toy"), "--json"]) == 0
    ways = json.loads(capsys.readouterr().out)["ways"]
    assert ways[0]["energy_mj"]["evidence"] == "modelled"
    assert main([*command, "--energy-model", "3nm"]) == 2
    assert "[EB148]" in capsys.readouterr().err


def test_a_fitted_model_is_only_used_where_it_was_fitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EDGEBUDGET_CACHE", str(tmp_path / "cache"))
    ea.write(tmp_path / "toy")
    rng = np.random.default_rng(0)
    samples = [
        Sample(
            work=Work(macs={"float32": m}, bytes={"dram": b}, seconds=t),
            joules=1e-11 * m + 1e-10 * b + 5 * t,
            group=str(i),
        )
        for i, (m, b, t) in enumerate(10 ** rng.uniform([9, 8, -2], [10, 9, -1], (12, 3)))
    ]
    model = fit(samples, device="d", engine="onnxruntime-cpu", engine_version=engine.VERSION)
    model.save(tmp_path / "m.json")
    command = ["profile", str(tmp_path / "toy"), "--seconds", "0.1", "--no-energy", "--no-layers"]
    command += ["--energy-model", str(tmp_path / "m.json")]
    assert main([*command, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["energy_mj"] == {}  # such tiny networks were never measured
    assert any("stays unknown" in n and "the least that was measured" in n for n in said["notes"])
    dataclasses.replace(model, engine_version="0.1").save(tmp_path / "m.json")
    assert main(command) == 5
    assert "[EB588]" in capsys.readouterr().err
