"""`adb:` against a stand-in client that replays what real ones answer, and without any client.

No phone takes part: answers are those of adb 35 and Android 14, and the benchmark program's file
has the columns that ONNX Runtime's sources write.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from edgebudget import devices
from edgebudget.devices import adb
from edgebudget.energy import android
from edgebudget.profile_collect import Collected, collect
from edgebudget_runtime import engine
from edgebudget_runtime.errors import TargetError
from edgebudget_runtime.measure.job import Job
from tests.runtime import elastic_artifact as ea

JOB = Job(folder="", provider=engine.CPU, threads=2, seconds=1.0)
FED = """Current Battery Service state:
  AC powered: false
  USB powered: true
  Wireless powered: false
  Dock powered: false
  Max charging current: 500000
  Charge counter: 2674000
  status: 2
  health: 2
  present: true
  level: 84
  scale: 100
  voltage: 4063
  temperature: 326
  technology: Li-ion
"""
UNPLUGGED = FED.replace("USB powered: true", "USB powered: false").replace("status: 2", "status: 3")
GAUGE = "Discharging\n-412000\n3900000\n"

CLIENT = """#!{python}
import json, os, sys
state = json.load(open({state!r}))
serial, command, rest = sys.argv[2], sys.argv[3], sys.argv[4:]
with open({log!r}, "a") as log:
    log.write(json.dumps(sys.argv[1:]) + "\\n")
if state.get("gone") and state["gone"] in " ".join(rest):
    sys.exit(f"adb: device '{{serial}}' not found")
if command == "get-state":
    if "error" in state:
        sys.exit(state["error"])
    print("device")
elif command == "push":
    print(f"{{rest[0]}}: 1 file pushed, 0 skipped.")
else:
    for part, answer in state["shell"].items():
        if part in rest[0]:
            sys.stdout.write(answer)
            break
"""


class Phone:
    """The stand-in and what it was asked."""

    def __init__(self, folder: Path) -> None:
        self.state, self.log = folder / "state.json", folder / "log"
        self.log.write_text("")
        client = folder / "bin" / "adb"
        client.parent.mkdir()
        text = CLIENT.format(python=sys.executable, state=str(self.state), log=str(self.log))
        client.write_text(text)
        client.chmod(0o755)
        self.answers(dumpsys=FED)

    def answers(self, *, dumpsys: str = FED, gauge: str = GAUGE, **more: str) -> None:
        rows = "".join(f"a, model,{0.002 + i * 1e-5},52428800,98,{i}\n" for i in range(12))
        args = {"op_name": "MatMul", "node_index": "1", "provider": "CPUExecutionProvider"}
        node = {"cat": "Node", "name": "MatMul_kernel_time", "dur": 7, "args": args}
        shell = {
            "nproc": "8\n",
            "ro.soc.model": "SM8650\n",
            "ro.product.cpu.abi": "arm64-v8a\n",
            "ro.build.version.release": "14\n",
            "dumpsys battery": dumpsys,
            "current_now": gauge,
            "cat trace": json.dumps([node, node]),
            "result.csv": rows,
        }
        self.state.write_text(json.dumps({"shell": shell, **more}))

    def asked(self) -> list[list[str]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]


@pytest.fixture
def phone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Phone:
    found = Phone(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return found


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    ea.write(tmp_path / "toy")
    return tmp_path / "toy"


@pytest.fixture
def runner(tmp_path: Path) -> Path:
    (tmp_path / "tools").mkdir()
    file = tmp_path / "tools" / "onnxruntime_perf_test"
    file.write_bytes(b"\x7fELF")
    (tmp_path / "tools" / "libonnxruntime.so").write_bytes(b"\x7fELF")
    return file


def told(artifact: Path, runner: Path | None, job: Job = JOB) -> Collected:
    return collect(devices.link("adb:R5CT", runner=runner).lines(job, artifact))


def test_segments_are_timed_and_the_phone_is_tidied(
    phone: Phone, artifact: Path, runner: Path
) -> None:
    found = told(artifact, runner)
    assert found.error is None
    made = found.profile("ab" * 32, "adb:R5CT", "cpu", ())
    assert made.samples_ms["t1"][:2] == pytest.approx((2.0, 2.01))
    assert made.device.cpu == "SM8650"
    assert made.device.system == "Android 14"
    assert made.detail is not None
    assert made.detail.paths.keys() == {"exit1", "narrow1"}  # the ones of one segment
    assert any("never tested on a phone" in n for n in made.detail.notes)
    assert made.detail.conditions["temperature_after_c"].value == 32.6
    assert "fed over USB" in made.detail.idle_w.how
    assert made.energy == {}
    assert [k.op for k in found.kernels["s0"]] == ["MatMul"]
    asked = phone.asked()
    assert all(a[:2] == ["-s", "R5CT"] for a in asked)
    pushed = {a[-1].rpartition("/")[2] for a in asked if a[2] == "push"}
    assert {"onnxruntime_perf_test", "libonnxruntime.so", "s0.onnx"} <= pushed
    assert asked[-1][3].startswith("rm -rf /data/local/tmp/edgebudget-")


def test_an_unplugged_phone_tells_its_energy(
    phone: Phone, artifact: Path, runner: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adb, "_BURST_S", 0.3)
    monkeypatch.setattr(adb, "_IDLE_S", 1.0)
    monkeypatch.setattr(adb, "_GAUGE_S", 0.02)
    phone.answers(dumpsys=UNPLUGGED)
    found = told(artifact, runner)
    assert found.error is None
    assert found.idle_w.value == pytest.approx(0.412 * 3.9)
    assert found.gross["exit1"].evidence == "measured"
    assert found.net["exit1"].value is None  # this phone draws no more when it runs
    phone.answers(dumpsys=UNPLUGGED, gauge="\n\n\n")
    assert "not readable" in told(artifact, runner).idle_w.how


@pytest.mark.parametrize(
    ("said", "hint"),
    [
        ("error: device 'R5CT' not found", "adb devices"),
        ("error: device unauthorized.\nThis adb server's $ADB_VENDOR_KEYS is not set", "unlock"),
        ("error: device offline", "reconnect"),
    ],
)
def test_a_phone_that_does_not_let_us_in_is_said(
    said: str, hint: str, phone: Phone, artifact: Path, runner: Path
) -> None:
    phone.answers(error=said)
    error = told(artifact, runner).error
    assert error is not None
    assert error.code == "EB640"
    assert said.splitlines()[0] in error.what
    assert hint in error.hint


def test_a_phone_lost_half_way_leaves_what_came(phone: Phone, artifact: Path, runner: Path) -> None:
    phone.answers(gone="segments/s2.onnx result.csv")
    found = told(artifact, runner)
    assert found.error is not None
    assert found.error.code == "EB643"
    assert found.segments.keys() == {"s0", "s1"}
    assert phone.asked()[-1][3].startswith("rm -rf")


def test_what_is_missing_is_named(
    phone: Phone, artifact: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for runner in (None, tmp_path / "none"):
        error = told(artifact, runner).error
        assert error is not None
        assert error.code == "EB641"
        assert "onnxruntime_perf_test" in error.what
    monkeypatch.setenv("PATH", str(tmp_path))
    error = told(artifact, None).error
    assert error is not None
    assert (error.code, error.what) == ("EB640", "there is no adb here")


def test_other_engines_are_refused_over_adb(phone: Phone, artifact: Path, runner: Path) -> None:
    job = Job(folder="", provider="WebGpuExecutionProvider")
    with pytest.raises(TargetError, match="EB645"):
        list(devices.link("adb:R5CT", runner=runner).lines(job, artifact))


def test_the_battery_is_read_only_while_it_feeds_the_phone() -> None:
    fed, own = android.battery(FED), android.battery(UNPLUGGED)
    assert not fed.discharging
    assert "fed over USB" in fed.why
    assert (own.discharging, own.why, own.temperature_c) == (True, "", 32.6)
    assert "does not say" in android.battery("").why
    assert android.watts(GAUGE) == pytest.approx(0.412 * 3.9)
    for gauge in ("", "Charging\n1\n1\n", "Discharging\n\n3900000\n", "Discharging\nx\n1\n"):
        assert android.watts(gauge) is None
