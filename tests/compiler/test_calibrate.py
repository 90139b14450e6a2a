"""A calibration keeps what it measured, whatever happens to it; predictors are checked data."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgebudget import calibrate as work
from edgebudget import predictor_fit, predictors, target_registry
from edgebudget.cli import main
from edgebudget.events import Event, Said
from edgebudget.kernels import FEATURES, Kernel, Observation, work_of
from edgebudget.predictor import SCHEMA, Errors, Predictor, Regressor, Trees
from edgebudget.program import Program
from edgebudget.target import Lowered, TargetSpec
from edgebudget_runtime.device_id import Device, here
from edgebudget_runtime.errors import ArtifactError, TargetError


def law(kernel: Kernel) -> float:
    """Microseconds of a kernel on a made-up device."""
    return 0.4 + kernel.macs / 2e4 + kernel.moved / 1e4


class Machine:
    """A target whose kernels take what `law` says; the clock adds 1.5 us to each, a run 4 us."""

    def __init__(self) -> None:
        real = target_registry.get("cpu")
        self.spec: TargetSpec = real.spec
        self.lower = real.lower
        self.asked: list[str] = []
        self.before: Callable[[str], None] = lambda name: None

    def device(self) -> Device:
        return here("made-up", "1", 1)

    def kernels(self, file: Path) -> tuple[Kernel, ...]:
        return target_registry.get("cpu").kernels(file)  # type: ignore[attr-defined,no-any-return]

    def observe(self, file: Path) -> Observation:
        self.asked.append(file.stem)
        self.before(file.stem)
        kernels = self.kernels(file)
        us = [law(k) for k in kernels]
        return Observation((sum(us) + 4.0) / 1e3, kernels, tuple(u + 1.5 for u in us))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGEBUDGET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(work, "_LEAST_UNITS", 8)
    return tmp_path / "cache"


def calibrated(machine: Any, networks: int = 5, **options: Any) -> tuple[work.Log, list[Event]]:
    said: list[Event] = []
    return work.calibrate(machine, networks=networks, rounds=1, emit=said.append, **options), said


def test_the_law_of_a_device_is_found(tmp_path: Path) -> None:
    machine = Machine()
    log, _ = calibrated(machine, networks=30)
    found = predictor_fit.fit(machine.device(), log.best)
    assert found.errors.networks == 60
    floor, each = predictor_fit._overheads(list(log.best.values()))
    assert (floor, each) == pytest.approx((4.0, 1.5), rel=1e-3)
    assert found.errors.median < 0.35  # of 30 networks' kernels; hundreds reach a few percent
    assert found.errors.rank_correlation > 0.9
    assert found.floor_us == pytest.approx(4.0, rel=1e-3)
    assert found.encode() == Predictor.decode(found.encode()).encode()
    new = machine.observe(
        work._lowered(machine, work.Unit(1000, reduced=False), tmp_path)  # type: ignore[arg-type]
    )
    figure = found.figure(new.kernels)
    assert figure.value == pytest.approx(new.total_ms, rel=0.6)
    assert figure.evidence == "modelled"
    assert f"median error {found.errors.median:.1%}" in figure.how
    assert "made-up 1" in figure.how


def test_kernels_are_fitted_to_whole_runs() -> None:
    """An engine that tells no kernel times gives a predictor that is nearly as good."""
    machine = Machine()
    log, _ = calibrated(machine, networks=30)
    told = predictor_fit.fit(machine.device(), log.best).errors
    whole = {k: dataclasses.replace(o, kernel_us=()) for k, o in log.best.items()}
    found = predictor_fit.fit(machine.device(), whole).errors
    assert found.median < told.median + 0.1
    assert found.rank_correlation > 0.9


def test_energies_are_fitted_where_a_counter_tells_them() -> None:
    """Joules that follow the work are found again; half of the networks were never metered."""
    machine = Machine()
    log, _ = calibrated(machine, networks=40)
    assert predictor_fit.fit(machine.device(), log.best).energy is None

    def joules(seen: Observation) -> float:
        work = work_of(seen.kernels, seen.total_ms)
        macs = sum(work.macs.values()) * 2e-9 + sum(work.bytes.values()) * 5e-9
        return macs + 3.0 * work.seconds

    metered = {
        name: dataclasses.replace(o, energy_mj=1e3 * joules(o)) if i % 2 else o
        for i, (name, o) in enumerate(log.best.items())
    }
    found = predictor_fit.fit(machine.device(), metered)
    assert found.energy is not None
    assert found.energy.count == 40
    assert found.energy.joules["seconds"] == pytest.approx(3.0, rel=0.02)
    assert found.energy.median_error < 0.3  # of times that are predicted, not measured
    again = Predictor.decode(found.encode())
    kernels = next(o for o in metered.values() if o.energy_mj is None).kernels
    figure = again.energy_figure(kernels)
    assert figure.evidence == "modelled"
    assert figure.value is not None
    assert found.energy.error_words in figure.how


def test_an_unmetered_device_tells_no_energy() -> None:
    figure = predictor(here("e", "1", 1)).energy_figure([Kernel("Conv", 9.0, 1.0, 0.0, 1.0)])
    assert figure.value is None
    assert "no energy counter" in figure.how


def test_chains_tell_kernels_apart() -> None:
    """What whole runs of mixed networks leave open, runs of one kernel again and again decide."""
    machine = Machine()
    machine.spec = dataclasses.replace(machine.spec, options={"calibration_chains": "5"})
    log, _ = calibrated(machine, networks=12)
    assert sum(n.startswith("c") for n in log.best) == 2 * 5 * 12
    whole = {k: dataclasses.replace(o, kernel_us=()) for k, o in log.best.items()}
    mixed = {k: o for k, o in whole.items() if not k.startswith("c")}
    errors = [predictor_fit.fit(machine.device(), seen).errors for seen in (whole, mixed)]
    assert [e.networks for e in errors] == [24, 24]
    assert errors[0].median < errors[1].median
    assert errors[0].median < 0.2


def test_an_interrupted_calibration_goes_on(cache: Path) -> None:
    machine = Machine()

    def stop(name: str) -> None:
        if len(machine.asked) > 6:
            raise KeyboardInterrupt

    machine.before = stop
    with pytest.raises(KeyboardInterrupt):
        calibrated(machine)
    kept = work.read_log(work.log_file(machine.device()))
    assert len(kept.best) == 6
    again = Machine()
    log, _ = calibrated(again)
    assert len(log.best) == 10
    assert len(again.asked) == 4
    assert not set(again.asked) & set(kept.best)


def test_networks_are_lowered_side_by_side_before_any_is_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    machine = Machine()
    machine.spec = dataclasses.replace(machine.spec, options={"calibration_ahead": "4"})
    real, pair, busy = machine.lower, threading.Barrier(2, timeout=60.0), list[str]()

    def lower(program: Program, folder: Path, name: str) -> Lowered:
        busy.append(name)
        pair.wait()  # it takes two at a time to get on
        try:
            if name == "3q":
                raise TargetError("EB612", "no such layer", hint="none")
            return real(program, folder, name)
        finally:
            busy.remove(name)

    def timed(name: str) -> None:
        assert busy == []

    machine.lower, machine.before = lower, timed
    log, _ = calibrated(machine)
    assert log.refused == {"3q": "no such layer"}
    assert len(log.best) == 9


def test_damaged_lines_are_skipped_and_counted() -> None:
    machine = Machine()
    calibrated(machine)
    file = work.log_file(machine.device())
    lines = file.read_text().splitlines()
    lines[2] = "\x00garbage"
    lines[3] = lines[3].replace('"us":[', '"us":["x",')
    lines[4] = json.dumps({"unit": "0f", "ms": -1, "us": [1], "kernels": []})
    file.write_text("\n".join(lines)[:-20])  # and the last is cut short
    log = work.read_log(file)
    assert log.skipped == 4
    assert len(log.best) == 6
    again, said = calibrated(Machine())
    assert len(again.best) == 10
    assert any(isinstance(e, Said) and "4 damaged lines" in e.text for e in said)
    assert work.read_log(file).skipped == 4  # what was written after the cut line is whole


def test_a_kernel_that_the_engine_refuses_is_left_out_once() -> None:
    machine = Machine()

    def refuse(name: str) -> None:
        if name == "3q":
            raise ArtifactError("EB510", "no such kernel", hint="none")

    machine.before = refuse
    log, said = calibrated(machine)
    assert log.refused == {"3q": "no such kernel"}
    assert len(log.best) == 9
    assert any(isinstance(e, Said) and "3q is left out: no such kernel" in e.text for e in said)
    again = Machine()
    calibrated(again)
    assert again.asked == []


def test_too_little_time_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(TargetError, match="EB651") as e:
        calibrated(Machine(), limit_s=0.0)
    assert "goes on" in e.value.hint


def test_the_quietest_round_counts() -> None:
    kernel = Kernel("Add", 0.0, 1.0, 0.0, 1.0)
    log = work.Log()
    log.add("0f", Observation(2.0, (kernel, kernel), (5.0, 1.0)))
    log.add("0f", Observation(1.0, (kernel, kernel), (3.0, 2.0)))
    assert log.best["0f"] == Observation(1.0, (kernel, kernel), (3.0, 1.0))
    log.add("0f", Observation(1.5, (kernel, kernel), (3.0, 2.0), 4.0))
    log.add("0f", Observation(1.5, (kernel, kernel), (3.0, 2.0), 6.0))
    assert log.best["0f"] == Observation(1.0, (kernel, kernel), (3.0, 1.0), 5.0)


def regressor(us: float = 2.0, trees: Trees | None = None) -> Regressor:
    weights = (0.0,) * FEATURES
    return Regressor(9, float(np.log(us)), weights, -2.0, 9.0, trees or Trees())


def predictor(device: Device, **changes: Any) -> Predictor:
    found = Predictor(
        device=device, errors=Errors(9, 0.05, 0.12, 0.99), floor_us=10.0, each_us=0.0,
        regressors={"*": regressor(), "Conv": regressor(100.0)},
    )  # fmt: skip
    return dataclasses.replace(found, **changes)


def test_kinds_fall_back_to_the_nearest() -> None:
    found = predictor(here("e", "1", 1))
    kernels = [Kernel(k, 0.0, 1.0, 0.0, 1.0) for k in ("Conv.nchwc.dw", "Softmax")]
    assert found.microseconds(kernels) == pytest.approx([100.0, 2.0])
    assert found.milliseconds(kernels) == pytest.approx(0.112)
    assert "no Conv.nchwc.dw, Softmax among" in found.figure(kernels).how


@pytest.mark.parametrize("change", [{"engine_version": "2"}, {"cpu": "other"}, {"threads": 2}])
def test_another_device_or_engine_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    device = here("onnxruntime-cpu", "1", 1)
    other = dataclasses.replace(device, **change)
    file = tmp_path / "theirs.json"
    predictor(other).save(file)
    name, value = next(iter(change.items()))
    with pytest.raises(TargetError, match="EB652") as e:
        predictors.adopt(file, device)
    assert f"{name} {value}, here" in e.value.what
    assert "edgebudget calibrate" in e.value.hint
    predictor(other).save(predictors.user_file(other))
    found, why = predictors.find(device)
    assert found is None
    if name != "cpu":
        assert f"{name} {value}, here" in why


def test_a_third_partys_predictor_is_data(tmp_path: Path) -> None:
    device = here("e", "1", 1)
    file = tmp_path / "theirs.json"
    predictor(device).save(file)
    assert predictors.adopt(file, device) == predictors.find(device)[0]


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[: len(raw) // 2],
        lambda raw: b"\x80\x04pickle",
        lambda raw: raw.replace(b'"schema":%d' % SCHEMA, b'"schema":1'),
        lambda raw: raw.replace(b'"floor_us":10.0', b'"floor_us":-1.0'),
        lambda raw: raw.replace(b'"*"', b'"?"'),
        lambda raw: raw.replace(b'"roots":[]', b'"roots":[5]'),
        lambda raw: raw.replace(b'"floor_us"', b'"run":"x","floor_us"'),
    ],
)
def test_a_damaged_predictor_is_refused(damage: Any, tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    file.write_bytes(damage(predictor(here("e", "1", 1)).encode()))
    with pytest.raises(ArtifactError, match="EB585"):
        predictors.adopt(file, here("e", "1", 1))


def test_trees_that_do_not_end_are_refused() -> None:
    with pytest.raises(ValueError, match="node 0"):
        Trees((0,), (0,), (0.0,), (0,), (0,), (0.0,))


def test_without_a_predictor_a_roofline_says_that_it_is_one() -> None:
    kernels = [Kernel("QLinearConv", 6e6, 1e3, 1e3, 1e3), Kernel("Conv", 6e6, 1e3, 1e3, 1e3)]
    figure = predictors.roofline(kernels, here("e", "1", 1), "nothing was calibrated")
    assert figure.evidence == "modelled"
    assert figure.how.startswith("roofline, uncalibrated: its error is unknown")
    assert figure.value == pytest.approx((100.5 + 300.5) / 1e3)


def test_the_command_says_what_it_cannot_calibrate(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", "--device", "ssh://board"]) == 5
    assert "EB246" in capsys.readouterr().err
    assert main(["calibrate", "--time-limit", "1s", "--networks", "1", "--rounds", "1"]) == 6
    assert "EB651" in capsys.readouterr().err


def test_the_command_on_this_machine(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    line = ["calibrate", "--networks", "8", "--rounds", "1", "--json", "--out", str(out)]
    assert main(line) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["networks"] == 16
    assert said["kernels"]["QLinearConv"] >= 4
    assert Predictor.decode(out.read_bytes()).errors.median == said["median_error"]
    cpu = target_registry.get("cpu")
    assert predictors.find(cpu.device())[0] is not None  # type: ignore[attr-defined]
