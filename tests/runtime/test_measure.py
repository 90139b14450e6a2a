"""Measuring: paths in turn, nodes from the engine's own trace, the device's state from files."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edgebudget_runtime import engine
from edgebudget_runtime.errors import UsageError
from edgebudget_runtime.manifest import Manifest, Tensor
from edgebudget_runtime.measure import conditions, layers, probe, rapl, samples
from edgebudget_runtime.measure.job import Job
from edgebudget_runtime.measure.timing import Paths
from edgebudget_runtime.sessions import Sessions
from edgebudget_runtime.walk import Segments
from tests.runtime import elastic_artifact as ea


def paths_of(folder: Path, machine: ea.Machine) -> Paths:
    manifest = Manifest.load(folder)
    sessions = Sessions(
        folder, manifest, verify=True, providers=(engine.CPU,), options=None, threads=1,
        limit_bytes=None,
    )  # fmt: skip
    segments = Segments(manifest, sessions, machine)
    return Paths(segments, ea.PATHS, {id: {"x": ea.sure()} for id in ea.PATHS}, machine)


def test_paths_take_turns_and_tell_their_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ea.write(tmp_path)
    machine = ea.Machine(monkeypatch)
    paths = paths_of(tmp_path, machine)
    assert paths.warm("full") == 5
    machine.ran.clear()
    found = list(paths.times(10.0, 3))
    assert machine.ran == [s for path in ea.PATHS.values() for s in path] * 3
    (times,) = found
    for id, path in ea.PATHS.items():
        assert times.paths[id] == pytest.approx([sum(ea.MS[s] for s in path)] * 3)
    assert times.segments["s0"] == pytest.approx([ea.MS["s0"]] * 9)


def test_no_turn_begins_after_the_time_is_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ea.write(tmp_path)
    machine = ea.Machine(monkeypatch, {s: 1000.0 for s in ea.MS})
    parts = list(paths_of(tmp_path, machine).times(0.5, 100))
    assert sum(len(p.paths["full"]) for p in parts) == 1


def test_the_probe_tells_all_of_a_real_artifact(tmp_path: Path) -> None:
    ea.write(tmp_path)
    told: list[dict[str, Any]] = []
    job = Job(folder=str(tmp_path), provider=engine.CPU, threads=1, seconds=0.2, runs=20)
    probe.measure(job, lambda kind, **what: told.append({"kind": kind, **what}))
    json.dumps(told)
    kinds = [t["kind"] for t in told]
    assert kinds[:2] == ["device", "state"]
    times = [t for t in told if t["kind"] == "times"]
    assert {len(t["paths"]["narrow"]) for t in times} == {20}
    traced = {t["segment"]: t["kernels"] for t in told if t["kind"] == "layers"}
    assert traced.keys() == ea.MACS.keys()
    assert "MatMul" in {k["op"] for k in traced["t0"]}
    assert "memory" in kinds


def test_memory_is_what_a_process_of_its_own_grows_by(tmp_path: Path) -> None:
    ea.write(tmp_path)
    code = (
        "import json, sys\n"
        "from edgebudget_runtime.measure import probe\n"
        "from edgebudget_runtime.measure.job import Job\n"
        "job = Job(folder=sys.argv[1], provider=sys.argv[2], threads=1, seconds=0.2, runs=20)\n"
        "told = []\n"
        "probe.measure(job, lambda kind, **what: told.append({'kind': kind, **what}))\n"
        "sys.stdout.write(json.dumps(told))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), engine.CPU], check=True, capture_output=True
    )
    (memory,) = (t["figure"] for t in json.loads(done.stdout) if t["kind"] == "memory")
    assert memory["evidence"] == "measured"
    assert memory["value"] > 0


def test_the_probe_reads_energy_where_there_is_a_counter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tree of powercap files that something keeps counting up, 20 W whatever happens."""
    domain = tmp_path / "sys/class/powercap/intel-rapl:0"
    domain.mkdir(parents=True)
    (domain / "name").write_text("package-0\n")
    (domain / "max_energy_range_uj").write_text("262143328850\n")
    ended = threading.Event()

    def count() -> None:
        began = time.perf_counter()
        while not ended.is_set():
            (tmp_path / "next").write_text(f"{int((time.perf_counter() - began) * 20e6) + 1}\n")
            (tmp_path / "next").replace(domain / "energy_uj")
            time.sleep(0.002)

    thread = threading.Thread(target=count)
    thread.start()
    real = rapl.find
    monkeypatch.setattr(rapl, "find", lambda: real(tmp_path))
    monkeypatch.setattr(probe, "_LEAST_S", 0.5)
    ea.write(tmp_path / "toy")
    told: list[dict[str, Any]] = []
    job = Job(folder=str(tmp_path / "toy"), provider=engine.CPU, threads=1, seconds=0.1,
              layers=False)  # fmt: skip
    try:
        while not (domain / "energy_uj").exists():
            time.sleep(0.01)
        probe.measure(job, lambda kind, **what: told.append({"kind": kind, **what}))
    finally:
        ended.set()
        thread.join()
    idle = next(t["figure"] for t in told if t["kind"] == "idle")
    assert idle["evidence"] == "measured"
    assert "RAPL package-0" in idle["how"]
    energies = [t for t in told if t["kind"] == "energy"]
    assert {e["path"] for e in energies} == ea.PATHS.keys()
    assert all(e["gross"]["value"] > 0 for e in energies)


def test_a_trace_is_read_node_by_node(tmp_path: Path) -> None:
    def node(name: str, us: int, index: str) -> dict[str, Any]:
        args = {"op_name": "Conv", "node_index": index, "provider": "CPUExecutionProvider"}
        return {"cat": "Node", "name": f"{name}_kernel_time", "dur": us, "args": args}

    cold = [node("a", 9000, "1"), node("b", 9000, "2"), node("b", 9000, "3")]
    warm = [node("a", 10, "1"), node("b", 20, "2"), node("b", 30, "3")]
    session = {"cat": "Session", "name": "model_run", "dur": 1, "args": {}}
    file = tmp_path / "trace.json"
    file.write_text(json.dumps([session, *cold, *warm, *warm, {"cat": "Node"}, 5]))
    found = [(k.name, k.ms) for k in layers.read(file)]
    assert found == [("a", 0.01), ("b", 0.02), ("b", 0.03)]
    file.write_text("[{")
    assert layers.read(file) == []
    assert layers.read(tmp_path / "none") == []


def test_the_state_of_a_device_comes_from_its_files(tmp_path: Path) -> None:
    def write(path: str, value: object) -> None:
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{value}\n")

    for figure in conditions.state("before", tmp_path).values():
        assert figure.value is None
        assert figure.how
    write("sys/class/thermal/thermal_zone0/temp", 41000)
    write("sys/class/thermal/thermal_zone1/temp", 63500)
    write("sys/class/thermal/thermal_zone1/type", "x86_pkg_temp")
    write("sys/class/thermal/thermal_zone2/temp", -274000)  # a sensor that is not connected
    write("sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq", 2_000_000)
    write("sys/devices/system/cpu/cpu1/cpufreq/scaling_cur_freq", 3_000_000)
    write("sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count", 7)
    write("proc/loadavg", "1.25 0.9 0.8 1/234 5678")
    found = conditions.state("after", tmp_path)
    assert found["temperature_after_c"].value == 63.5
    assert "x86_pkg_temp" in found["temperature_after_c"].how
    assert found["frequency_after_mhz"].value == 2500.0
    assert found["throttle_events_after"].value == 7.0
    assert found["load_after"].value == 1.25


def test_samples_have_the_shapes_and_types_asked_for() -> None:
    tensors = [
        Tensor("f", (None, 3), "float32"),
        Tensor("h", (2,), "float16"),
        Tensor("b", (4,), "uint8"),
        Tensor("ids", (1, 5), "int64"),
    ]
    made = samples.make(tensors)
    assert [(a.shape, a.dtype.name) for a in made.values()] == [
        ((1, 3), "float32"), ((2,), "float16"), ((4,), "uint8"), ((1, 5), "int64")
    ]  # fmt: skip
    assert not made["ids"].any()  # an index of any table
    assert all(np.array_equal(a, b) for a, b in zip(
        made.values(), samples.make(tensors).values(), strict=True))  # fmt: skip


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"folder": 1}', "not json"])
def test_a_job_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="EB188"):
        Job.decode(text)


def test_a_job_crosses_over() -> None:
    job = Job(folder="x", provider="p", counters=("a:b",))
    assert Job.decode(job.encode()) == job


def test_memory_is_what_was_added() -> None:
    memory = conditions.Memory()
    held = SimpleNamespace(array=np.ones(40_000_000, np.uint8))
    memory.look()
    del held.array
    assert (memory.high_water().value or 0) > 30e6
