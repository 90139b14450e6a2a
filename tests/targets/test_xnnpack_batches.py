"""`.pte` files that take several inputs at a time: same answers, honest memory, clear refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgebudget
from edgebudget import graph as graphs
from edgebudget import target_registry
from edgebudget.cli import main
from edgebudget.elastic_compile import Elastic
from edgebudget.memory import plan_memory
from edgebudget.program import Program
from edgebudget.verify import file_cost
from edgebudget_passes import quantize_int8
from edgebudget_runtime import Runner
from edgebudget_runtime.errors import TargetError, UnsupportedError
from edgebudget_runtime.manifest import Manifest
from edgebudget_targets._executorch_process import opened
from edgebudget_targets.executorch_xnnpack import XnnpackTarget
from tests.passes.quant_nets import Net, Noise, context, residual

pytest.importorskip("executorch", reason="ExecuTorch is not installed")


@pytest.fixture(scope="module")
def target() -> XnnpackTarget:
    found = target_registry.get("cpu:xnnpack")
    assert isinstance(found, XnnpackTarget)
    return found.in_batches(4)


def attention() -> Program:
    """A stored token before four others, one head, and a sum over tokens."""
    net = Net((1, 4, 8))
    token = net.store(np.ones((1, 1, 8), np.float32))
    x = net.add("Concat", token, "x", axis=1)
    q, k, v = (net.add("MatMul", x, net.weight(8, 8)) for _ in range(3))
    heads = net.store(np.array([1, 5, 2, 4]))
    q, k, v = (net.add("Transpose", net.add("Reshape", t, heads), perm=[0, 2, 1, 3])
               for t in (q, k, v))  # fmt: skip
    scores = net.add("MatMul", q, net.add("Transpose", k, perm=[0, 1, 3, 2]))
    y = net.add("MatMul", net.add("Softmax", scores, axis=-1), v)
    y = net.add("Reshape", net.add("Transpose", y, perm=[0, 2, 1, 3]), net.store(np.array([1, 40])))
    return graphs.program(net.model(net.add("MatMul", y, net.weight(40, 3), out="y")))


def gated() -> Program:
    """A depthwise layer, a gate of means, and pictures laid flat."""
    net = Net()
    x = net.conv(net.add("Relu", net.conv("x", 3, 16)), 16, 16, group=16)
    gate = net.add("Sigmoid", net.conv(net.add("GlobalAveragePool", x), 16, 16, k=1))
    flat = net.add("Flatten", net.add("Mul", x, gate), axis=1)
    return graphs.program(net.model(net.add("MatMul", flat, net.weight(4096, 3), out="y")))


def quantized(target: XnnpackTarget) -> Program:
    config = quantize_int8.Config(label_bias="off")
    return quantize_int8.run(
        graphs.program(residual()), config, context(Noise(), target.spec)
    ).program


@pytest.mark.parametrize(("kind", "most"), [("int8", 4), ("attention", 4), ("gated", 20)])
def test_together_as_one_by_one(
    target: XnnpackTarget, tmp_path: Path, kind: str, most: int
) -> None:
    """From 16 on, torch's own kernels would fix the batch (see `_no_libraries`)."""
    made = {"int8": lambda: quantized(target), "attention": attention, "gated": gated}
    program = made[kind]()
    lowered = target.in_batches(most).lower(program, tmp_path, "main")
    assert lowered.max_batch == most
    assert kind == "attention" or not target.placement(lowered.file).fallback
    method = opened([lowered.file], 1, 60.0)
    rng = np.random.default_rng(1)
    for count in (most, 1, 3, most):  # the largest first: see `Method.fill`
        x = rng.standard_normal((count, *program.inputs[0].shape[1:])).astype(np.float32)
        _, (got,) = method.ask({"do": "run", "index": 0, "pieces": 1}, [x])
        want = np.concatenate([graphs.run(program.body, {"x": v[None]})["y"] for v in x])
        if kind == "int8":
            _, (want,) = method.ask({"do": "run", "index": 0, "pieces": count}, [x])
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    method.close()


def test_memory_is_that_of_a_whole_batch(target: XnnpackTarget, tmp_path: Path) -> None:
    program = graphs.program(residual())
    two, four = (
        file_cost(target.in_batches(n).lower(program, tmp_path / f"{n}", "main"), program)
        for n in (2, 4)
    )
    plan = plan_memory(program.body)
    for cost, samples in ((two, 2), (four, 4)):
        wanted = plan.weight_bytes + samples * plan.peak_activation_bytes
        assert cost.memory_bytes.value == wanted
        assert f"{samples} samples'" in cost.memory_bytes.how
    assert two.macs == four.macs


def test_a_graph_that_mixes_its_samples_is_refused(target: XnnpackTarget, tmp_path: Path) -> None:
    """A softmax over the first dimension: one sample alone always gets 1."""
    net = Net((1, 6))
    program = graphs.program(net.model(net.add("Softmax", "x", axis=0, out="y")))
    with pytest.raises(TargetError, match="EB618") as e:
        target.lower(program, tmp_path, "main")
    assert "--max-batch" in e.value.hint
    assert not (tmp_path / "main.pte").exists()


def test_a_graph_for_one_sample_alone_is_refused(target: XnnpackTarget, tmp_path: Path) -> None:
    net = Net((1, 6))
    folded = net.add("Reshape", "x", net.store(np.array([2, 3])))
    program = graphs.program(net.model(net.add("MatMul", folded, net.weight(3, 2), out="y")))
    with pytest.raises(UnsupportedError, match="EB244"):
        target.lower(program, tmp_path, "main")


def test_the_runner_gives_as_many_as_the_file_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exits too: those that are sure leave, and the rest go on together."""
    monkeypatch.setenv("EDGEBUDGET_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "out"
    elastic = Elastic(("exit",))
    edgebudget.compile("digits", out=out, target="cpu:xnnpack", elastic=elastic, max_batch=8)
    manifest = Manifest.load(out)
    assert {s.max_batch for s in manifest.segments} == {8}
    assert {t.shape[0] for s in manifest.segments for t in s.inputs} == {1}
    assert all("8 samples' liveness" in s.cost.memory_bytes.how for s in manifest.subnetworks)
    assert "max_batch = 8" in (out / "recipe.toml").read_text()
    x = np.random.default_rng(0).random((21, 1, 8, 8), dtype=np.float32)
    point = f"point:{manifest.operating_points[0].id}"
    with Runner(out, profile=False) as runner:
        sizes: list[int] = []
        run = runner._segments.run

        def watched(id: str, state: dict[str, Any], *more: object) -> tuple[float, bool]:
            sizes.append(len(next(iter(state.values()))))
            return run(id, state, *more)  # type: ignore[arg-type]

        monkeypatch.setattr(runner._segments, "run", watched)
        together = runner.run_batch(x, policy=point)
        assert max(sizes) == 8
        assert sum(sizes) == sum(len(runner.run(v[None], policy=point).ran) for v in x)
        for i, v in enumerate(x):
            alone = runner.run(v[None], policy=point)
            assert together.items[i].subnetwork == alone.subnetwork
            np.testing.assert_array_equal(together.outputs["output"][i], alone.outputs["output"][0])


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--target", "cpu"], "--max-batch 4 of target 'cpu'"),
        (["--target", "cpu:xnnpack", "--input-shape", "2x1x8x8"], "'image' is [2, 1, 8, 8]"),
    ],
)
def test_what_takes_one_input_is_refused(
    more: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["compile", "digits", "--out", str(out), "--max-batch", "4", *more]) == 2
    assert says in (err := capsys.readouterr().err)
    assert "EB158" in err
    assert not out.exists()
