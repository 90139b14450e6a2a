"""Running an artifact: right answers, refused inputs, threads, and no silent fallback."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgebudget_runtime import Manifest, Runner
from edgebudget_runtime.errors import ArtifactError, MissedError, UsageError
from edgebudget_runtime.manifest import TargetInfo, Tensor

Array = np.ndarray[Any, Any]
WEIGHT: Array = np.arange(6, dtype=np.float32).reshape(3, 2)


def picture(seed: int = 0, count: int = 1) -> Array:
    values: Array = np.random.default_rng(seed).standard_normal((count, 3, 4, 4))
    return values.astype(np.float32)


def expected(x: Array) -> Array:
    scores: Array = x.mean((2, 3)) @ WEIGHT
    return scores


def rewrite(folder: Path, **changes: Any) -> None:
    dataclasses.replace(Manifest.load(folder), **changes).save(folder)


def test_answers_and_says_what_ran(artifact: Path) -> None:
    x = picture()
    out = Runner(artifact).run({"image": x}, latency_ms=60_000)
    np.testing.assert_allclose(out.outputs["scores"], expected(x), rtol=1e-5, atol=1e-6)
    assert list(out.outputs) == ["scores"]
    assert out.ran == ("stem", "head")
    assert out.broke == ()
    assert out.engine == "onnxruntime CPUExecutionProvider"
    assert out.spent.latency_ms.evidence == "measured"
    assert out.spent.macs.value == 6


def test_a_bare_array_is_the_only_input(artifact: Path) -> None:
    runner, x = Runner(artifact, threads=1), picture()
    given, named = runner.run(x).outputs["scores"], runner.run({"image": x}).outputs["scores"]
    np.testing.assert_array_equal(given, named)


def test_a_missed_deadline_is_reported_or_raised(artifact: Path) -> None:
    runner = Runner(artifact)
    out = runner.run(picture(), latency_ms=1e-6)
    assert [v.limit.resource for v in out.broke] == ["latency_ms"]
    assert out.outputs["scores"].shape == (1, 2)
    with pytest.raises(MissedError, match="EB490"):
        runner.run(picture(), latency_ms=1e-6, strict=True)


@pytest.mark.parametrize(
    ("given", "code", "says"),
    [
        ({"img": picture()}, "EB170", "'image'"),
        ({}, "EB170", "none"),
        ({"image": picture(), "more": picture()}, "EB170", "'more'"),
        (picture()[0], "EB171", "array[None]"),
        (picture().transpose(0, 2, 3, 1), "EB171", "looks like NHWC, not NCHW"),
        (picture()[0].transpose(1, 2, 0), "EB171", "array[None].transpose(0, 3, 1, 2)"),
        (picture(count=2), "EB171", "run_batch"),
        (np.zeros((1, 3, 5, 4), np.float32), "EB171", "[1, 3, 4, 4]"),
        (np.zeros((), np.float32), "EB171", "[]"),
        (picture().astype(np.float64), "EB172", "astype('float32')"),
        (picture().astype(">f4"), "EB172", "astype('float32')"),
        (np.zeros((1, 3, 4, 4), np.uint8), "EB172", "preprocess"),
        (picture().tolist(), "EB172", "no numpy array"),
        (np.where(picture() > 0, np.nan, picture()), "EB173", "of 48 values"),
        (np.full((1, 3, 4, 4), -np.inf, np.float32), "EB173", "48 of 48"),
    ],
    ids=str,
)
def test_wrong_inputs_are_refused(artifact: Path, given: Any, code: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        Runner(artifact).run(given)
    assert caught.value.code == code
    assert says in str(caught.value)
    assert caught.value.hint


def test_a_batch_equals_its_parts(artifact: Path) -> None:
    runner, x = Runner(artifact, threads=1), picture(count=5)
    out = runner.run_batch(x)
    alone = np.concatenate([runner.run(x[i : i + 1]).outputs["scores"] for i in range(5)])
    np.testing.assert_array_equal(out.outputs["scores"], alone)
    assert out.spent.latency_ms.count == 5
    listed = runner.run_batch([{"image": x[i : i + 1]} for i in range(5)])
    np.testing.assert_array_equal(listed.outputs["scores"], alone)


@pytest.mark.parametrize("batch", [None, 2, 5, 8])
def test_a_model_with_a_batch_dimension(tmp_path: Path, batch: int | None) -> None:
    folder = scaler(tmp_path, batch)
    x: Array = np.arange(10, dtype=np.float32).reshape(5, 2)
    np.testing.assert_array_equal(Runner(folder).run_batch(x).outputs["y"], 2 * x)


def scaler(folder: Path, batch: int | None) -> Path:
    """An artifact that doubles [batch, 2]."""
    from onnx import TensorProto, helper, numpy_helper

    from edgebudget_runtime import integrity
    from edgebudget_runtime import manifest as m
    from edgebudget_runtime.cost import Cost

    shape = ["n" if batch is None else batch, 2]
    io = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in ("x", "y")]
    two = numpy_helper.from_array(np.array(2, np.float32), "two")
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "two"], ["y"])], "g", io[:1], io[1:], [two]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    f = integrity.described(folder, folder / "m.onnx")
    x, y = (Tensor(n, (batch, 2), "float32") for n in ("x", "y"))
    m.Manifest(
        name="scaler",
        target=m.TargetInfo("cpu", "onnxruntime-cpu", ""),
        workload=m.WorkloadInfo("scaler", "custom", "none", ""),
        preprocessing={},
        segments=(m.Segment("main", f.file, f.sha256, f.bytes, (x,), (y,)),),
        subnetworks=(m.SubNetwork("main", ("main",), Cost(), None, None),),
        limits=(),
        quality_limits=(),
        placement=None,
        baseline=m.Baseline(Cost()),
        passes=(),
        candidates=(),
        layers_before=(),
        layers_after=(),
        provenance=m.Provenance({}, 0),
    ).save(folder)
    return folder


@pytest.mark.parametrize(
    "batch", [[], np.zeros((0, 3, 4, 4), np.float32), np.zeros((), np.float32)]
)
def test_an_empty_batch_is_refused(artifact: Path, batch: Any) -> None:
    with pytest.raises(UsageError, match="EB171"):
        Runner(artifact).run_batch(batch)


def test_threads_do_not_mix_answers(artifact: Path) -> None:
    runner = Runner(artifact, threads=1)
    inputs = [picture(seed) for seed in range(64)]
    with ThreadPoolExecutor(8) as pool:
        outs = list(pool.map(runner.run, inputs))
    for x, out in zip(inputs, outs, strict=True):
        np.testing.assert_allclose(out.outputs["scores"], expected(x), rtol=1e-5, atol=1e-6)


def test_each_model_is_loaded_once_and_late(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgebudget_runtime import engine

    loaded: list[str] = []
    real = engine.open_session

    def counting(file: Path, **rest: Any) -> Any:
        loaded.append(file.name)
        return real(file, **rest)

    monkeypatch.setattr(engine, "open_session", counting)
    runner = Runner(artifact)
    assert loaded == []
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: runner.run(picture()), range(16)))
    assert sorted(loaded) == ["head.onnx", "stem.onnx"]


def test_a_closed_runner_is_refused(artifact: Path) -> None:
    with Runner(artifact) as runner:
        runner.run(picture())
    with pytest.raises(UsageError, match="EB174"):
        runner.run(picture())


def test_no_threads_are_refused(artifact: Path) -> None:
    with pytest.raises(UsageError, match="EB174"):
        Runner(artifact, threads=0)


def test_changed_files_are_refused_unless_told_so(artifact: Path) -> None:
    file = artifact / "segments/head.onnx"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ArtifactError, match="EB502"):
        Runner(artifact)
    with pytest.raises(ArtifactError, match="EB509"):
        Runner(artifact, verify=False).run(picture())


def test_other_outputs_than_described_are_refused(artifact: Path) -> None:
    stem, head = Manifest.load(artifact).segments
    renamed = dataclasses.replace(head, outputs=(dataclasses.replace(head.outputs[0], name="z"),))
    rewrite(artifact, segments=(stem, renamed))
    with pytest.raises(ArtifactError, match="EB509"):
        Runner(artifact).run(picture())


def test_the_cpu_says_when_it_stands_in(artifact: Path) -> None:
    rewrite(artifact, target=TargetInfo("npu:hexagon", "onnxruntime-qnn", "some phone"))
    engine = Runner(artifact).run(picture()).engine
    assert engine == "onnxruntime CPUExecutionProvider, standing in for onnxruntime-qnn"


@pytest.mark.parametrize("providers", [["NoSuchProvider"], ["CUDAExecutionProvider"], []])
def test_a_missing_provider_is_refused(artifact: Path, providers: list[str]) -> None:
    with pytest.raises(UsageError, match="EB175"):
        Runner(artifact, providers=providers).run(picture())


@pytest.mark.skipif(find_spec("onnxruntime_qnn") is None, reason="needs onnxruntime-qnn")
def test_the_npu_provider_runs_or_fails_but_never_falls_back(
    artifact: Path, tmp_path: Path
) -> None:
    npu = ["QNNExecutionProvider"]
    folder = scaler(tmp_path, 1)
    x: Array = np.array([[1.5, -3.0]], np.float32)
    out = Runner(folder, providers=npu, provider_options={"soc_model": "57"}).run(x)
    assert out.engine == "onnxruntime QNNExecutionProvider"
    np.testing.assert_allclose(out.outputs["y"], 2 * x, rtol=1e-2)  # 16-bit floats
    bad = {"backend_path": "/nonexistent/libQnnHtp.so"}
    with pytest.raises(ArtifactError, match="EB509"):
        Runner(folder, providers=npu, provider_options=bad).run(x)
    found = Runner(artifact, providers=npu).run(picture())  # the chip that the engine takes
    assert found.engine == "onnxruntime QNNExecutionProvider"
    for name, value in Runner(artifact).run(picture()).outputs.items():
        np.testing.assert_allclose(found.outputs[name], value, rtol=0.02, atol=0.02)


def run_alone(code: str, *args: str) -> None:
    subprocess.run([sys.executable, "-c", code, *args], check=True)


def test_importing_loads_no_engine() -> None:
    run_alone(
        "import sys, edgebudget_runtime; edgebudget_runtime.Manifest;"
        "bad = {'torch', 'onnx', 'onnxruntime', 'jsonschema', 'PIL'} & set(sys.modules);"
        "sys.exit(str(bad) if bad else 0)"
    )


def test_running_loads_neither_torch_nor_onnx(artifact: Path) -> None:
    run_alone(
        "import sys, numpy; from edgebudget_runtime import Runner;"
        "Runner(sys.argv[1]).run(numpy.zeros((1, 3, 4, 4), numpy.float32));"
        "bad = {'torch', 'onnx', 'jsonschema', 'edgebudget'} & set(sys.modules);"
        "sys.exit(str(bad) if bad else 0)",
        str(artifact),
    )
