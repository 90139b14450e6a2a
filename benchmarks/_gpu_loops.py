"""Time files on the GPU and read its energy counter: latency batch by batch, joules over seconds.

Runs as a process of its own: `python -m benchmarks._gpu_loops FOLDER SECONDS`, where FOLDER holds
`variants.json`. Leaves `loops.json` there, written anew after every network.

The counter moves ten times a second. A loop therefore starts and ends at a move of it, and runs
for seconds; the counter is asked only at the ends, since asking takes milliseconds.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pynvml

PROVIDER = "WebGpuExecutionProvider"
TURNS = 200  # runs of each file at batch 1
_SETTLE_S = 2.0
_ROUNDS = 2


class Gpu:
    """One NVIDIA GPU's counters."""

    def __init__(self) -> None:
        pynvml.nvmlInit()
        self._handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        self.name = str(pynvml.nvmlDeviceGetName(self._handle))
        self.driver = str(pynvml.nvmlSystemGetDriverVersion())

    def joules(self) -> float:
        """Since the driver was loaded."""
        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1e3

    def state(self) -> dict[str, float]:
        """Clock in MHz, temperature in degrees Celsius."""
        return {
            "sm_mhz": float(pynvml.nvmlDeviceGetClockInfo(self._handle, pynvml.NVML_CLOCK_SM)),
            "celsius": float(
                pynvml.nvmlDeviceGetTemperature(self._handle, pynvml.NVML_TEMPERATURE_GPU)
            ),
        }


def over(gpu: Gpu, seconds: float, run: Callable[[], object]) -> dict[str, float]:
    """Joules and seconds of one run, from `run` repeated between two moves of the counter."""
    first, began = _move(gpu, run)[:2]
    runs = 0
    until = began + seconds
    while time.perf_counter() < until:
        run()
        runs += 1
    last, ended, more = _move(gpu, run)
    runs += more
    each = (ended - began) / runs
    watts = (last - first) / (ended - began)
    return {"joules": watts * each, "seconds": each, "watts": watts, "runs": runs, **gpu.state()}


def _move(gpu: Gpu, run: Callable[[], object]) -> tuple[float, float, int]:
    """Run until the counter moves: its value, when, and how many runs that took."""
    before, runs = gpu.joules(), 0
    while True:
        run()
        runs += 1
        now = gpu.joules()
        if now != before:
            return now, time.perf_counter(), runs


def main(arguments: list[str]) -> int:
    """Measure everything in the folder."""
    folder, seconds = Path(arguments[0]), float(arguments[1])
    variants = json.loads((folder / "variants.json").read_text())
    gpu = Gpu()
    import onnxruntime_ep_webgpu

    ort.register_execution_provider_library(PROVIDER, onnxruntime_ep_webgpu.get_library_path())
    device = next(d for d in ort.get_ep_devices() if d.ep_name == PROVIDER)
    found: dict[str, Any] = {
        "gpu": gpu.name,
        "driver": gpu.driver,
        "onnxruntime": ort.__version__,
        "plugin": device.ep_metadata.get("version", ""),
        "seconds_each": seconds,
        "networks": {},
    }
    for network in dict.fromkeys(v["network"] for v in variants):
        mine = [v for v in variants if v["network"] == network]
        found["networks"][network] = _network(gpu, device, folder, mine, seconds)
        (folder / "loops.json").write_text(json.dumps(found))
        sys.stderr.write(f"{network}: measured\n")
    return 0


def _network(
    gpu: Gpu, device: Any, folder: Path, variants: list[dict[str, Any]], seconds: float
) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    runs: list[Callable[[], Any]] = []
    rows: list[dict[str, Any]] = []
    for variant in variants:
        began = time.perf_counter()
        session = _open(folder / variant["file"], device)
        given = session.get_inputs()[0]
        value = rng.random(given.shape, dtype=np.float32)
        run = _runner(session, {given.name: value})
        answer = run()[0]
        row = {**variant, "first_s": time.perf_counter() - began, "energy": [], "ms": []}
        if variant["batch"] == 1:
            row["snr_db"] = _snr(folder / _reference(variants, variant), given.name, value, answer)
        rows.append(row)
        runs.append(run)
    idle = [_idle(gpu)]
    small = [(run, row) for run, row in zip(runs, rows, strict=True) if row["batch"] == 1]
    for turn in range(-20, TURNS):
        for run, row in small:
            began = time.perf_counter()
            run()
            if turn >= 0:
                row["ms"].append((time.perf_counter() - began) * 1e3)
    for _ in range(_ROUNDS):
        for run, row in zip(runs, rows, strict=True):
            row["energy"].append(over(gpu, seconds, run))
    idle.append(_idle(gpu))
    return {"idle_watts": idle, "rows": rows}


def _open(file: Path, device: Any) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    options.add_provider_for_devices([device], {})
    return ort.InferenceSession(str(file), options, enable_fallback=0)


def _runner(session: Any, feed: dict[str, Any]) -> Callable[[], Any]:
    return lambda: session.run(None, feed)


def _reference(variants: list[dict[str, Any]], like: dict[str, Any]) -> str:
    return next(
        str(v["file"])
        for v in variants
        if v["precision"] == "float32" and v["batch"] == 1 and v["share"] == like["share"]
    )


def _snr(file: Path, name: str, value: Any, answer: Any) -> float:
    """Signal over error of the GPU's answer against the float graph on the CPU, in decibel."""
    session = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    expected = session.run(None, {name: value})[0].astype(np.float64)
    error = np.mean((answer - expected) ** 2)
    return float(10 * np.log10(np.mean(expected**2) / max(float(error), 1e-30)))


def _idle(gpu: Gpu) -> float:
    """Watts with the sessions open and nothing to do, once the clocks have settled."""
    time.sleep(_SETTLE_S)
    return over(gpu, _SETTLE_S, lambda: time.sleep(0.005))["watts"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
