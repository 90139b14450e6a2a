"""ExecuTorch with XNNPACK: the numbers, the placement and the faults of `.pte` files."""

from __future__ import annotations

import hashlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgebudget import graph as graphs
from edgebudget import target_registry
from edgebudget.count_onnx import count_graph
from edgebudget.program import Program
from edgebudget.segment_graph import graph_file, graph_hash, read_graph
from edgebudget.target import Lowered
from edgebudget.verify import output_steps
from edgebudget_passes import quantize_int8
from edgebudget_runtime.errors import ArtifactError, TargetError, UnsupportedError, UsageError
from edgebudget_targets import executorch_xnnpack
from edgebudget_targets.executorch_xnnpack import XnnpackTarget
from tests.passes.quant_nets import CPU, Net, Noise, context, residual

pytest.importorskip("executorch", reason="ExecuTorch is not installed")

Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def target() -> XnnpackTarget:
    found = target_registry.get("cpu:xnnpack")
    assert isinstance(found, XnnpackTarget)
    return found


@pytest.fixture(scope="module")
def quantized(target: XnnpackTarget) -> Program:
    """A residual network in 8 bits, its last layer included."""
    config = quantize_int8.Config(label_bias="off")
    noise = Noise()
    return quantize_int8.run(
        graphs.program(residual()), config, context(noise, target.spec)
    ).program


@pytest.fixture(scope="module")
def lowered(
    target: XnnpackTarget, quantized: Program, tmp_path_factory: pytest.TempPathFactory
) -> Lowered:
    return target.lower(quantized, tmp_path_factory.mktemp("pte"), "main")


def batch(count: int = 3) -> Array:
    return np.stack([Noise().sample(200 + i).inputs["x"] for i in range(count)])


def test_answers_are_those_of_the_onnx_graph(
    target: XnnpackTarget, quantized: Program, lowered: Lowered
) -> None:
    got = target.open(lowered.file).run({"x": batch()})["y"]
    want = np.concatenate([graphs.run(quantized.body, {"x": x[None]})["y"] for x in batch()])
    assert got.shape == want.shape == (3, 5)
    assert np.abs(got - want).max() <= output_steps(lowered.file)["y"] * 1.001


def test_every_operator_runs_in_xnnpack_and_is_counted(
    target: XnnpackTarget, quantized: Program, lowered: Lowered, tmp_path: Path
) -> None:
    placement = target.placement(lowered.file)
    assert [n.name for n in placement.nodes] == [n.name for n in quantized.body.graph.node]
    assert placement.fallback == ()
    described = read_graph(lowered.file)
    ours, theirs = count_graph(described), count_graph(quantized.body)
    assert (ours.macs, ours.params) == (theirs.macs, theirs.params)
    whole = target_registry.get("cpu").lower(quantized, tmp_path, "main").file
    assert graph_hash(lowered.file) == hashlib.sha256(whole.read_bytes()).hexdigest()
    assert lowered.extra == (graph_file(lowered.file),)
    # The large weights are in the .pte alone.
    assert b"forward" in lowered.file.read_bytes()
    largest = max(quantized.body.graph.initializer, key=lambda t: t.ByteSize())
    assert lowered.file.stat().st_size > largest.ByteSize()


def test_an_operator_outside_xnnpack_is_named_with_a_reason(
    target: XnnpackTarget, tmp_path: Path
) -> None:
    net = Net()
    a = net.add("Relu", net.conv("x", 3, 4))
    cuts = [net.store(np.asarray(v)) for v in ([0, 0], [16, 16], [2, 3], [2, 2])]
    b = net.add("Slice", a, *cuts, out="every_second")
    c = net.add("Erf", b, out="bell")
    model = net.model(net.add("GlobalAveragePool", c, out="y"))
    file = target.lower(graphs.program(model), tmp_path, "main").file
    left = {n.name: n for n in target.placement(file).fallback}
    assert set(left) == {"every_second", "bell"}
    assert left["bell"].processor == "portable"
    assert "erf" in left["bell"].why
    assert "XNNPACK" in left["every_second"].why
    inputs = {"x": batch(1)}
    want, got = graphs.run(model, inputs)["y"], target.open(file).run(inputs)["y"]
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_float_network_equals_onnx_runtime(target: XnnpackTarget, tmp_path: Path) -> None:
    model = residual()
    file = target.lower(graphs.program(model), tmp_path, "main").file
    got = target.open(file).run({"x": batch(1)})["y"]
    np.testing.assert_allclose(got, graphs.run(model, {"x": batch(1)})["y"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [2, 4, 6])
def test_values_of_unlike_ranges_are_joined(
    target: XnnpackTarget, tmp_path: Path, count: int
) -> None:
    """XNNPACK joins integers of one grid: others made a file that could not be loaded."""
    net = Net()
    parts = []
    for i in range(count):
        weights = net.store(net.rng.standard_normal((4, 3, 3, 3)) * 3.0**i / 9)
        parts.append(net.add("Relu", net.add("Conv", "x", weights, pads=[1] * 4)))
    joined = net.add("Concat", *parts, axis=1)
    d = net.add("Flatten", net.add("GlobalAveragePool", net.conv(joined, 4 * count, 8)))
    model = net.model(net.add("Gemm", d, net.weight(5, 8), transB=1, out="y"))
    config = quantize_int8.Config(label_bias="off", mixed="off")
    found = quantize_int8.run(graphs.program(model), config, context(Noise(), target.spec)).program
    file = target.lower(found, tmp_path, "main").file
    got = target.open(file).run({"x": batch()})["y"]
    want = np.concatenate([graphs.run(found.body, {"x": x[None]})["y"] for x in batch()])
    assert np.ptp(want) > 10 * output_steps(file)["y"]
    assert np.abs(got - want).max() <= output_steps(file)["y"] * 1.001


def test_lowering_gives_the_same_bytes(
    target: XnnpackTarget, quantized: Program, lowered: Lowered, tmp_path: Path
) -> None:
    again = target.lower(quantized, tmp_path, "main")
    assert again.file.read_bytes() == lowered.file.read_bytes()
    assert again.extra[0].read_bytes() == lowered.extra[0].read_bytes()


def test_latency_is_measured(target: XnnpackTarget, lowered: Lowered) -> None:
    figure = target.latency(lowered.file, {"x": batch()}, 5)
    assert (figure.evidence, figure.count) == ("measured", 5)
    assert figure.value is not None
    assert figure.value > 0
    assert "ExecuTorch" in figure.how
    ratio = target.compare(lowered.file, lowered.file, {"x": batch()})
    assert ratio is not None
    assert ratio > 0
    with pytest.raises(UsageError, match="EB144"):
        target.latency(lowered.file, {"x": batch()}, 0)


def test_wrong_input_is_refused(target: XnnpackTarget, lowered: Lowered) -> None:
    with pytest.raises(UsageError, match=r"EB142.*1x3x16x16"):
        target.open(lowered.file).run({"x": batch()[:, :, :8]})


@pytest.mark.parametrize("kept", [0, 100, -500])
def test_a_cut_or_damaged_file_is_refused(
    target: XnnpackTarget, lowered: Lowered, tmp_path: Path, kept: int
) -> None:
    file = tmp_path / "main.pte"
    file.write_bytes(lowered.file.read_bytes()[:kept])
    graph_file(file).write_bytes(lowered.extra[0].read_bytes())
    with pytest.raises(ArtifactError, match=r"EB510.*main\.pte"):
        target.open(file)


def test_what_it_was_made_of_must_be_there(
    target: XnnpackTarget, lowered: Lowered, tmp_path: Path
) -> None:
    file = tmp_path / "main.pte"
    file.write_bytes(lowered.file.read_bytes())
    with pytest.raises(ArtifactError, match=r"EB510.*main\.graph\.onnx"):
        target.placement(file)


def test_a_crash_of_the_engine_is_an_error(
    target: XnnpackTarget, lowered: Lowered, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = target.open(lowered.file)
    executor._worker._process.kill()
    executor._worker._process.wait()
    with pytest.raises(TargetError, match=r"EB610.*SIGKILL"):
        executor.run({"x": batch()})


def test_an_unknown_operator_is_named(target: XnnpackTarget, tmp_path: Path) -> None:
    node = helper.make_node("NonZero", ["x"], ["n"], name="which")
    shape = helper.make_node("Cast", ["n"], ["y"], name="cast", to=TensorProto.FLOAT)
    values = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, "n"])]
    body = helper.make_graph([node, shape], "g", values, outputs)
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    with pytest.raises(UnsupportedError, match=r"EB243.*NonZero 'which'"):
        target.lower(graphs.program(model), tmp_path, "main")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("missing", "found", "why"),
    [
        ("executorch", "", "executorch is not installed"),
        ("torchao", "", "torchao is not installed"),
        ("", "1.3.0", r"executorch 1\.3\.0 is installed, 1\.4 is needed"),
    ],
)
def test_a_missing_or_foreign_engine_says_what_to_install(
    target: XnnpackTarget,
    quantized: Program,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    missing: str,
    found: str,
    why: str,
) -> None:
    def stated(package: str) -> str:
        if package == missing:
            raise PackageNotFoundError(package)
        return found or version(package)

    monkeypatch.setattr(executorch_xnnpack, "version", stated)
    assert not target.available().ok
    with pytest.raises(TargetError, match=rf"EB601.*{why}(.|\n)*edgebudget\[executorch\]"):
        target.lower(quantized, tmp_path, "main")


def test_a_sum_that_is_not_rounded_multiplies_float_weights(
    target: XnnpackTarget, tmp_path: Path
) -> None:
    """ONNX Runtime gives such sums as float; XNNPACK has no kernel that does."""
    config = quantize_int8.Config(label_bias="off")
    body = quantize_int8.run(graphs.program(residual()), config, context(Noise(), CPU)).program.body
    assert not _is_rounded(body, "y")
    file = target.lower(graphs.program(body), tmp_path, "main").file
    assert target.placement(file).fallback == ()
    want, got = graphs.run(body, {"x": batch(1)})["y"], target.open(file).run({"x": batch(1)})["y"]
    np.testing.assert_allclose(got, want, atol=0.05 * float(np.abs(want).max()))


def test_methods_of_one_file_share_their_weights(
    target: XnnpackTarget, quantized: Program, lowered: Lowered, tmp_path: Path
) -> None:
    other = target.lower(graphs.program(residual(seed=1)), tmp_path, "other").file
    programs = {"a": quantized, "b": quantized, "c": graphs.program(residual(seed=1))}
    into = tmp_path / "all.pte"
    target.pack(programs, {"a": lowered.file, "b": lowered.file, "c": other}, into)
    alone = lowered.file.stat().st_size
    assert into.stat().st_size < 1.3 * alone + other.stat().st_size
    from edgebudget_runtime.executorch_program import Method

    data, x = into.read_bytes(), batch(1)
    for name, file in (("b", lowered.file), ("c", other)):
        want = target.open(file).run({"x": x})["y"]
        np.testing.assert_array_equal(Method(data, name).run([x])[0], want)


def test_a_method_that_answers_otherwise_is_refused(
    target: XnnpackTarget, quantized: Program, lowered: Lowered, tmp_path: Path
) -> None:
    other = graphs.program(residual(seed=1))
    with pytest.raises(TargetError, match=r"EB615.*method b"):
        target.pack(
            {"a": quantized, "b": other},
            {"a": lowered.file, "b": lowered.file},
            tmp_path / "all.pte",
        )
    assert not (tmp_path / "all.pte").exists()


def _is_rounded(body: onnx.ModelProto, name: str) -> bool:
    makers = {o: n.op_type for n in body.graph.node for o in n.output}
    return bool(makers[name] == "DequantizeLinear")


def test_unsigned_bytes_cross_the_edges(target: XnnpackTarget, tmp_path: Path) -> None:
    """What a segment hands to the next one may be bytes, with any zero point."""
    rng = np.random.default_rng(0)
    stored = {
        "s": np.float32(0.1),
        "z": np.uint8(100),
        "t": np.float32(0.3),
        "w": rng.standard_normal((4, 3, 1, 1)).astype(np.float32),
    }
    nodes = [
        helper.make_node("DequantizeLinear", ["x", "s", "z"], ["a"], "in"),
        helper.make_node("Conv", ["a", "w"], ["b"], "conv"),
        helper.make_node("QuantizeLinear", ["b", "t", "z"], ["y"], "out"),
    ]
    shapes = {"x": [1, 3, 4, 4], "y": [1, 4, 4, 4]}
    x, y = (helper.make_tensor_value_info(k, TensorProto.UINT8, v) for k, v in shapes.items())
    weights = [numpy_helper.from_array(np.asarray(v), k) for k, v in stored.items()]
    body = helper.make_graph(nodes, "g", [x], [y], weights)
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    file = target.lower(graphs.program(model), tmp_path, "main").file
    inputs = {"x": rng.integers(0, 256, (1, 3, 4, 4)).astype(np.uint8)}
    got, want = target.open(file).run(inputs)["y"], graphs.run(model, inputs)["y"]
    assert got.dtype == np.uint8
    assert np.abs(got.astype(int) - want.astype(int)).max() <= 1


def test_a_module_cannot_be_lowered(target: XnnpackTarget, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="EB241"):
        target.lower(Program("module", object(), (), ()), tmp_path, "main")


def test_the_graph_beside_a_file_has_no_large_weights(lowered: Lowered) -> None:
    described = onnx.load_model(str(lowered.extra[0]), load_external_data=False)
    assert all(t.ByteSize() <= 4200 for t in described.graph.initializer)
