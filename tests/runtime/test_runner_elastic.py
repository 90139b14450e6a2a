"""One artifact, several sub-networks: which one answers, where it ends, and what is said of it."""

from __future__ import annotations

import asyncio
import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from edgebudget_runtime import Manifest, Runner, trace
from edgebudget_runtime.confidence import signal
from edgebudget_runtime.errors import MissedError, UsageError
from edgebudget_runtime.planner import Planner
from tests.runtime import elastic_artifact as ea
from tests.runtime.elastic_artifact import Machine

TOTAL_MS = {id: sum(ea.MS[s] for s in path) for id, path in ea.PATHS.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    ea.write(tmp_path / "toy")
    return tmp_path / "toy"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def opened(folder: Path, machine: Machine) -> Runner:
    """A runner that knows the machine, with everything loaded."""
    runner = Runner(folder, threads=1, clock=machine, profile=ea.profile_of(folder))
    runner.warm_up()
    return runner


def test_without_limits_the_best_sub_network_answers(folder: Path) -> None:
    out = Runner(folder, profile=False).run(ea.unsure())
    np.testing.assert_allclose(out.outputs["scores"], ea.expected(ea.unsure(), "s2"))
    assert list(out.outputs) == ["scores"]
    assert (out.subnetwork, out.exit, out.ran) == ("full", "s2", ("s0", "s1", "s2"))
    assert not out.degraded
    assert out.spent.macs.value == 100
    assert out.spent.energy_mj.value == pytest.approx(1.0)
    assert out.confidence == pytest.approx(np.exp(0.25) / np.exp([0.25, 0.125, 0.0]).sum())


@given(latency_ms=st.floats(0.01, 10.0))
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_the_best_that_fits_the_deadline(folder: Path, latency_ms: float) -> None:
    assume(all(abs(latency_ms - t) > 1e-6 for t in TOTAL_MS.values()))
    with pytest.MonkeyPatch.context() as patch:
        out = opened(folder, Machine(patch)).run(ea.sure(), latency_ms=latency_ms)
    fit = [id for id, ms in TOTAL_MS.items() if ms <= latency_ms]
    wanted = max(fit, key=ea.QUALITY.__getitem__) if fit else "exit1"
    assert out.subnetwork == wanted
    assert out.ran == ea.PATHS[wanted]
    assert out.spent.latency_ms.value == pytest.approx(TOTAL_MS[wanted])
    assert [v.limit.resource for v in out.broke] == ([] if fit else ["latency_ms"])
    assert not out.degraded
    np.testing.assert_allclose(out.outputs["scores"], ea.expected(ea.sure(), out.exit))


@pytest.mark.parametrize(
    ("limits", "wanted", "broke"),
    [
        ({"energy_mj": 0.55}, "narrow", []),
        ({"energy_mj": 0.45}, "exit2", []),
        ({"macs": 25.0}, "narrow1", []),
        ({"macs": 99.0, "energy_mj": 0.45}, "exit2", []),
        ({"macs": 1.0}, "exit1", ["macs"]),
        ({"energy_mj": 0.01}, "exit1", ["energy_mj"]),
        ({"latency_ms": 0.0, "macs": 30.0}, "exit1", ["latency_ms"]),
        ({"latency_ms": -5.0}, "exit1", ["latency_ms"]),
    ],
)
def test_other_limits(
    folder: Path, machine: Machine, limits: dict[str, Any], wanted: str, broke: list[str]
) -> None:
    runner = opened(folder, machine)
    out = runner.run(ea.sure(), **limits)
    assert out.subnetwork == wanted
    assert [v.limit.resource for v in out.broke] == broke
    if broke:
        assert out.why
        with pytest.raises(MissedError, match="EB490"):
            runner.run(ea.sure(), strict=True, **limits)


def test_a_slow_segment_changes_the_plan_and_the_answer_so_far_stands(
    folder: Path, machine: Machine
) -> None:
    runner = opened(folder, machine)
    machine.slow["s1"] = 3.0
    out = runner.run(ea.sure(), latency_ms=7.5)  # 1.5 ms are left, the rest would take 4
    assert (out.subnetwork, out.exit, out.degraded, out.broke) == ("exit2", "s1", True, ())
    assert out.why
    np.testing.assert_allclose(out.outputs["scores"], ea.expected(ea.sure(), "s1"))
    assert runner.counters["degraded"] == 1


def test_time_that_is_left_buys_a_deeper_answer(folder: Path, machine: Machine) -> None:
    often_slow = {s: (9.0, 1.0) * 100 for s in ea.MS}
    profile = dataclasses.replace(ea.profile_of(folder), samples_ms=often_slow)
    machine.ms.update(dict.fromkeys(ea.MS, 1.0))
    for policy, wanted in (("best", "narrow1"), ("deadline", "narrow")):
        runner = Runner(folder, threads=1, clock=machine, profile=profile, policy=policy)
        runner.warm_up()
        out = runner.run(ea.sure(), latency_ms=12.0)  # two bounds are 18 ms
        assert (out.subnetwork, out.degraded, out.broke) == (wanted, False, ())


def test_an_operating_point_ends_where_the_answer_is_sure_enough(folder: Path) -> None:
    runner = Runner(folder, policy="point:half", profile=False)
    sure, unsure = runner.run(ea.sure()), runner.run(ea.unsure())
    assert (sure.exit, sure.ran, sure.degraded) == ("s0", ("s0",), False)
    assert sure.confidence is not None
    assert sure.confidence >= ea.HALF["s0"]
    assert sure.spent.macs.value == 10
    assert (unsure.exit, unsure.ran, unsure.degraded) == ("s2", ("s0", "s1", "s2"), False)


def test_an_operating_point_keeps_a_deadline_too(folder: Path, machine: Machine) -> None:
    out = opened(folder, machine).run(ea.unsure(), latency_ms=3.5, policy="point:half")
    assert (out.exit, out.degraded, out.broke) == ("s1", True, ())


@pytest.mark.parametrize("batch", [1, 4, None])
def test_a_batch_closes_ranks_and_keeps_the_order(tmp_path: Path, batch: int | None) -> None:
    ea.write(tmp_path / "toy", batch=batch)
    runner = Runner(tmp_path / "toy", policy="point:half", profile=False)
    easy = np.random.default_rng(0).permutation([True] * 23 + [False] * 14)
    x = np.where(easy[:, None], ea.sure(37), ea.unsure(37))
    out = runner.run_batch(x)
    exits = np.where(easy, "s0", "s2")
    wanted = [ea.expected(x[i : i + 1], exits[i])[0] for i in range(37)]
    np.testing.assert_allclose(out.outputs["scores"], np.stack(wanted))
    assert [i.exit for i in out.items] == exits.tolist()
    assert {i.subnetwork for i in out.items} == {"exit1", "full"}
    confidence = [i.confidence or 0.0 for i in out.items]
    np.testing.assert_allclose(confidence, signal(x, "max_softmax", 1.0), rtol=1e-5)
    assert out.spent.macs.value == pytest.approx((23 * 10 + 14 * 100) / 37)
    assert out.spent.energy_mj.value == pytest.approx((23 * 0.1 + 14 * 1.0) / 37)
    assert out.spent.latency_ms.count == 37
    assert set(out.ran) == {"s0", "s1", "s2"}


def test_a_batch_runs_a_deep_segment_only_for_those_that_go_on(
    tmp_path: Path, machine: Machine
) -> None:
    ea.write(tmp_path / "toy", batch=4)
    runner = Runner(tmp_path / "toy", policy="point:half", profile=False)
    x = ea.sure(32)
    x[::8] = ea.unsure()  # one in every other batch of four
    runner.run_batch(x)
    assert [machine.ran.count(s) for s in ("s0", "s1", "s2")] == [8, 1, 1]


def test_a_batch_equals_its_parts(folder: Path) -> None:
    runner = Runner(folder, policy="point:half", profile=False)
    x = np.random.default_rng(1).normal(0.0, 2.0, (20, 3)).astype(np.float32)
    batch = runner.run_batch(x)
    alone = [runner.run(x[i : i + 1]) for i in range(20)]
    np.testing.assert_array_equal(
        batch.outputs["scores"], np.concatenate([o.outputs["scores"] for o in alone])
    )
    assert [(i.subnetwork, i.exit, i.confidence) for i in batch.items] == [
        (o.subnetwork, o.exit, o.confidence) for o in alone
    ]
    listed = runner.run_batch([x[i : i + 1] for i in range(20)])
    np.testing.assert_array_equal(listed.outputs["scores"], batch.outputs["scores"])


def test_limits_hold_for_each_input_of_a_batch(folder: Path) -> None:
    out = Runner(folder, profile=False).run_batch(ea.sure(5), energy_mj=0.55)
    assert {i.subnetwork for i in out.items} == {"narrow"}
    assert out.subnetwork == "narrow"
    assert out.broke == ()


def test_callers_at_once_get_their_own_answers(folder: Path) -> None:
    runner = Runner(folder, threads=1, policy="point:half", profile=False)
    draws = np.random.default_rng(2).normal(0.0, 3.0, (400, 1, 3)).astype(np.float32)
    with ThreadPoolExecutor(8) as pool:
        outs = list(pool.map(runner.run, draws))
    for x, out in zip(draws, outs, strict=True):
        np.testing.assert_allclose(out.outputs["scores"], ea.expected(x, out.exit), atol=1e-4)
        assert out.ran == ea.PATHS["full"][: ea.PATHS["full"].index(out.exit) + 1]
    assert runner.counters["requests"] == 400


def test_awaited_answers(folder: Path) -> None:
    async def main() -> None:
        runner = Runner(folder, threads=1, workers=3, profile=False)
        draws = [ea.sure(3)[i : i + 1] for i in range(3)] * 8
        outs = await asyncio.gather(*(runner.run_async(x, macs=50.0) for x in draws))
        for x, out in zip(draws, outs, strict=True):
            np.testing.assert_allclose(out.outputs["scores"], ea.expected(x, "t1"))
        with pytest.raises(UsageError, match="EB171"):
            await runner.run_async(ea.sure(2))
        runner.close()
        with pytest.raises(UsageError, match="EB174"):
            await runner.run_async(ea.sure())

    asyncio.run(main())


def test_memory_is_kept_by_dropping_what_was_unused_longest(folder: Path) -> None:
    manifest = Manifest.load(folder)
    size = {s.id: sum(f.bytes for f in s.files()) for s in manifest.segments}
    limit = size["s0"] + size["s1"] + 10
    runner = Runner(folder, profile=False, memory_limit_bytes=limit)
    for x in (ea.sure(), ea.unsure()):
        for id in ("full", "narrow", "exit2"):
            out = runner.run(x, policy=f"fixed:{id}")
            assert (out.subnetwork, out.degraded) == (id, False)
            np.testing.assert_allclose(out.outputs["scores"], ea.expected(x, out.exit))
            assert sum(size[s] for s in runner.open_segments) <= limit
    assert runner.counters["evictions"] > 0
    assert runner.open_segments[-1] == "s1"


def test_a_trace_can_be_read_back(folder: Path, tmp_path: Path, machine: Machine) -> None:
    file = tmp_path / "trace.jsonl"
    with Runner(folder, threads=1, clock=machine, profile=ea.profile_of(folder), trace=file) as r:
        r.warm_up()
        r.run(ea.sure(), latency_ms=7.5)
        r.run(ea.sure(), latency_ms=0.5, energy_mj=4.0)
        assert r.counters["broke latency_ms"] == 1
    first, second = trace.read(file)
    assert first.done is not None
    assert second.done is not None
    assert first.done.ran == ("s0", "s1", "s2")
    assert first.done.latency_ms == pytest.approx(7.0)
    assert second.at_s == pytest.approx(7e-3)
    assert (second.latency_ms, second.energy_mj) == (0.5, 4.0)
    assert second.done.broke == ("latency_ms",)
    assert list(second.confidence) == ["s0"]


def test_the_device_is_measured_once_and_remembered(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    with Runner(folder, threads=1, profile=file) as runner:
        assert runner.profile_note == "there is no profile yet"
        runner.run(ea.sure())
        assert not file.exists()  # nobody asked for a deadline
        early = runner.run(ea.sure(), latency_ms=60_000)
        assert early.broke == ()
        runner.calibrate(ea.sure())  # waits for the measurement in the background
        assert runner.run(ea.sure(), latency_ms=60_000).subnetwork == "full"
        assert runner.profile_note == ""
    with Runner(folder, threads=1, profile=file) as again:
        assert again.profile_note == ""
        assert again.run(ea.sure(), latency_ms=60_000).subnetwork == "full"


def test_inputs_of_another_size_go_to_the_paths_that_take_them(folder: Path) -> None:
    manifest = Manifest.load(folder)
    segments = tuple(
        dataclasses.replace(s, inputs=(dataclasses.replace(s.inputs[0], shape=(1, 5)),))
        if s.id == "t0"
        else s
        for s in manifest.segments
    )
    planner = Planner(dataclasses.replace(manifest, segments=segments))

    def ids(x: np.ndarray[tuple[int, ...], np.dtype[np.float32]], rows: bool = False) -> set[str]:
        _, places = planner.accepting({"x": x}, rows=rows)
        return {planner.front.options[i].id for i in places}

    assert ids(np.zeros((1, 5), np.float32)) == {"narrow1", "narrow"}
    assert ids(np.zeros((9, 5), np.float32), rows=True) == {"narrow1", "narrow"}
    assert ids(np.zeros((1, 3), np.float32)) == {"exit1", "exit2", "full"}
    assert ids(np.zeros((1, 4), np.float32)) == {"exit1", "exit2", "full"}


@given(
    scores=nps.arrays(
        np.float32, (4, 5), elements=st.floats(-(2.0**99), 2.0**99, width=32) | st.just(np.nan)
    ),
    temperature=st.floats(0.1, 10.0),
)
def test_signals_are_safe_and_exact(
    scores: np.ndarray[tuple[int, ...], np.dtype[np.float32]], temperature: float
) -> None:
    usable = np.isfinite(scores).all(axis=1)
    soft = signal(scores, "max_softmax", temperature)
    energy = signal(scores, "energy", temperature)
    assert np.all(soft[~usable] == -np.inf)
    assert np.all(energy[~usable] == -np.inf)
    rows = scores[usable].astype(np.float64) / temperature
    rows -= rows.max(axis=1, keepdims=True)
    np.testing.assert_allclose(soft[usable], 1 / np.exp(rows).sum(1), rtol=1e-9)
    top = scores[usable].astype(np.float64).max(axis=1)
    np.testing.assert_allclose(
        energy[usable], top + temperature * np.log(np.exp(rows).sum(1)), rtol=1e-9, atol=1e-6
    )


def test_infinite_scores() -> None:
    scores = np.array([[np.inf, 0.0], [-np.inf, 0.0], [-np.inf, -np.inf]], np.float32)
    np.testing.assert_array_equal(signal(scores, "max_softmax", 2.0), [-np.inf, 1.0, -np.inf])
    np.testing.assert_array_equal(signal(scores, "energy", 2.0), [-np.inf, 0.0, -np.inf])


def test_settings_out_of_range_are_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="EB180"):
        Runner(folder, policy="fixed:huge")
    with pytest.raises(UsageError, match="EB174"):
        Runner(folder, memory_limit_bytes=0)
    runner = Runner(folder, profile=False)
    with pytest.raises(UsageError, match="EB180"):
        runner.run(ea.sure(), policy="nonsense")
    with pytest.raises(UsageError, match="EB185"):
        runner.run(ea.sure(), energy_mj=float("nan"))


def test_energy_limits_by_stated_power(folder: Path, machine: Machine) -> None:
    """Joules are power times this device's usual latencies, and say that they are modelled."""
    told = ea.profile_of(folder)
    with Runner(folder, threads=1, clock=machine, profile=told, power_w=2.0) as runner:
        runner.warm_up()
        least, *_, most = sorted(TOTAL_MS, key=lambda id: TOTAL_MS[id])
        for id in (least, most):
            out = runner.run(ea.unsure(), policy=f"fixed:{id}")
            assert out.spent.energy_mj.value == pytest.approx(2.0 * TOTAL_MS[id])
            assert out.spent.energy_mj.evidence == "modelled"
        tight = runner.run(ea.unsure(), energy_mj=2.0 * TOTAL_MS[least] * 1.01)
        assert (tight.subnetwork, tight.broke) == (least, ())
        short = runner.run(ea.unsure(), energy_mj=TOTAL_MS[least])
        assert [v.limit.resource for v in short.broke] == ["energy_mj"]


@pytest.mark.parametrize("watts", [0.0, -1.0, float("nan"), float("inf")])
def test_a_power_that_is_none_is_refused(folder: Path, watts: float) -> None:
    with pytest.raises(UsageError, match="EB174"):
        Runner(folder, power_w=watts)
