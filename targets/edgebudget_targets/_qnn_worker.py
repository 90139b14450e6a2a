"""One job in the vendor's NPU library, in a process of its own: it may crash, hang or leak.

Run as ``python -m edgebudget_targets._qnn_worker`` inside a job folder that holds ``job.json``
(and ``input<i>.npy``). Leaves ``output<i>.npy`` and, last of all, ``result.json``. Everything
that the library says goes to the standard streams, which the caller keeps as the job's log.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

_PROVIDER = "QNNExecutionProvider"
_PARENT_DIED = 1  # prctl's PR_SET_PDEATHSIG
Settings = dict[str, Any]


def main() -> None:
    """Do the job of the current folder."""
    if sys.platform == "linux":  # a killed compile must not leave an emulator running
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
    # The library's own clean-up at exit is slow and has crashed; everything is on disk.
    os._exit(0)


def _do(job: Settings) -> Settings:
    device = _device(0 if job.get("verbose") else 3)
    if job["action"] == "probe":
        return {"version": _qnn().__version__}
    session = _session(job, device)
    if job["action"] == "run":
        _run(session, job)
    nodes = []
    if job.get("record"):
        for group in session.get_provider_graph_assignment_info():
            nodes += [(group.ep_name, n.op_type, n.name) for n in group.get_nodes()]
    return {"nodes": nodes}


def _qnn() -> Any:
    import onnxruntime_qnn

    return onnxruntime_qnn


def _device(severity: int) -> Any:
    ort.set_default_logger_severity(severity)
    ort.register_execution_provider_library(_PROVIDER, _qnn().get_library_path())
    devices = [d for d in ort.get_ep_devices() if d.ep_name == _PROVIDER]
    if not devices:
        raise RuntimeError("the QNN plug-in offers no device")
    return devices[0]


def _session(job: Settings, device: Any) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 0 if job.get("verbose") else 3
    options.intra_op_num_threads = 1
    entries = {
        "session.disable_cpu_ep_fallback": "0" if job.get("allow_cpu") else "1",
        "session.record_ep_graph_assignment_info": "1" if job.get("record") else "0",
    }
    if "context" in job:
        entries |= {
            "ep.context_enable": "1",
            "ep.context_file_path": job["context"],
            "ep.context_embed_mode": "1",
        }
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    provider = {"backend_path": _qnn().get_qnn_htp_path(), **job["options"]}
    options.add_provider_for_devices([device], provider)
    # enable_fallback=0: by default a provider that fails is replaced by the CPU, silently.
    return ort.InferenceSession(job["model"], options, enable_fallback=0)


def _run(session: Any, job: Settings) -> None:
    """Run pieces `first` to `last` of the inputs, each of the model's own batch."""
    inputs = {
        name: np.load(f"{job['inputs']}/input{i}.npy", mmap_mode="r")
        for i, name in enumerate(job["names"])
    }
    outputs = [o.name for o in session.get_outputs()]
    parts: list[list[Any]] = []
    for piece in range(job["first"], job["last"]):
        # [pieces, batch, ...]: one more axis than the model takes
        feed = {k: np.ascontiguousarray(v[piece]) for k, v in inputs.items()}
        parts.append(session.run(outputs, feed))
    for i, values in enumerate(zip(*parts, strict=True)):
        np.save(f"output{i}.npy", np.concatenate(values))


if __name__ == "__main__":
    main()
