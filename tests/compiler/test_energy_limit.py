"""`--energy` as a limit: measured by a counter, else modelled by a named model, else refused."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

import edgebudget
from edgebudget.cli import main
from edgebudget.energy import metering
from edgebudget_runtime.budget import Budget
from edgebudget_runtime.errors import InfeasibleError
from edgebudget_runtime.manifest import Manifest
from edgebudget_runtime.measure.counters import Reading, difference


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("energy")


@pytest.fixture(autouse=True)
def own_cache(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEBUDGET_CACHE", str(work / "cache"))


class Counter:
    """10 W whatever happens, and 5 W more while this process works."""

    name = "made-up counter"

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def read(self) -> Reading | None:
        return Reading(now := time.perf_counter(), (10.0 * now + 5.0 * time.process_time(),))

    def joules(self, before: Reading, after: Reading) -> float | None:
        return difference(before, after, 1.0, (None,))


def energy_of(folder: Path) -> tuple[float, str, str]:
    figure = Manifest.load(folder).subnetworks[0].cost.energy_mj
    assert figure.value is not None
    return figure.value, figure.evidence, figure.how


@pytest.mark.parametrize("target", ["cpu", "npu:ethos-u55-128"])
def test_a_modelled_energy_is_a_limit_that_cuts_the_network(target: str, tmp_path: Path) -> None:
    if target != "cpu":
        pytest.importorskip("executorch", reason="ExecuTorch is not installed")
    loose = Budget.parse(energy="1J")
    edgebudget.compile(
        "digits", target=target, budget=loose, energy_model="7nm", out=tmp_path / "loose"
    )
    most, evidence, how = energy_of(tmp_path / "loose")
    assert evidence == "modelled"
    assert "not calibrated" in how
    tight = Budget.parse(energy=f"{0.6 * most:.9f}mJ")
    edgebudget.compile(
        "digits", target=target, budget=tight, energy_model="7nm", out=tmp_path / "tight"
    )
    manifest = Manifest.load(tmp_path / "tight")
    assert energy_of(tmp_path / "tight")[0] <= 0.6 * most
    assert manifest.holds
    was = Manifest.load(tmp_path / "loose").subnetworks[0].cost.macs.value
    cut = manifest.subnetworks[0].cost.macs.value
    assert was is not None
    assert cut is not None
    assert cut < was


def test_what_nothing_could_reach_is_refused_with_the_smallest_draft(tmp_path: Path) -> None:
    with pytest.raises(InfeasibleError, match="EB404") as e:
        edgebudget.compile(
            "digits", budget=Budget.parse(energy="0.0000001mJ"), energy_model="7nm",
            out=tmp_path / "out",
        )  # fmt: skip
    assert "energy_mj" in e.value.what
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("extra", "code", "said"),
    [
        ([], 3, "--energy-model"),
        (["--energy-model", "3nm"], 2, "EB148"),
        (["--energy-model", "gone.json"], 5, "EB587"),
        (["--energy-model", "7nm", "--target", "npu"], 3, "no energy of int16"),
    ],
)
def test_no_figure_is_no_proof(
    extra: list[str], code: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if metering.counter_of("cpu")[0] is not None and code == 3:
        pytest.skip("this processor counts its energy")
    if "npu" in extra:
        pytest.importorskip("onnxruntime_qnn", reason="the NPU's compiler is not installed")
    out = tmp_path / "out"
    assert main(["compile", "digits", "--energy", "5mJ", "--out", str(out), *extra]) == code
    assert said in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("target", ["cpu", "cpu:xnnpack"])
def test_a_counter_measures(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if target != "cpu":
        pytest.importorskip("executorch", reason="ExecuTorch is not installed")
    monkeypatch.setattr(metering, "counter_of", lambda family: (Counter(), ""))
    monkeypatch.setattr(metering, "_SETTLE_S", 0.0)
    monkeypatch.setattr(metering, "_IDLE_S", 0.1)
    metering._idle.cache_clear()
    edgebudget.compile(
        "digits", target=target, budget=Budget.parse(energy="1J"), out=tmp_path / "out"
    )
    metering._idle.cache_clear()
    value, evidence, how = energy_of(tmp_path / "out")
    assert evidence == "measured"
    assert "made-up counter, less 10 W of idle power" in how
    assert 0 < value < 1000
