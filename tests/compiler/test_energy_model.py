"""The energy model: known coefficients come back, errors are of samples left out, nothing is
extrapolated in silence."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from edgebudget.energy_model import Sample, Work, fit, load, technology
from edgebudget_runtime.errors import ArtifactError, UsageError

MAC_J, BYTE_J, STATIC_W = 2e-12, 1.5e-10, 40.0
NAMES = {"device": "a card", "engine": "webgpu", "engine_version": "1.2"}


def work(macs: float, moved: float, seconds: float) -> Work:
    return Work(macs={"float16": macs}, bytes={"dram": moved}, seconds=seconds)


def samples(noise: float = 0.0, count: int = 40) -> list[Sample]:
    rng = np.random.default_rng(0)
    found = []
    for i in range(count):
        macs, moved, seconds = 10 ** rng.uniform([8, 6, -3], [10, 8, -1.5])
        joules = MAC_J * macs + BYTE_J * moved + STATIC_W * seconds
        joules *= 1 + noise * rng.uniform(-1, 1)
        found.append(Sample(work=work(macs, moved, seconds), joules=joules, group=f"net{i % 8}"))
    return found


def test_exact_samples_give_their_coefficients() -> None:
    model = fit(samples(), **NAMES)
    assert model.joules["mac float16"] == pytest.approx(MAC_J, rel=1e-6)
    assert model.joules["byte dram"] == pytest.approx(BYTE_J, rel=1e-6)
    assert model.joules["seconds"] == pytest.approx(STATIC_W, rel=1e-6)
    assert model.p90_error < 1e-6
    figure = model.predict(work(1e9, 1e7, 0.01))
    assert figure.value == pytest.approx(1e3 * (MAC_J * 1e9 + BYTE_J * 1e7 + STATIC_W * 0.01))
    assert figure.evidence == "modelled"
    assert "cross-validated" in figure.how


def test_the_error_is_of_what_was_left_out() -> None:
    model = fit(samples(noise=0.2), **NAMES)
    assert 0.03 < model.median_error < 0.2
    assert model.median_error < model.p90_error
    assert model.folds == 8
    figure = model.predict(work(1e9, 1e7, 0.01))
    assert figure.value is not None
    assert figure.spread == pytest.approx(figure.value * model.median_error)


def test_runs_that_a_meter_missed_move_nothing() -> None:
    """Their joules are a fortieth of the truth: divided by them, they would outweigh all others."""
    found = samples(noise=0.1, count=80)
    for i in (3, 50):
        found[i] = dataclasses.replace(found[i], joules=found[i].joules / 40)
    one = work(1e9, 1e7, 0.01)
    told, wanted = fit(found, **NAMES).predict(one), fit(samples(count=80), **NAMES).predict(one)
    assert told.value == pytest.approx(wanted.value, rel=0.05)


def test_no_coefficient_is_negative() -> None:
    """Time explains these alone; least squares would give some bytes a negative energy."""
    rng = np.random.default_rng(1)
    found = [
        Sample(work=work(1e9 * s, 1e7 / s, s), joules=50 * s * rng.uniform(0.9, 1.1), group=str(i))
        for i, s in enumerate(np.linspace(0.01, 0.1, 12))
    ]
    assert min(fit(found, **NAMES).joules.values()) >= 0


@pytest.mark.parametrize(
    ("strange", "why"),
    [
        (work(1e12, 1e7, 0.01), "mac float16 is .* times the most"),
        (work(1e9, 10.0, 0.01), "byte dram is .* times the least"),
        (Work(macs={"int8": 1e9}, seconds=0.01), "no mac int8 was measured"),
    ],
)
def test_nothing_is_extrapolated_in_silence(strange: Work, why: str) -> None:
    model = fit(samples(), **NAMES)
    with pytest.raises(UsageError, match=f"EB148.*{why}"):
        model.predict(strange)
    if "int8" in strange.macs:
        with pytest.raises(UsageError, match="EB148"):
            model.predict(strange, extrapolate=True)
        return
    figure = model.predict(strange, extrapolate=True)
    assert "extrapolated" in figure.how
    assert figure.spread is None


def test_a_model_comes_back_and_is_tied_to_its_engine(tmp_path: Path) -> None:
    model, file = fit(samples(), **NAMES), tmp_path / "deep" / "energy.json"
    model.save(file)
    assert load(file, engine="webgpu", engine_version="1.2") == model
    with pytest.raises(ArtifactError, match=r"EB588.*webgpu 1.2, here is webgpu 1.3"):
        load(file, engine="webgpu", engine_version="1.3")


@pytest.mark.parametrize(
    "change", [{"schema": 9}, {"joules": {"seconds": -1.0}}, {"count": "3"}, {"more": 1}]
)
def test_a_damaged_model_is_refused(change: dict[str, object], tmp_path: Path) -> None:
    model = fit(samples(), **NAMES)
    file = tmp_path / "energy.json"
    file.write_text(json.dumps({**json.loads(model.encode()), **change}))
    for place in (file, tmp_path / "none"):
        with pytest.raises(ArtifactError, match="EB587"):
            load(place, engine="webgpu", engine_version="1.2")


def test_too_little_or_impossible_measurements_are_refused() -> None:
    with pytest.raises(UsageError, match=r"EB149.*cannot tell 3"):
        fit(samples(count=5), **NAMES)
    bad = [*samples(), Sample(work=work(1e9, 1e7, 0.01), joules=0.0)]
    with pytest.raises(UsageError, match="EB149"):
        fit(bad, **NAMES)


def test_a_technology_tells_its_source_and_error() -> None:
    old = technology("45nm")
    done = Work(macs={"int8": 1e9}, bytes={"dram": 1e6, "sram_32kb": 1e9}, seconds=0.1)
    figure = old.predict(done)
    dram = (162.5 + 325.0) / 2
    assert figure.value == pytest.approx((0.3e9 + dram * 1e6 + 2.5e9) * 1e-9)
    assert figure.spread == pytest.approx(figure.value)
    assert "Horowitz" in figure.how
    assert "static power left out" in figure.how
    fed = old.predict(done, static_w=2.0)
    assert (fed.value or 0) - (figure.value or 0) == pytest.approx(200.0)
    new = technology("7nm").predict(Work(macs={"float32": 1e9}))
    assert new.value == pytest.approx(1.69)


def test_what_a_source_does_not_give_stays_unknown() -> None:
    figure = technology("7nm").predict(Work(macs={"int4": 1e9}, bytes={"sram_8kb": 1.0}))
    assert figure.value is None
    assert "int4, sram_8kb" in figure.how
    with pytest.raises(UsageError, match="EB148"):
        technology("3nm")


def test_equal_samples_give_equal_models() -> None:
    assert fit(samples(), **NAMES).encode() == fit(samples(), **NAMES).encode()
