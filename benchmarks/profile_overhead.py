"""What `edgebudget profile` takes, and how far its median is from that of a bare loop.

python -m benchmarks.profile_overhead

MobileNetV2 at 224x224 on this machine's CPU. The overhead is of what is timed: the same loaded
network is run through the profiler's own loop and through a bare one, taking turns, in a new order
every round. Whole processes are compared as well, in turns: there, two loads of one network differ
by more than any overhead.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import save
from edgebudget.events import ignore
from edgebudget.profile_subject import Subject, subject
from edgebudget_runtime.measure import samples
from edgebudget_runtime.measure.timing import Paths
from edgebudget_runtime.sessions import Sessions
from edgebudget_runtime.walk import Segments

_MODEL = "mobilenet-v2"
_ROUNDS, _WARM = 300, 20
_PAIRS = 5
_LIMIT_S, _LIMIT_OVERHEAD = 30.0, 0.02
_BARE = """
import json, statistics, sys, time
import numpy as np, onnxruntime as ort
options = ort.SessionOptions()
options.intra_op_num_threads = int(sys.argv[2])
options.inter_op_num_threads = 1
options.add_session_config_entry("session.intra_op.allow_spinning", "0")
session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
image = np.random.default_rng(0).standard_normal((1, 3, 224, 224), np.float32)
times = []
for _ in range(220):
    began = time.perf_counter()
    session.run(None, {"image": image})
    times.append((time.perf_counter() - began) * 1e3)
print(json.dumps(statistics.median(times[20:])))
"""


def _loops(what: Subject, threads: int) -> dict[str, float]:
    """Medians in ms of the profiler's loop and a bare one on one session."""
    sessions = Sessions(
        what.folder, what.manifest, verify=True, providers=(what.provider,), options=None,
        threads=threads, limit_bytes=None,
    )  # fmt: skip
    segments = Segments(what.manifest, sessions, time.perf_counter)
    feed = samples.make(what.manifest.segment("main").inputs)
    paths = Paths(segments, {"main": ("main",)}, {"main": feed})
    session, _ = sessions.get("main")
    found: dict[str, list[float]] = {"profile": [], "bare": []}
    order = np.random.default_rng(0)
    for turn in range(_WARM + _ROUNDS):
        for name in order.permutation(list(found)):
            if name == "profile":
                seconds, _ = paths.run("main")
            else:
                began = time.perf_counter()
                session.run(None, feed)
                seconds = time.perf_counter() - began
            if turn >= _WARM:
                found[name].append(seconds * 1e3)
    ratios = [p / b for p, b in zip(found["profile"], found["bare"], strict=True)]
    return {
        "profile_ms": statistics.median(found["profile"]),
        "bare_ms": statistics.median(found["bare"]),
        "overhead": statistics.median(ratios) - 1,
    }


def _processes(what: Subject, threads: int) -> list[dict[str, float]]:
    """The command and a bare loop, each in a process of its own, taking turns."""
    file = what.folder / what.manifest.segment("main").file
    command = [str(Path(sys.executable).parent / "edgebudget"), "profile", str(what.folder)]
    command += ["--threads", str(threads), "--json", "--no-layers", "--no-energy"]
    pairs = []
    for _ in range(_PAIRS):
        bare = _answer([sys.executable, "-c", _BARE, str(file), str(threads)])
        ours = _answer(command)["paths"]["main"]["p50_ms"]
        pairs.append({"profile_ms": ours, "bare_ms": bare})
    return pairs


def _answer(command: list[str]) -> Any:
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main(arguments: list[str]) -> int:
    """Time the command, then compare loops."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile_overhead")
    parser.add_argument("--threads", type=int, default=1)
    threads = parser.parse_args(arguments).threads
    with tempfile.TemporaryDirectory(prefix="edgebudget-") as name:
        os.environ["EDGEBUDGET_CACHE"] = name  # nothing of this is worth keeping
        command = [str(Path(sys.executable).parent / "edgebudget"), "profile", _MODEL, "--json"]
        began = time.perf_counter()
        whole = _answer([*command, "--out", str(Path(name) / "p.json")])
        seconds = time.perf_counter() - began
        load = whole["conditions"]["load_after"]["value"]
        with subject(_MODEL, "cpu", emit=ignore) as what:
            loops = _loops(what, threads)
            pairs = _processes(what, threads)
    checks = {
        "profile of a 224x224 MobileNetV2 in under 30 s": seconds < _LIMIT_S,
        "overhead on the measured run under 2 %": loops["overhead"] < _LIMIT_OVERHEAD,
    }
    result = {
        "seconds": seconds,
        "runs": whole["paths"]["main"]["runs"],
        "load": load,  # of the machine meanwhile; 1 is this benchmark's own
        "layers": len(whole["layers"]),
        "threads": threads,
        "one_session": loops,
        "processes": pairs,
        "processes_ratio": statistics.median(p["profile_ms"] / p["bare_ms"] for p in pairs),
        "ok": checks,
    }
    save("profile_overhead", result)
    for text, ok in checks.items():
        sys.stderr.write(f"{'ok  ' if ok else 'MISS'} {text}\n")
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
