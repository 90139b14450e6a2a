"""How soon a fresh process answers, and how much memory it holds, without torch.

python -m benchmarks.first_answer --artifact DIR
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks._elastic import elastic_artifact
from benchmarks.harness import save

_PROCESSES = 7
_LIMIT_S, _LIMIT_BYTES = 0.5, 150e6
# From the opening of the artifact, hashes and all; and, apart, the imports before it. VmHWM, since
# what `getrusage` tells of a process includes the one that started it.
_CODE = """
import json, pathlib, sys, time
began = time.perf_counter()
import numpy as np
from edgebudget_runtime.runner import Runner
imported = time.perf_counter()
with Runner(sys.argv[1], threads=1) as runner:
    given = {t.name: np.zeros([d or 1 for d in t.shape], t.dtype) for t in runner.inputs}
    runner.run(given)
    answered = time.perf_counter()
    for sub in runner.manifest.subnetworks:
        runner.run(given, policy="fixed:" + sub.id)
status = pathlib.Path("/proc/self/status").read_text()
peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
print(json.dumps({
    "import_s": imported - began, "first_answer_s": answered - imported, "peak_bytes": peak,
    "heavy": sorted({"torch", "onnx"} & set(sys.modules)),
}))
"""


def main(arguments: list[str]) -> int:
    """Start some processes one after the other, and take medians."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first_answer", description=__doc__)
    parser.add_argument("--artifact", type=Path, default=None)
    artifact = elastic_artifact(parser.parse_args(arguments).artifact)
    if artifact is None:
        return 0
    command = [sys.executable, "-c", _CODE, str(artifact)]
    found = [
        json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        for _ in range(_PROCESSES)
    ]
    middle = {
        k: statistics.median(f[k] for f in found)
        for k in ("import_s", "first_answer_s", "peak_bytes")
    }
    checks = {
        "first answer within 0.5 s of opening": middle["first_answer_s"] <= _LIMIT_S,
        "at most 150 MB resident": middle["peak_bytes"] <= _LIMIT_BYTES,
        "neither torch nor onnx loaded": not any(f["heavy"] for f in found),
    }
    save("first_answer", {**middle, "processes": _PROCESSES, "ok": checks})
    for text, ok in checks.items():
        sys.stderr.write(f"{'ok  ' if ok else 'MISS'} {text}\n")
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
