"""Arm Ethos-U: numbers, placement, Vela's report, and the faults of its compilers."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgebudget import graph as graphs
from edgebudget import target_registry
from edgebudget.program import Program
from edgebudget.target import Lowered
from edgebudget.verify import file_cost, output_steps
from edgebudget_passes import quantize_int8
from edgebudget_runtime.errors import TargetError
from edgebudget_targets import _executorch_process, _vela, ethos_u
from edgebudget_targets._vela import Setting
from edgebudget_targets.ethos_u import EthosUTarget, Limits
from tests.passes.quant_nets import Net, Noise, context, residual

for _package in ("executorch", "ethosu", "tosa_reference_model"):
    pytest.importorskip(_package, reason='needs pip install "edgebudget[ethos-u]"')

Array = np.ndarray[Any, Any]


def _target(name: str) -> EthosUTarget:
    found = target_registry.get(name)
    assert isinstance(found, EthosUTarget)
    return found


@pytest.fixture(scope="module")
def target() -> EthosUTarget:
    return _target("npu:ethos-u55-128")


def _integer(program: Program, target: EthosUTarget) -> Program:
    config = quantize_int8.Config(label_bias="off")
    return quantize_int8.run(program, config, context(Noise(), target.spec)).program


@pytest.fixture(scope="module")
def quantized(target: EthosUTarget) -> Program:
    return _integer(graphs.program(residual()), target)


@pytest.fixture(scope="module")
def lowered(
    target: EthosUTarget, quantized: Program, tmp_path_factory: pytest.TempPathFactory
) -> Lowered:
    return target.lower(quantized, tmp_path_factory.mktemp("ethos"), "main")


def batch(count: int = 3) -> Array:
    return np.stack([Noise().sample(200 + i).inputs["x"] for i in range(count)])


def test_what_vela_compiles_computes_the_onnx_graph(
    target: EthosUTarget, quantized: Program, lowered: Lowered
) -> None:
    want = np.concatenate([graphs.run(quantized.body, {"x": x[None]})["y"] for x in batch()])
    exact = target.open(lowered.file, exact=True).run({"x": batch()})["y"]
    fast = target.open(lowered.file).run({"x": batch()})["y"]
    step = output_steps(lowered.file)["y"]
    assert exact.shape == want.shape == fast.shape
    assert np.ptp(want) > 10 * step
    assert np.abs(exact - want).max() <= step * 1.001
    assert np.abs(fast - want).max() <= step * 1.001


def test_every_node_is_on_the_npu_and_edges_are_integers(
    target: EthosUTarget, lowered: Lowered
) -> None:
    placement = target.placement(lowered.file)
    assert placement.fallback == ()
    assert {"Conv", "Gemm", "MaxPool", "Add"} <= {n.op for n in placement.nodes}
    assert b"quantize_per_tensor" not in lowered.file.read_bytes()
    assert b"EthosUBackend" in lowered.file.read_bytes()


def test_vela_report_becomes_figures(
    target: EthosUTarget, quantized: Program, lowered: Lowered
) -> None:
    figure = target.latency(lowered.file, {}, 1)
    found = target.estimate(lowered.file)
    assert figure.evidence == "simulated"
    assert figure.value is not None
    assert figure.value == pytest.approx(found.cycles / found.clock_hz * 1e3)
    assert "Shared_Sram" in figure.how
    assert sum(x.cycles for x in found.layers) == pytest.approx(found.cycles, rel=0.05)
    cost = file_cost(lowered, quantized)
    assert cost.memory_bytes.evidence == "simulated"
    assert cost.memory_bytes.value == found.sram_bytes + found.off_chip_flash_bytes
    assert target.compare(lowered.file, lowered.file, {}) == 1.0


def test_one_lowering_serves_all_of_its_kind(target: EthosUTarget, lowered: Lowered) -> None:
    names = ("u55-64", "u55-128", "u55-256", "u65-256", "u65-512")
    settings = [Setting.of(_target(f"npu:ethos-{n}").spec.options) for n in names]
    cycles = [target.estimate(lowered.file, s).cycles for s in settings]
    assert cycles[0] > cycles[1] > 0
    assert len(set(cycles)) == len(cycles)


def test_u85_computes_the_same(quantized: Program, tmp_path: Path) -> None:
    u85 = _target("npu:ethos-u85-256")
    file = u85.lower(quantized, tmp_path, "main").file
    want = np.concatenate([graphs.run(quantized.body, {"x": x[None]})["y"] for x in batch(1)])
    got = u85.open(file, exact=True).run({"x": batch(1)})["y"]
    assert u85.placement(file).fallback == ()
    assert np.abs(got - want).max() <= output_steps(file)["y"] * 1.001
    assert "Dedicated_Sram_384KB" in u85.latency(file, {}, 1).how


@pytest.mark.parametrize("first", [False, True], ids=["between", "first"])
def test_a_node_that_the_npu_refuses_is_named(
    target: EthosUTarget, tmp_path: Path, first: bool
) -> None:
    net = Net()
    a = "x" if first else net.add("Relu", net.conv("x", 3, 4))
    scales = net.store(np.asarray([1, 1, 2, 2], np.float32))
    b = net.add("Resize", a, "", scales, out="wider", mode="linear")
    channels = 3 if first else 4
    d = net.add("Flatten", net.add("GlobalAveragePool", net.conv(b, channels, 8, k=1)))
    model = net.model(net.add("Gemm", d, net.weight(5, 8), transB=1, out="y"))
    program = _integer(graphs.program(model), target)
    lowered = target.lower(program, tmp_path, "main")
    left = {n.name: n for n in target.placement(lowered.file).fallback}
    assert "wider" in left
    assert left["wider"].processor == "cpu"
    assert left["wider"].why
    assert "Conv" not in {n.op for n in left.values()}
    figure = target.latency(lowered.file, {}, 1)
    assert (figure.value, figure.evidence) == (None, "unknown")
    with pytest.raises(TargetError, match="EB617"):
        target.open(lowered.file, exact=True)


@pytest.mark.parametrize(
    ("padding", "on_npu"), [([0, 0, 0, 0], True), ([1, 1, 1, 1], False)], ids=["plain", "padded"]
)
def test_average_pooling_is_exact_or_left_to_the_cpu(
    target: EthosUTarget, tmp_path: Path, padding: list[int], on_npu: bool
) -> None:
    """The back end's own pooling ignores that input and output have different steps."""
    net = Net()
    a = net.add("Relu", net.conv("x", 3, 8))
    pool = net.add("AveragePool", a, kernel_shape=[3, 3], strides=[2, 2], pads=padding, out="pool")
    d = net.add("Flatten", net.add("GlobalAveragePool", net.conv(pool, 8, 8, k=1)))
    model = net.model(net.add("Gemm", d, net.weight(5, 8), transB=1, out="y"))
    file = target.lower(_integer(graphs.program(model), target), tmp_path, "main").file
    left = {n.name for n in target.placement(file).fallback}
    assert ("pool" not in left) == on_npu
    if on_npu:
        exact, fast = (target.open(file, exact=e).run({"x": batch()})["y"] for e in (True, False))
        assert np.abs(exact - fast).max() <= output_steps(file)["y"] * 1.001


@pytest.mark.parametrize(("name", "on_npu"), [("u55-128", False), ("u85-256", True)])
def test_means_over_large_strides_are_for_the_u85(name: str, on_npu: bool, tmp_path: Path) -> None:
    """Strides of a convolution end at 3 on the U55, where the compiler failed."""
    own = _target(f"npu:ethos-{name}")
    net = Net()
    pool = net.add("AveragePool", net.conv("x", 3, 8), kernel_shape=[4, 4], strides=[4, 4])
    model = net.model(net.add("Flatten", net.conv(pool, 8, 4, k=1), out="y"))
    file = own.lower(_integer(graphs.program(model), own), tmp_path, "main").file
    assert (pool not in {n.name for n in own.placement(file).fallback}) == on_npu
    if on_npu:
        exact, fast = (own.open(file, exact=e).run({"x": batch()})["y"] for e in (True, False))
        assert np.array_equal(exact, fast)


def test_every_second_pixel_stays_on_the_npu_and_keeps_its_numbers(
    target: EthosUTarget, tmp_path: Path
) -> None:
    """The shortcut without weights of the CIFAR ResNets: thinned, then zero channels."""
    net = Net()
    x = net.conv("x", 3, 16)
    ends = [net.store(np.array(v, np.int64)) for v in ([0, 0], [16, 16], [2, 3], [2, 2])]
    thin = net.add("Slice", x, *ends)
    pads = net.store(np.array([0, 8, 0, 0, 0, 8, 0, 0], np.int64))
    net.add("Add", net.add("Pad", thin, pads), net.conv(x, 16, 32, strides=[2, 2]), out="y")
    program = _integer(graphs.program(net.model("y")), target)
    file = target.lower(program, tmp_path, "main").file
    assert not target.placement(file).fallback
    want = np.concatenate([graphs.run(program.body, {"x": x[None]})["y"] for x in batch()])
    exact = target.open(file, exact=True).run({"x": batch()})["y"]
    assert np.abs(exact - want).max() <= output_steps(file)["y"] * 1.001


def test_an_operator_that_crashes_the_compiler_is_refused_before(tmp_path: Path) -> None:
    net = Net()
    k = net.store(np.asarray([3]))
    flat = net.add("Flatten", net.conv("x", 3, 4))
    net.add("TopK", flat, k, out="largest")
    net.nodes[-1].output.append("places")
    model = net.model("largest")
    with pytest.raises(TargetError, match="TopK") as caught:
        _target("npu:ethos-u85-256").lower(graphs.program(model), tmp_path, "main")
    assert caught.value.code == "EB612"
    assert "largest" in caught.value.what


def test_vela_missing(monkeypatch: pytest.MonkeyPatch, target: EthosUTarget) -> None:
    def gone(package: str) -> str:
        if package == "ethos-u-vela":
            raise PackageNotFoundError(package)
        return version(package)

    monkeypatch.setattr(ethos_u, "version", gone)
    state = target.available()
    assert not state.ok
    assert "ethos-u-vela" in state.why
    assert "edgebudget[ethos-u]" in state.install
    with pytest.raises(TargetError, match="ethos-u-vela") as caught:
        target.lower(graphs.program(residual()), Path(), "main")
    assert caught.value.code == "EB601"


def test_vela_failing_and_hanging(
    monkeypatch: pytest.MonkeyPatch, target: EthosUTarget, lowered: Lowered
) -> None:
    wrong = replace(Setting.of(target.spec.options), memory_mode="No_Such_Mode")
    with pytest.raises(TargetError, match="No_Such_Mode") as caught:
        target.estimate(lowered.file, wrong)
    assert caught.value.code == "EB610"
    impatient = EthosUTarget(target.spec, Limits(vela=0.2))
    monkeypatch.setattr(_vela, "COMMAND", (sys.executable, "-c", "import time; time.sleep(60)"))
    with pytest.raises(TargetError) as caught:
        impatient.latency(lowered.file, {}, 1)
    assert caught.value.code == "EB611"


@pytest.mark.parametrize(
    ("script", "code"),
    [("import os; os.abort()", "EB610"), ("import time; time.sleep(60)", "EB611")],
)
def test_compiler_crashing_and_hanging(
    monkeypatch: pytest.MonkeyPatch,
    target: EthosUTarget,
    quantized: Program,
    tmp_path: Path,
    script: str,
    code: str,
) -> None:
    monkeypatch.setattr(_executorch_process, "COMMAND", (sys.executable, "-c", script))
    impatient = EthosUTarget(target.spec, Limits(lower=0.5))
    with pytest.raises(TargetError) as caught:
        impatient.lower(quantized, tmp_path, "main")
    assert caught.value.code == code
    assert not list(tmp_path.glob("*.pte"))


def test_registry_knows_every_configuration() -> None:
    known = set(target_registry.names())
    wanted = {"u55": (64, 128, 256), "u65": (256, 512), "u85": (128, 256, 512, 1024, 2048)}
    assert {f"npu:ethos-{k}-{n}" for k, many in wanted.items() for n in many} <= known
