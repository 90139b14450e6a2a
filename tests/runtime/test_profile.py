"""A profile comes back as it was, and one that is damaged or foreign is left aside."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgebudget_runtime import profile as pr
from edgebudget_runtime.cost import Cost, Figure
from edgebudget_runtime.device_id import Device, here
from edgebudget_runtime.errors import ArtifactError
from edgebudget_runtime.manifest import SubNetwork
from edgebudget_runtime.profile_detail import Detail, LayerTime, PathTimes

DEVICE = Device("cpu", 2, "x86_64", "Linux", "onnxruntime CPUExecutionProvider", "1.31.1", 1)
ARTIFACT = "ab" * 32
PROFILE = pr.Profile(
    artifact=ARTIFACT,
    device=DEVICE,
    samples_ms={"s0": (1.0, 1.5), "s1": (2.0,)},
    energy={"main": Figure(value=3.0, evidence="modelled", how="1 W")},
)
DETAIL = Detail(
    where="local",
    target="cpu",
    runs_before=5,
    paths={"main": PathTimes.of([1.0, 2.0, 3.0])},
    layers=(LayerTime(segment="s0", name="conv", op="Conv", ms=0.5, share=0.5),),
    memory_bytes=Figure(value=1e6, evidence="measured"),
)
SEGMENTS = ("s0", "s1", "s2")


def test_a_profile_comes_back(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "p.json"
    assert pr.save(PROFILE, file) == ""
    assert pr.load(file, ARTIFACT, DEVICE, SEGMENTS) == (PROFILE, "")
    assert file.read_bytes() == PROFILE.encode()
    assert [f.name for f in file.parent.iterdir()] == ["p.json"]


def test_detail_comes_back_and_files_without_it_are_read(tmp_path: Path) -> None:
    whole = dataclasses.replace(PROFILE, detail=DETAIL)
    assert pr.Profile.decode(whole.encode()) == whole
    old = json.loads(PROFILE.encode())
    del old["detail"]
    assert pr.Profile.decode(json.dumps({**old, "schema": 1}).encode()) == PROFILE


def test_a_profile_named_by_the_user_may_be_of_another_device(tmp_path: Path) -> None:
    pr.save(PROFILE, tmp_path / "p")
    assert pr.read(tmp_path / "p", ARTIFACT, SEGMENTS) == PROFILE
    with pytest.raises(ArtifactError, match="EB581"):
        pr.read(tmp_path / "p", "cd" * 32, SEGMENTS)
    (tmp_path / "p").write_bytes(b"{")
    for file in (tmp_path / "p", tmp_path / "none"):
        with pytest.raises(ArtifactError, match="EB580"):
            pr.read(file, ARTIFACT, SEGMENTS)


def test_percentiles_are_told_only_where_the_runs_can_tell() -> None:
    few = PathTimes.of([float(x) for x in range(1, 20)])
    assert (few.p50_ms, few.p90_ms, few.p95_ms, few.p99_ms) == (10.0, 18.0, None, None)
    many = PathTimes.of([float(x) for x in range(100, 0, -1)])
    assert (many.p50_ms, many.p90_ms, many.p95_ms, many.p99_ms) == (50.0, 90.0, 95.0, 99.0)
    assert many.spread_ms == 25.0


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"cpu": "other"}, "cpu 'cpu', here 'other'"),
        ({"engine_version": "1.32"}, "engine_version '1.31.1', here '1.32'"),
        ({"threads": 2}, "threads 1, here 2"),
    ],
)
def test_a_profile_of_another_device_is_left_aside(
    change: dict[str, Any], why: str, tmp_path: Path
) -> None:
    pr.save(PROFILE, tmp_path / "p")
    other = dataclasses.replace(DEVICE, **change)
    found, reason = pr.load(tmp_path / "p", ARTIFACT, other, SEGMENTS)
    assert found is None
    assert why in reason
    assert other.fingerprint != DEVICE.fingerprint


def test_a_profile_of_another_artifact_is_left_aside(tmp_path: Path) -> None:
    pr.save(PROFILE, tmp_path / "p")
    assert pr.load(tmp_path / "p", "cd" * 32, DEVICE, SEGMENTS)[0] is None
    assert pr.load(tmp_path / "p", ARTIFACT, DEVICE, ("s0",))[0] is None
    assert pr.load(tmp_path / "none", ARTIFACT, DEVICE, SEGMENTS)[0] is None
    assert pr.load(tmp_path, ARTIFACT, DEVICE, SEGMENTS)[0] is None


@pytest.mark.parametrize(
    "change",
    [
        {"schema": 3},
        {"schema": 1},  # which has no detail
        {"artifact": "x"},
        {"samples_ms": {"s0": []}},
        {"samples_ms": {"s0": [0.0]}},
        {"samples_ms": {"s0": ["1"]}},
        {"samples_ms": {"s0": [1.0] * 300}},
        {"samples_ms": {"s0": [float("nan")]}},
        {"device": {}},
        {"more": 1},
    ],
)
def test_a_damaged_profile_is_refused(change: dict[str, object], tmp_path: Path) -> None:
    data = json.dumps({**json.loads(PROFILE.encode()), **change}).encode()
    with pytest.raises(ArtifactError, match="EB580"):
        pr.Profile.decode(data)
    (tmp_path / "p").write_bytes(data)
    assert pr.load(tmp_path / "p", ARTIFACT, DEVICE, SEGMENTS)[0] is None


@given(st.binary(max_size=60) | st.integers(0, 400).map(lambda n: PROFILE.encode()[:n]))
def test_no_bytes_are_trusted(data: bytes) -> None:
    with pytest.raises(ArtifactError, match="EB580"):
        pr.Profile.decode(data)


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be written" in pr.save(PROFILE, tmp_path / "file" / "p.json")


def test_profiles_lie_in_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGEBUDGET_CACHE", str(tmp_path))
    file = pr.default_file(ARTIFACT, DEVICE)
    assert file == tmp_path / "profiles" / f"{ARTIFACT[:32]}-{DEVICE.fingerprint}.json"


def test_this_device_is_told_apart() -> None:
    mine = here("onnxruntime", "1.0", 1)
    assert mine == here("onnxruntime", "1.0", 1)
    assert mine.cpu
    assert mine.cores >= 1
    assert mine.fingerprint != here("onnxruntime", "1.1", 1).fingerprint


class Clock:
    """Time that passes only while segments run."""

    def __init__(self, cost_s: dict[str, float]) -> None:
        self.now, self.cost_s = 100.0, cost_s
        self.ran: list[str] = []

    def __call__(self) -> float:
        return self.now

    def run(self, segment: str) -> None:
        self.ran.append(segment)
        first = 3.0 if self.ran.count(segment) == 1 else 1.0
        self.now += first * self.cost_s[segment]


def test_calibration_takes_turns_and_drops_the_first_run() -> None:
    clock = Clock({"a": 0.01, "b": 0.02})
    found = pr.calibrate(clock.run, ("a", "b"), 1.0, clock)
    assert clock.ran[:6] == ["a", "b"] * 3
    assert clock.now - 100.0 <= 1.0
    assert found["a"] == pytest.approx([10.0] * len(found["a"]))
    assert found["b"] == pytest.approx([20.0] * len(found["b"]))


def test_calibration_ends_in_time_and_says_nothing_of_what_it_did_not_run() -> None:
    clock = Clock({"a": 0.1, "huge": 1.0, "never": 1.0})
    found = pr.calibrate(clock.run, ("a", "huge", "never"), 2.0, clock)
    assert found["huge"] == pytest.approx([3000.0])  # its only run, cold as it was
    assert "never" not in found


def test_calibration_does_not_believe_a_clock_that_goes_back() -> None:
    times = iter([0.0, 0.0, 0.0, -5.0, *([99.0] * 50)])
    assert pr.calibrate(lambda _: None, ("a",), 1.0, lambda: next(times)) == {}


def test_energy_is_modelled_known_or_unknown() -> None:
    cost = Cost(energy_mj=Figure(value=7.0, evidence="measured"))
    sub = SubNetwork("main", ("s0",), cost, None, None)
    modelled = pr.path_energy(sub, 4.0, 2.5)
    assert (modelled.value, modelled.evidence) == (10.0, "modelled")
    assert pr.path_energy(sub, 4.0, None) == cost.energy_mj
    assert pr.path_energy(sub, None, 2.5) == cost.energy_mj
    unknown = SubNetwork("main", ("s0",), Cost(), None, None)
    assert pr.path_energy(unknown, 4.0, None).evidence == "unknown"
