"""Inputs at a rate: paced, dropped or degraded when late, within an energy allowance."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from edgebudget_runtime import Runner
from edgebudget_runtime.errors import UsageError
from tests.runtime import elastic_artifact as ea
from tests.runtime.elastic_artifact import Array, Machine


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


@pytest.fixture
def runner(tmp_path: Path, machine: Machine) -> Runner:
    ea.write(tmp_path / "toy")
    profile = ea.profile_of(tmp_path / "toy")
    runner = Runner(tmp_path / "toy", threads=1, clock=machine, profile=profile)
    runner.warm_up()
    return runner


class Sleep:
    """Lets the machine's time pass."""

    def __init__(self, machine: Machine) -> None:
        self.machine, self.calls = machine, list[float]()

    def __call__(self, seconds: float) -> None:
        self.calls.append(seconds)
        self.machine.now_s += seconds


def frames(count: int) -> list[Array]:
    return [ea.sure(count)[i : i + 1] for i in range(count)]


def test_a_list_is_paced_and_answered_in_time(runner: Runner, machine: Machine) -> None:
    sleep = Sleep(machine)
    stream = runner.stream(frames(20), rate_hz=100.0, sleep=sleep)
    out = list(stream)
    assert [f.number for f in out] == list(range(20))
    assert all(f.outcome is not None and f.outcome.subnetwork == "full" for f in out)
    for x, f in zip(frames(20), out, strict=True):
        assert f.outcome is not None
        np.testing.assert_allclose(f.outcome.outputs["scores"], ea.expected(x, "s2"))
    assert (stream.answered, stream.dropped, stream.degraded, stream.missed) == (20, 0, 0, 0)
    assert machine.now_s == pytest.approx(20 * 0.01)  # the end is found when a next one is due
    assert sum(sleep.calls) == pytest.approx(20 * 0.003)


@pytest.mark.parametrize(
    ("rate_hz", "wanted"), [(1000 / 3.6, "narrow"), (1000 / 1.6, "narrow1"), (900.0, "exit1")]
)
def test_the_rate_is_the_deadline(
    runner: Runner, machine: Machine, rate_hz: float, wanted: str
) -> None:
    stream = runner.stream(frames(10), rate_hz=rate_hz, sleep=Sleep(machine))
    assert {f.outcome.subnetwork for f in stream if f.outcome} == {wanted}
    assert stream.missed == stream.dropped == 0


@pytest.mark.parametrize(("late", "dropped"), [("drop", 3), ("degrade", 0)])
def test_inputs_that_come_too_late(
    runner: Runner, machine: Machine, late: Literal["drop", "degrade"], dropped: int
) -> None:
    stream = runner.stream(frames(10), rate_hz=100.0, late=late, sleep=Sleep(machine))
    first = next(stream)
    assert first.outcome is not None
    machine.slow["s0"] = 45.0  # the second answer is late, and others wait behind it
    rest = list(stream)
    assert rest[0].outcome is not None
    assert rest[0].late
    assert (rest[0].outcome.exit, rest[0].outcome.degraded) == ("s0", True)
    assert stream.missed >= 1
    assert stream.dropped == dropped
    assert stream.answered + stream.dropped == 10
    if late == "degrade":
        behind = [f for f in rest if f.why == "its time had passed"]
        assert behind
        assert {f.outcome.subnetwork for f in behind if f.outcome} == {"exit1"}
        assert stream.degraded >= len(behind)
    else:
        assert all(f.why == "its time had passed" for f in rest if f.outcome is None)
    assert rest[-1].outcome is not None
    assert rest[-1].outcome.broke == ()  # caught up


def test_a_source_that_makes_us_wait_sets_the_pace(runner: Runner, machine: Machine) -> None:
    def camera() -> Iterator[Array]:
        for x in frames(8):
            machine.now_s += 0.037
            yield x

    stream = runner.stream(camera(), rate_hz=100.0, sleep=Sleep(machine))
    out = list(stream)
    assert len(out) == 8
    assert stream.dropped == stream.missed == 0
    assert {f.outcome.subnetwork for f in out if f.outcome} == {"full"}


def test_watts_bound_the_mean(runner: Runner, machine: Machine) -> None:
    # 10 a second at 0.1 (exit1) to 1.0 mJ (full): 5 mW allow half a millijoule each.
    stream = runner.stream(
        frames(600), rate_hz=10.0, watts=5e-3, joules=10e-3, sleep=Sleep(machine)
    )
    spent = [f.outcome.spent.energy_mj.value or 0.0 for f in stream if f.outcome]
    assert len(spent) == 600
    assert sum(spent) <= 10.0 + 5.0 * machine.now_s
    assert np.mean(spent[300:]) == pytest.approx(0.5, abs=0.1)  # and what there is, is used
    assert stream.joules_left is not None
    assert stream.joules_left >= 0.0


@pytest.mark.parametrize("late", ["drop", "degrade"])
def test_a_battery_that_runs_out(
    runner: Runner, machine: Machine, late: Literal["drop", "degrade"]
) -> None:
    stream = runner.stream(
        frames(40), rate_hz=10.0, joules=2e-3, late=late, policy="best", sleep=Sleep(machine)
    )
    out = list(stream)
    spent = sum(f.outcome.spent.energy_mj.value or 0.0 for f in out if f.outcome)
    last = out[-1]
    assert last.why == "no energy was left"
    if late == "drop":
        assert last.outcome is None
        assert spent <= 2.0 + 0.1
        assert stream.dropped > 0
    else:
        assert last.outcome is not None
        assert last.outcome.subnetwork == "exit1"
        assert [v.limit.resource for v in last.outcome.broke] == ["energy_mj"]


@pytest.mark.parametrize("jump_s", [-1e5, 1e5])
def test_a_clock_that_jumps_between_inputs(runner: Runner, machine: Machine, jump_s: float) -> None:
    sleep = Sleep(machine)
    stream = runner.stream(frames(20), rate_hz=100.0, sleep=sleep)
    for _ in range(5):
        next(stream)
    machine.now_s += jump_s
    rest = list(stream)
    assert len(rest) == 15
    assert stream.jumps == 1
    assert stream.dropped == 0
    assert max(sleep.calls) <= 0.011


def test_a_bad_input_does_not_end_the_stream(runner: Runner, machine: Machine) -> None:
    bad = np.full((1, 3), np.nan, np.float32)
    stream = runner.stream([ea.sure(), bad, ea.sure()], rate_hz=10.0, sleep=Sleep(machine))
    assert next(stream).outcome is not None
    with pytest.raises(UsageError, match="EB173"):
        next(stream)
    assert next(stream).number == 2
    assert list(stream) == []


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        ({"rate_hz": 0.0}, "EB185"),
        ({"rate_hz": float("nan")}, "EB185"),
        ({"rate_hz": 10.0, "late": "wait"}, "EB185"),
        ({"rate_hz": 10.0, "watts": -1.0}, "EB182"),
        ({"rate_hz": 10.0, "joules": 0.0}, "EB182"),
        ({"rate_hz": 10.0, "policy": "nonsense"}, "EB180"),
    ],
)
def test_settings_out_of_range_are_refused(
    runner: Runner, settings: dict[str, Any], code: str
) -> None:
    with pytest.raises(UsageError, match=code):
        runner.stream(frames(1), **settings)
