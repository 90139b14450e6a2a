"""One job on the GPU, in a process of its own: the engine may abort, hang or lose its device.

Run as a file inside a job folder that holds ``job.json`` (and ``input<i>.npy``), by an
interpreter that has numpy and ONNX Runtime and nothing of ours. Leaves ``output<i>.npy`` and,
last of all, ``result.json``.
"""

from __future__ import annotations

import base64
import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

_PROVIDER = "WebGpuExecutionProvider"
_PARENT_DIED = 1  # prctl's PR_SET_PDEATHSIG
# y = Relu(x), float32 [4]: the smallest model that needs an adapter.
_SMALLEST = (
    "CAg6NwoMCgF4EgF5IgRSZWx1EgVwcm9iZVoPCgF4EgoKCAgBEgQKAggEYg8KAXkSCgoICAESBAoCCARCBAoAEA4="
)
Settings = dict[str, Any]


def main() -> None:
    """Do the job of the current folder."""
    if sys.platform == "linux":  # a killed compile must not leave a worker running
        ctypes.CDLL(None).prctl(_PARENT_DIED, signal.SIGKILL)
    job: Settings = json.loads(Path("job.json").read_text(encoding="utf-8"))
    result: Settings
    try:
        result = {"ok": True, **_do(job)}
    except Exception as e:  # the engine raises a dozen unrelated types
        result = {"ok": False, "error": f"{type(e).__name__}: {e}"}
    aside = Path("result.json.part")
    aside.write_text(json.dumps(result), encoding="utf-8")
    aside.replace("result.json")
    sys.stdout.flush()
    os._exit(0)  # the engine's own clean-up at exit can crash; everything is on disk


def _do(job: Settings) -> Settings:
    if job["action"] == "probe":
        return _probe()
    sessions = [open_session(m, job) for m in job["models"]]
    if job["action"] == "run":
        _run(sessions[0], job)
    if job["action"] == "time":
        return {"ms": _time(sessions, job)}
    nodes = []
    if job["action"] == "open":
        for group in sessions[0].get_provider_graph_assignment_info():
            nodes += [(group.ep_name, n.op_type, n.name) for n in group.get_nodes()]
    return {"nodes": nodes}


def _probe() -> Settings:
    found: Settings = {"onnxruntime": ort.__version__, "plugin": "", "vendor": 0, "device": 0}
    device = _find_device()
    if device is not None:
        found |= {
            "plugin": device.ep_metadata.get("version", ""),
            "vendor": device.device.vendor_id,
            "device": device.device.device_id,
        }
    # A device may be listed without a driver for it: only a session asks for the adapter.
    session = open_session(base64.b64decode(_SMALLEST), {})
    (y,) = session.run(None, {"x": np.array([-1, 0, 1, 2], np.float32)})
    if y.tolist() != [0, 0, 1, 2]:
        raise RuntimeError(f"the adapter computes Relu wrong: {y.tolist()}")
    return found


def _find_device() -> Any:
    """The plug-in's device; None where the provider is built into this ONNX Runtime."""
    known = [d for d in ort.get_ep_devices() if d.ep_name == _PROVIDER]
    if known:  # asked first: once registered, a plug-in is listed among the built-in providers
        return known[0]
    if _PROVIDER in ort.get_available_providers():
        return None
    import onnxruntime_ep_webgpu

    ort.register_execution_provider_library(_PROVIDER, onnxruntime_ep_webgpu.get_library_path())
    known = [d for d in ort.get_ep_devices() if d.ep_name == _PROVIDER]
    if not known:
        raise RuntimeError("no WebGPU device")
    return known[0]


def open_session(model: str | bytes, job: Settings) -> Any:
    """A session on the GPU alone, unless the job allows the CPU."""
    options = ort.SessionOptions()
    options.log_severity_level = 0 if job.get("verbose") else 3
    options.intra_op_num_threads = 1
    entries = {
        "session.disable_cpu_ep_fallback": "0" if job.get("allow_cpu") else "1",
        "session.record_ep_graph_assignment_info": "1",
    }
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    given: dict[str, Any] = {}
    device = _find_device()
    if device is None:
        given["providers"] = [
            _PROVIDER,
            *(["CPUExecutionProvider"] if job.get("allow_cpu") else []),
        ]
    else:
        options.add_provider_for_devices([device], job.get("options", {}))
    # enable_fallback=0: by default a provider that fails is replaced by the CPU, silently.
    session = ort.InferenceSession(model, options, enable_fallback=0, **given)
    if session.get_providers()[0] != _PROVIDER:
        raise RuntimeError(f"the session is on {session.get_providers()[0]}, not on the GPU")
    return session


def _inputs(job: Settings) -> dict[str, Any]:
    """[pieces, batch, ...] by name: one more axis than the model takes."""
    return {n: np.load(f"input{i}.npy", mmap_mode="r") for i, n in enumerate(job["names"])}


def _run(session: Any, job: Settings) -> None:
    """Run every piece of the inputs, each of the model's own batch."""
    inputs = _inputs(job)
    outputs = [o.name for o in session.get_outputs()]
    parts: list[list[Any]] = []
    for piece in range(job["pieces"]):
        feed = {k: np.ascontiguousarray(v[piece]) for k, v in inputs.items()}
        parts.append(session.run(outputs, feed))
    for i, values in enumerate(zip(*parts, strict=True)):
        np.save(f"output{i}.npy", np.concatenate(values))


def _time(sessions: list[Any], job: Settings) -> list[list[float]]:
    """Milliseconds of every run of each session, the sessions taking turns."""
    feed = {k: np.ascontiguousarray(v[0]) for k, v in _inputs(job).items()}
    found: list[list[float]] = [[] for _ in sessions]
    for turn in range(-job["warm_up"], job["repeats"]):
        for times, session in zip(found, sessions, strict=True):
            began = time.perf_counter()
            session.run(None, feed)  # outputs are read back: all work on the GPU is done
            if turn >= 0:
                times.append((time.perf_counter() - began) * 1e3)
    return found


if __name__ == "__main__":
    main()
