"""Finding a WebGPU engine, and starting its jobs in processes of their own.

Two engines do the same work: the plug-in on a GPU, and a WebGPU build of ONNX Runtime on software
Vulkan. They cannot share an installation, so the second has an interpreter of its own.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgebudget_runtime.errors import ArtifactError, TargetError

if TYPE_CHECKING:
    from edgebudget.workload import Array

WORKER = Path(__file__).with_name("_webgpu_worker.py")
SOFTWARE = "EDGEBUDGET_WEBGPU_PYTHON"  # interpreter that has onnxruntime-webgpu
INSTALL = 'pip install "edgebudget[webgpu]"'
_PACKAGE = "onnxruntime-ep-webgpu"
_HOW_SOFTWARE = (
    "without a GPU, numbers can be checked on software Vulkan: install Debian's chromium (it "
    f"brings SwiftShader), `pip install onnxruntime-webgpu` in a venv of its own, {SOFTWARE}=its "
    "python"
)
_SWIFTSHADER = Path("/usr/lib/chromium/vk_swiftshader_icd.json")
_DRIVERS = ("VK_DRIVER_FILES", "VK_ICD_FILENAMES")  # the Vulkan loader's own
_SOFTWARE_DRIVERS = ("swiftshader", "lvp_icd", "llvmpipe")
_PROBE_S = 120.0
_NOT_ALL_GPU = "fallback to CPU EP has been explicitly disabled"


class NotAllOnGpu(TargetError):
    """Some nodes were left to the CPU, in a session that forbids it."""


@dataclass(frozen=True, slots=True)
class Engine:
    """A WebGPU engine that answered, or why none did."""

    python: str = ""  # the interpreter that runs its jobs; empty: there is none
    software: bool = False
    adapter: str = ""
    version: str = ""
    why: str = ""
    install: str = ""


def find_engine() -> Engine:
    """The GPU's engine, else the one on software Vulkan; looked for once per environment."""
    return _find(tuple(os.environ.get(k, "") for k in (SOFTWARE, *_DRIVERS)))


@cache
def _find(environment: tuple[str, ...]) -> Engine:
    found = _on_gpu()
    if found.python or not environment[0]:
        return found
    software = _on_software(environment[0])
    if software.python:
        return software
    return Engine(why=f"{found.why}; {software.why}", install=found.install)


def _on_gpu() -> Engine:
    if find_spec("onnxruntime_ep_webgpu") is None:
        why = f"the package {_PACKAGE} is not installed"
        return Engine(why=why, install=f"{INSTALL}; {_HOW_SOFTWARE}")
    if sys.platform == "linux" and not _loads("libvulkan.so.1"):
        why = "the Vulkan loader libvulkan.so.1 is not installed"
        return Engine(why=why, install="apt-get install libvulkan1, and the GPU's driver")
    plugin = version(_PACKAGE)
    try:
        seen, _ = run_job({"action": "probe"}, {}, _PROBE_S, "this machine's GPU")
    except (TargetError, ArtifactError) as e:
        return Engine(why=_why(e.what, plugin), install=f"{_remedy(e.what)}; {_HOW_SOFTWARE}")
    name = _adapter(int(seen["vendor"]), int(seen["device"]))
    drivers = " ".join(os.environ.get(k, "") for k in _DRIVERS).lower()
    software = any(d in drivers for d in _SOFTWARE_DRIVERS)
    return Engine(sys.executable, software, name, plugin)


def _on_software(python: str) -> Engine:
    if not Path(python).is_file():
        return Engine(why=f"{SOFTWARE} names no file: {python}")
    try:
        seen, _ = run_job({"action": "probe"}, {}, _PROBE_S, "software Vulkan", python=python)
    except (TargetError, ArtifactError) as e:
        return Engine(why=f"software Vulkan: {e.what}")
    return Engine(
        python,
        True,
        "software Vulkan",
        f"onnxruntime-webgpu {seen['onnxruntime']}",
        "no GPU here: numbers are checked on software Vulkan, latency is unknown",
    )


def run_job(
    settings: Mapping[str, Any],
    pieces: Mapping[str, Array],
    limit_s: float,
    device: str,
    *,
    python: str = sys.executable,
    outputs: Sequence[str] = (),
) -> tuple[dict[str, Any], dict[str, Array]]:
    """Do one job of `_webgpu_worker` in a process of its own.

    Args:
        settings: The job.
        pieces: Inputs [pieces, batch, ...] by name.
        limit_s: Seconds until the process is killed.
        device: For error messages.
        python: The interpreter.
        outputs: Names of the outputs to give back.

    Raises:
        ArtifactError: EB510, the file is no valid model.
        TargetError: EB610 the process crashed, EB611 it took longer than `limit_s`, EB613 the
            engine failed, or left nodes to the CPU.
    """
    with tempfile.TemporaryDirectory(prefix="edgebudget-gpu-") as temp:
        folder = Path(temp)
        for i, value in enumerate(pieces.values()):
            np.save(folder / f"input{i}.npy", value)
        count = len(next(iter(pieces.values()))) if pieces else 0
        job = {**settings, "names": list(pieces), "pieces": count}
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        status, said = _wait(folder, python, limit_s, device)
        file = folder / "result.json"
        if not file.is_file():
            raise TargetError(
                "EB610",
                f"the WebGPU engine for {device} crashed ({status}){said}",
                hint="update the GPU's driver; `edgebudget doctor` shows the versions for a report",
            )
        result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if not result["ok"]:
            raise failure(" ".join(str(result["error"]).split()), device)
        return result, {k: np.load(folder / f"output{i}.npy") for i, k in enumerate(outputs)}


def _wait(folder: Path, python: str, limit_s: float, device: str) -> tuple[str, str]:
    """How the process ended, and the last line it said."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if python == sys.executable:  # the worker must find the engine however this process did
        environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    elif not any(os.environ.get(k) for k in _DRIVERS) and _SWIFTSHADER.is_file():
        environment["VK_ICD_FILENAMES"] = str(_SWIFTSHADER)
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            [python, "-P", str(WORKER)],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        status = process.wait(timeout=limit_s)
    except subprocess.TimeoutExpired:
        raise TargetError(
            "EB611",
            f"the WebGPU engine for {device} gave no answer within {limit_s:.0f} s",
            hint="check fewer samples, or free the GPU of other work",
        ) from None
    finally:  # also on Ctrl-C
        process.kill()
        process.wait()
    lines = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    said = f" after saying {lines[-1].strip()[:200]!r}" if lines else ""
    return (signal.Signals(-status).name if status < 0 else f"exit status {status}"), said


def failure(error: str, device: str) -> TargetError | ArtifactError:
    """What the engine said, as an error of ours."""
    if _NOT_ALL_GPU in error:
        return NotAllOnGpu(
            "EB613",
            f"{device} does not take every node",
            hint="`edgebudget inspect` lists the nodes left to the CPU",
        )
    if "INVALID_GRAPH" in error or "INVALID_PROTOBUF" in error or "NO_SUCHFILE" in error:
        return ArtifactError(
            "EB510",
            f"ONNX Runtime cannot load this model: {error}",
            hint="check the file with `edgebudget inspect`",
        )
    return TargetError(
        "EB613",
        f"the WebGPU engine for {device} failed: {error}",
        hint="`edgebudget doctor` says which engines work here",
    )


def _why(what: str, plugin: str) -> str:
    """The engine's long-winded refusal in words that a person can act on."""
    if "No supported adapters" in what:
        return "no Vulkan driver gives the engine an adapter (a GPU is listed, its driver is not)"
    if "no WebGPU device" in what:
        return "this machine has no GPU that the engine knows"
    if "below the minimum required version" in what or "API version" in what:
        here = version("onnxruntime")
        return f"{_PACKAGE} {plugin} does not work with onnxruntime {here}: {what}"
    return what


def _remedy(what: str) -> str:
    if "below the minimum required version" in what or "API version" in what:
        return f'pip install --upgrade onnxruntime "{_PACKAGE}>=0.4"'
    if "no WebGPU device" in what:
        return "run it on a machine with a GPU"
    if "No supported adapters" in what:
        return "install the GPU's Vulkan driver (NVIDIA's also needs libX11 and libGL)"
    return f"update the GPU's driver and {_PACKAGE}"


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _adapter(vendor: int, device: int) -> str:
    """What the GPU is called; its numbers on the bus where nothing tells the name."""
    if vendor == 0x10DE and find_spec("pynvml") is not None:
        import pynvml

        try:
            pynvml.nvmlInit()
            name = pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(0))
            return name if isinstance(name, str) else name.decode()
        except pynvml.NVMLError:
            pass
    return f"GPU {vendor:04x}:{device:04x}"
