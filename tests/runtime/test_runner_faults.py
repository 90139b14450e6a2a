"""What goes wrong while an artifact serves: an answer comes all the same, and says so."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgebudget_runtime import Runner, engine
from edgebudget_runtime.errors import ArtifactError, EdgeBudgetError, UsageError
from edgebudget_runtime.outcome import Outcome
from edgebudget_runtime.policy import Ask, Bounds, Choice, Front
from edgebudget_runtime.profile import Profile
from edgebudget_runtime.sessions import Sessions
from tests.runtime import elastic_artifact as ea
from tests.runtime.elastic_artifact import Machine

X = ea.unsure()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    ea.write(tmp_path / "toy")
    return tmp_path / "toy"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def damage(folder: Path, *segments: str) -> None:
    for id in segments:
        file = ea.file_of(folder, id)
        file.write_bytes(file.read_bytes()[:-7] + b"another")


def right(out: Outcome, subnetwork: str, why: str) -> None:
    """The answer of this sub-network, marked, for this reason."""
    assert out.subnetwork == subnetwork
    assert out.degraded
    assert why in out.why
    assert "\n" not in out.why
    np.testing.assert_allclose(out.outputs["scores"], ea.expected(X, out.exit))


def refuse_to_open(monkeypatch: pytest.MonkeyPatch, error: Exception, *segments: str) -> list[str]:
    """Make the engine fail on these segments; what it was asked for, in order."""
    real, asked = engine.open_session, list[str]()

    def opening(file: Path, **rest: Any) -> Any:
        asked.append(file.stem)
        if file.stem in segments:
            raise error
        return real(file, **rest)

    monkeypatch.setattr(engine, "open_session", opening)
    return asked


def test_a_corrupt_segment_takes_its_paths_away_and_no_others(folder: Path) -> None:
    damage(folder, "s1")
    runner = Runner(folder, profile=False)
    right(runner.run(X), "narrow", "EB502")
    right(runner.run(X, macs=45.0), "narrow1", "EB502")
    assert not runner.run(X, macs=25.0).degraded
    assert runner.run(X, macs=15.0).subnetwork == "exit1"
    right(runner.run(X, policy="fixed:exit2"), "narrow", "EB502")
    batch = runner.run_batch(ea.unsure(3))
    assert {i.subnetwork for i in batch.items} == {"narrow"}
    assert batch.degraded
    assert "EB502" in batch.why
    runner.warm_up()
    assert set(runner.open_segments) == {"s0", "s2", "t0", "t1"}


def test_nothing_left_is_an_error(folder: Path) -> None:
    damage(folder, "s0", "t0")
    with pytest.raises(ArtifactError, match="EB502"):
        Runner(folder)


def test_damaged_weights_that_all_share_are_an_error(folder: Path) -> None:
    (weights,) = (folder / "segments/weights").iterdir()
    weights.write_bytes(b"\1" + weights.read_bytes()[1:])
    with pytest.raises(ArtifactError, match="EB502"):
        Runner(folder)


def test_files_replaced_while_running(folder: Path) -> None:
    runner = Runner(folder, profile=False)
    before = runner.run(X, policy="fixed:exit1")
    (weights,) = (folder / "segments/weights").iterdir()
    for file in (ea.file_of(folder, "s0"), weights):
        file.write_bytes(b"")  # in place: a mapped file would end the process
    damage(folder, "s1")
    again = runner.run(X, policy="fixed:exit1")
    np.testing.assert_array_equal(again.outputs["scores"], before.outputs["scores"])
    assert not again.degraded
    right(runner.run(X, policy="point:half"), "exit1", "EB502")
    right(runner.run(X), "exit1", "EB502")  # every other path needs the weights


def test_no_memory_for_a_larger_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = refuse_to_open(monkeypatch, MemoryError(), "s2")
    runner = Runner(folder, profile=False)
    right(runner.run(X), "exit2", "s2 cannot be opened: MemoryError")
    right(runner.run(X), "narrow", "s2 cannot be opened: MemoryError")
    right(runner.run(X), "narrow", "MemoryError")
    assert asked.count("s2") == 1  # not tried again at every request


def test_a_first_segment_that_cannot_be_opened(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_to_open(monkeypatch, ArtifactError("EB509", "no kernel", hint=""), "s0")
    right(Runner(folder, profile=False).run(X), "narrow", "[EB509] no kernel")


def test_opening_is_tried_again_later(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgebudget_runtime import Manifest

    now = 0.0
    with monkeypatch.context() as patch:
        refuse_to_open(patch, OSError("too many open files"), "s2")
        sessions = Sessions(
            folder,
            Manifest.load(folder),
            verify=True,
            providers=(engine.CPU,),
            options=None,
            threads=1,
            limit_bytes=None,
            clock=lambda: now,
        )
        with pytest.raises(ArtifactError, match="too many open files"):
            sessions.get("s2")
    now = 5.0
    with pytest.raises(ArtifactError, match="too many open files"):
        sessions.get("s2")
    now = 11.0
    assert sessions.get("s2")[1]
    assert sessions.failure("s2") is None


def test_a_segment_larger_than_the_memory(folder: Path) -> None:
    with pytest.raises(UsageError, match="EB186"):
        Runner(folder, profile=False, memory_limit_bytes=10).run(X)


@pytest.mark.parametrize("policy", ["deadline", "best", "point:half", "fixed:full"])
def test_a_failure_after_an_exit_gives_its_answer(
    folder: Path, machine: Machine, policy: str
) -> None:
    machine.fails = {"s1"}
    runner = Runner(folder, policy=policy, profile=False)
    right(runner.run(X), "exit1", "s1 failed: [EB509]")
    batch = runner.run_batch(np.concatenate([ea.sure(2), X]))
    assert {i.exit for i in batch.items} == {"s0"}
    assert batch.degraded
    np.testing.assert_allclose(
        batch.outputs["scores"], ea.expected(np.concatenate([ea.sure(2), X]), "s0")
    )


def test_a_failure_before_any_answer_goes_another_way(folder: Path, machine: Machine) -> None:
    machine.fails = {"s0"}
    runner = Runner(folder, profile=False)
    out = runner.run(X)
    right(out, "narrow", "s0 failed: [EB509]")
    assert out.ran == ("t0", "t1")
    batch = runner.run_batch(ea.unsure(9))
    assert {i.subnetwork for i in batch.items} == {"narrow"}
    machine.fails = {"s0", "t0"}
    with pytest.raises(ArtifactError, match="EB509"):
        runner.run(X)
    with pytest.raises(ArtifactError, match="EB509"):
        runner.run_batch(ea.unsure(3))


@pytest.mark.parametrize("jump_s", [-3600.0, 3600.0, float("nan")])
def test_a_clock_that_jumps(folder: Path, machine: Machine, jump_s: float) -> None:
    runner = Runner(folder, threads=1, clock=machine, profile=ea.profile_of(folder))
    runner.warm_up()
    usual = runner.run(X, latency_ms=7.5)
    assert usual.subnetwork == "full"
    machine.slow["s0"] = jump_s * 1e3
    out = runner.run(X, latency_ms=7.5)
    np.testing.assert_allclose(out.outputs["scores"], ea.expected(X, out.exit))
    assert [v.limit.resource for v in out.broke] == ["latency_ms"]  # not shown to be kept
    if jump_s > 0:
        assert (out.exit, out.degraded) == ("s0", True)
    else:
        assert out.spent.latency_ms.value is None
    machine.now_s = 1e6
    for _ in range(3):  # the jump taught nothing
        assert runner.run(X, latency_ms=7.5).subnetwork == "full"
    assert runner.counters["discarded times"] > 0


def test_a_budget_below_the_cheapest(folder: Path, machine: Machine) -> None:
    runner = Runner(folder, threads=1, clock=machine, profile=ea.profile_of(folder))
    runner.warm_up()
    out = runner.run(X, latency_ms=0.001, energy_mj=0.001, macs=1.0)
    assert out.subnetwork == "exit1"
    assert {v.limit.resource for v in out.broke} == {"latency_ms", "energy_mj", "macs"}


def test_not_a_number_is_refused(folder: Path) -> None:
    runner = Runner(folder, profile=False)
    x = ea.sure(3)
    x[1, 0] = np.nan
    with pytest.raises(UsageError, match="EB173"):
        runner.run(x[1:2], latency_ms=5.0)
    with pytest.raises(UsageError, match="EB173"):
        runner.run_batch(x)


def foreign(own: Profile) -> Iterator[tuple[Profile, str]]:
    yield dataclasses.replace(own, artifact="0" * 64), "another artifact"
    device = dataclasses.replace(own.device, engine_version="0.1")
    yield dataclasses.replace(own, device=device), "another device or engine"
    device = dataclasses.replace(own.device, cpu="Some Other CPU")
    yield dataclasses.replace(own, device=device), "another device or engine"


def test_a_foreign_profile_is_left_aside(folder: Path, tmp_path: Path) -> None:
    own = ea.profile_of(folder)
    for profile, why in foreign(own):
        file = tmp_path / "profile.json"
        file.write_bytes(profile.encode())
        for given in (profile, file):
            runner = Runner(folder, threads=1, profile=given)
            assert why in runner.profile_note
            assert runner.run(X, energy_mj=0.55).subnetwork == "narrow"
    file.write_bytes(b"{")
    assert "profile" in Runner(folder, threads=1, profile=file).profile_note
    file.write_bytes(own.encode())
    assert Runner(folder, threads=1, profile=file).profile_note == ""


def test_without_a_profile_a_deadline_gets_the_cheapest(folder: Path) -> None:
    out = Runner(folder, threads=1, profile=False).run(X, latency_ms=60_000)
    assert out.subnetwork == "exit1"
    assert out.broke == ()


def test_a_policy_of_ones_own_that_fails(folder: Path) -> None:
    def after_the_first(front: Front, ask: Ask, bounds: Bounds) -> Choice:
        if ask.ran:
            raise RuntimeError("lost")
        return Choice(front.index["full"])

    right(Runner(folder, policy=after_the_first, profile=False).run(X), "exit1", "lost")
    with pytest.raises(UsageError, match="EB181"):
        Runner(folder, profile=False).run(X, policy=lambda front, ask, bounds: Choice(99))


def test_what_is_known_to_fail_is_left_out_midway_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ambitious(front: Front, ask: Ask, bounds: Bounds) -> Choice:
        """To the second exit, and after the first on to the end."""
        best = "full" if ask.ran and "full" in front.index else "exit2"
        return Choice(front.index[best])

    refuse_to_open(monkeypatch, MemoryError(), "s2")
    runner = Runner(folder, policy=ambitious, profile=False)
    right(runner.run(X), "exit2", "s2 failed")
    right(runner.run(X), "exit2", "s2 failed")


def test_a_fault_under_many_callers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = refuse_to_open(monkeypatch, MemoryError(), "s2")
    runner = Runner(folder, threads=1, profile=False)
    draws = np.random.default_rng(0).normal(0.0, 2.0, (64, 1, 3)).astype(np.float32)
    with ThreadPoolExecutor(8) as pool:
        outs = list(pool.map(runner.run, draws))
    for x, out in zip(draws, outs, strict=True):
        assert out.degraded
        np.testing.assert_allclose(out.outputs["scores"], ea.expected(x, out.exit), atol=1e-4)
    assert asked.count("s2") == 1


def test_errors_hold_no_frames(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A remembered failure must not keep alive what was being loaded."""
    refuse_to_open(monkeypatch, MemoryError(), *ea.OFFSETS)
    runner = Runner(folder, profile=False)
    depths: list[int] = []
    for _ in range(3):
        try:
            runner.run(X)
        except EdgeBudgetError as e:
            depths.append(_depth(e))
    assert len(depths) == 3
    assert depths[1] == depths[2]


def _depth(e: BaseException) -> int:
    count, frame = 0, e.__traceback__
    while frame is not None:
        count, frame = count + 1, frame.tb_next
    return count


def test_closing_ends_calls_to_come(folder: Path) -> None:
    with Runner(folder, profile=False) as runner:
        runner.run(X)
    for call in (runner.run, runner.run_batch):
        with pytest.raises(UsageError, match="EB174"):
            call(X)
