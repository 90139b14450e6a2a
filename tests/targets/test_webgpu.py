"""WebGPU on a GPU, else on software Vulkan where that is set up; and its faults."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edgebudget import doctor, graph, target_registry
from edgebudget.calibration_nets import network
from edgebudget.counter import count
from edgebudget_runtime.errors import ArtifactError, TargetError, UsageError
from edgebudget_targets import _webgpu_process
from edgebudget_targets._webgpu_kernels import kernels
from edgebudget_targets._webgpu_process import Engine, find_engine
from edgebudget_targets.onnxruntime_webgpu import WebGpuTarget, place
from tests.passes.quant_nets import Net
from tests.targets.conftest import conv_net, pictures

Array = np.ndarray[Any, Any]


def _target(name: str = "gpu") -> WebGpuTarget:
    target = target_registry.get(name)
    assert isinstance(target, WebGpuTarget)
    return target


@pytest.fixture
def target() -> WebGpuTarget:
    """With an engine that answers."""
    engine = find_engine()
    if not engine.python:
        pytest.skip(f"no WebGPU engine: {engine.why}")
    return _target()


@pytest.fixture
def half_file(tmp_path: Path) -> Path:
    return _target().lower(graph.program(conv_net()), tmp_path, "main").file


def _det_file(tmp_path: Path) -> Path:
    """An operator that WebGPU does not have, behind one that it has."""
    nodes = [helper.make_node("Relu", ["x"], ["r"], "relu"),
             helper.make_node("Det", ["r"], ["y"], "my det")]  # fmt: skip
    made = helper.make_graph(
        nodes, "det",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])],
    )  # fmt: skip
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, tmp_path / "det.onnx")
    return tmp_path / "det.onnx"


def test_the_gpu_computes_what_the_float_model_does(target: WebGpuTarget, half_file: Path) -> None:
    x = pictures(3)
    got = target.open(half_file, exact=True).run({"x": x})["y"]
    expected = np.concatenate([graph.run(conv_net(), {"x": p[None]})["y"] for p in x])
    assert got.dtype == np.float32
    assert np.abs(got - expected).max() <= 4e-3 * np.abs(expected).max()


def test_every_node_is_on_the_gpu(target: WebGpuTarget, half_file: Path) -> None:
    placement = target.placement(half_file)
    assert placement.fallback == ()
    assert len(placement.nodes) == len(onnx.load(half_file).graph.node)


def test_a_node_left_to_the_cpu_is_named(target: WebGpuTarget, tmp_path: Path) -> None:
    file = _det_file(tmp_path)
    (left,) = target.placement(file).fallback
    assert (left.name, left.op, left.processor) == ("my det", "Det", "cpu")
    assert "Det" in left.why
    with pytest.raises(TargetError, match="EB613"):  # never quietly on the CPU
        target.open(file, exact=True).run({"x": np.zeros((1, 4, 8, 8), np.float32)})


def test_time_is_measured_on_a_gpu_and_unknown_without(
    target: WebGpuTarget, half_file: Path
) -> None:
    figure = target.latency(half_file, {"x": pictures(1)}, 5)
    assert figure.evidence == ("measured" if target.spec.tells else "unknown")
    assert (figure.value is None) == (figure.evidence == "unknown")


def test_wrong_inputs_and_files_are_named(
    target: WebGpuTarget, half_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="EB142"):
        target.open(half_file, exact=True).run({"x": np.zeros((1, 3, 8, 8), np.float32)})
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    with pytest.raises(ArtifactError, match="EB510"):
        target.placement(tmp_path / "bad.onnx")


def test_names_survive_what_the_engine_adds() -> None:
    cpu, gpu = "CPUExecutionProvider", "WebGpuExecutionProvider"
    rows = place(
        [("conv", "Conv"), ("my_token_x", "Relu"), ("det", "Det")],
        [(gpu, "Transpose", "Transpose"), (gpu, "Conv", "conv_token_3"),
         (cpu, "Relu", "my_token_x"), (cpu, "Det", "det_token_9"), (cpu, "MemcpyToHost", "Memcpy")],
    )  # fmt: skip
    assert [(r.name, r.processor) for r in rows] == [
        ("conv", "gpu"), ("my_token_x", "cpu"), ("det", "cpu"), ("Memcpy", "cpu"),
    ]  # fmt: skip


# Faults: nothing here needs an engine.


def _without(monkeypatch: pytest.MonkeyPatch, engine: Engine) -> WebGpuTarget:
    monkeypatch.setattr("edgebudget_targets.onnxruntime_webgpu.find_engine", lambda: engine)
    return _target()


def test_a_missing_engine_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, half_file: Path
) -> None:
    monkeypatch.setattr(_webgpu_process, "find_spec", lambda name: None)
    target = _without(monkeypatch, _webgpu_process._on_gpu())
    state = target.available()
    assert not state.ok
    assert "onnxruntime-ep-webgpu is not installed" in state.why
    assert 'pip install "edgebudget[webgpu]"' in state.install
    for attempt in (
        lambda: target.placement(half_file),
        lambda: target.latency(half_file, {"x": pictures(1)}, 3),
        lambda: target.open(half_file, exact=True),
    ):
        with pytest.raises(TargetError, match="EB601") as caught:
            attempt()
        assert caught.value.exit_code == 6
    engines = {f["name"]: f for f in doctor.diagnose() if f["kind"] == "engine"}
    assert not engines["onnxruntime-webgpu (gpu)"]["ok"]


def test_a_missing_vulkan_loader_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_webgpu_process, "find_spec", lambda name: object())
    monkeypatch.setattr(_webgpu_process, "_loads", lambda library: False)
    engine = _webgpu_process._on_gpu()
    assert "libvulkan.so.1" in engine.why
    assert "apt-get install libvulkan1" in engine.install


@pytest.mark.parametrize(
    ("error", "why", "install"),
    [
        ("Failed to get a WebGPU adapter: No supported adapters", "no Vulkan driver", "driver"),
        ("RuntimeError: no WebGPU device", "has no GPU", "a machine with a GPU"),
        (
            'ORT runtime version "1.23.0" is below the minimum required version "1.24.4"',
            "does not work with onnxruntime",
            "pip install --upgrade onnxruntime",
        ),
    ],
)
def test_no_adapter_and_a_wrong_version_are_told_apart(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: str, why: str, install: str
) -> None:
    _worker(
        monkeypatch,
        tmp_path,
        f"""
import json
open("result.json", "w").write(json.dumps({{"ok": False, "error": {error!r}}}))
""",
    )
    monkeypatch.setattr(_webgpu_process, "find_spec", lambda name: object())
    monkeypatch.setattr(_webgpu_process, "_loads", lambda library: True)
    monkeypatch.setattr(_webgpu_process, "version", lambda name: "0.4.0")
    engine = _webgpu_process._on_gpu()
    assert not engine.python
    assert why in engine.why
    assert install in engine.install
    assert "software Vulkan" in engine.install


def _worker(monkeypatch: pytest.MonkeyPatch, folder: Path, code: str) -> None:
    (folder / "worker.py").write_text(code)
    monkeypatch.setattr(_webgpu_process, "WORKER", folder / "worker.py")


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("import os; os.abort()", "SIGABRT"),
        ("print('device lost'); raise SystemExit(3)", "exit status 3) after saying 'device lost'"),
    ],
)
def test_a_crash_is_one_clear_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, half_file: Path, code: str, told: str
) -> None:
    _worker(monkeypatch, tmp_path, code)
    target = _without(monkeypatch, Engine(sys.executable, False, "a GPU", "0.4.0"))
    with pytest.raises(TargetError, match="EB610") as caught:
        target.open(half_file, exact=True).run({"x": pictures(1)})
    assert told in caught.value.what


def test_a_hanging_engine_is_killed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    proof = tmp_path / "pid"
    _worker(
        monkeypatch,
        tmp_path,
        f"""
import os, time
open({str(proof)!r}, "w").write(str(os.getpid()))
time.sleep(60)
""",
    )
    with pytest.raises(TargetError, match="EB611"):
        _webgpu_process.run_job({"action": "probe"}, {}, 3.0, "a GPU")
    assert not Path(f"/proc/{proof.read_text()}").exists()


def test_software_vulkan_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_webgpu_process, "find_spec", lambda name: None)
    engine = _webgpu_process._find.__wrapped__(("/no/such/python", "", ""))
    assert "is not installed" in engine.why
    assert "/no/such/python" in engine.why


def test_software_vulkan_claims_no_time(monkeypatch: pytest.MonkeyPatch, half_file: Path) -> None:
    target = _without(monkeypatch, Engine(sys.executable, True, "software Vulkan", "1"))
    assert not target.spec.tells
    figure = target.latency(half_file, {"x": pictures(1)}, 5)
    assert (figure.value, figure.evidence) == (None, "unknown")
    assert target.compare(half_file, half_file, {"x": pictures(1)}) is None


def test_a_gpu_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    target = _without(monkeypatch, Engine(sys.executable, False, "a GPU", "0.4.0"))
    assert target.spec.tells == ("latency_ms",)
    assert target.spec.device == "a GPU"


def test_another_gpu_is_predicted_where_its_shaders_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    engine = Engine(sys.executable, True, "software Vulkan", "1")
    monkeypatch.setattr("edgebudget_targets.onnxruntime_webgpu.find_engine", lambda: engine)
    target = _target("gpu:webgpu/h200")
    assert target.spec.tells == ("latency_ms", "energy_mj")
    assert target.spec.device == "NVIDIA H200"
    body = network(13, 4.0)
    shape = tuple(d.dim_value for d in body.graph.input[0].type.tensor_type.shape.dim)
    file = target.lower(graph.program(body), tmp_path, "main").file
    inputs = {"x": np.zeros(shape, np.float32)}
    for figure in (target.latency(file, inputs, 5), target.energy(file, inputs)):
        assert figure.evidence == "modelled"
        assert "median error" in figure.how
        assert "NVIDIA H200" in figure.device
    assert target.latency(file, inputs, 5, statistic="p99").value is None
    assert target.compare(file, file, inputs) is None
    here = _without(monkeypatch, Engine(sys.executable, False, "NVIDIA H200", "0.4.0"))
    assert "latency_ms" in here.spec.tells
    monkeypatch.setattr(here, "times", lambda files, inputs, runs: [np.full(runs, 2.0)])
    assert here.latency(file, inputs, 5).evidence == "measured"


def test_kernels_are_the_nodes_that_compute() -> None:
    net = Net()
    a = net.add("Relu", net.conv("x", 3, 8))
    b = net.conv(a, 8, 8, group=8)
    b = net.add("Mul", b, net.add("Sigmoid", b))
    model = net.model(net.add("Sigmoid", net.add("Add", b, a), out="y"))
    found = [k for _, k in kernels(model)]
    assert [k.kind for k in found] == ["Input", "Output", "Conv", "Conv.dw", "Add", "Sigmoid"]
    assert sum(k.macs for k in found) == count(graph.program(model)).macs


@pytest.mark.parametrize("number", [5, 8, 14])
def test_kernels_in_half_precision_are_kinds_of_their_own(number: int, tmp_path: Path) -> None:
    whole = graph.program(network(number))
    files = [_target(f"gpu:webgpu/{t}").lower(whole, tmp_path, t).file for t in ("fp32", "fp16")]
    single, half = ([k for _, k in kernels(onnx.load(f))] for f in files)
    assert not any(k.kind.endswith(".half") for k in single)
    assert all(k.kind.endswith(".half") for k in half if k.macs)
    assert [k.macs for k in half if k.macs] == [k.macs for k in single if k.macs]


def test_the_observer_answers_as_its_engine_does(
    monkeypatch: pytest.MonkeyPatch, half_file: Path
) -> None:
    target = _without(monkeypatch, Engine(sys.executable, False, "a GPU", "0.4.0"))
    code = """
from edgebudget_targets._pipe import serve
import numpy as np
def answer(request, arrays):
    assert request["energy_s"] == 0.0 and len(arrays) == 1
    return {}, [np.array([3.0, 1.0, 2.0])]
serve(answer)
"""
    module = "edgebudget_targets.onnxruntime_webgpu._OBSERVE"
    monkeypatch.setattr(module, (sys.executable, "-c", code))
    seen = target.observe(half_file)
    assert (seen.total_ms, seen.energy_mj) == (2.0, None)
    assert seen.kernels == target.kernels(half_file)
    target = _without(monkeypatch, Engine(sys.executable, False, "a GPU", "0.4.0"))
    monkeypatch.setattr(module, (sys.executable, "-c", "import os; os.abort()"))
    with pytest.raises(TargetError, match="EB610"):
        target.observe(half_file)
