"""The README's promise: `uhd-iqa` under 50 GMACs on the NPU, with time, memory and quality.

Starts from an empty cache and runs the command in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import save

_COMMAND = ("compile", "uhd-iqa", "--target", "npu", "--macs", "50G", "--json")
_LIMIT_S = 12 * 60
_LIMIT_BYTES = 8e9


def main(arguments: list[str]) -> int:
    """Compile, and compare what came out with what was promised."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__)
    parser.add_argument("--verify", choices=["sample", "full"], default="sample")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="edgebudget-") as name:
        folder = Path(name)
        environment = {**os.environ, "EDGEBUDGET_CACHE": str(folder / "cache")}
        command = [str(Path(sys.executable).parent / "edgebudget"), *_COMMAND]
        command += ["--out", str(folder / "out"), "--verify", options.verify]
        began = time.monotonic()
        done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
        seconds = time.monotonic() - began
        if done.returncode:
            sys.stderr.write(done.stderr[-2000:])
            return 1
        result = _result(json.loads(done.stdout), folder / "out" / "manifest.json")
    # Linux counts in KiB: the largest of the processes that were waited for.
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    checks = {
        "compile at most 12 minutes": seconds <= _LIMIT_S,
        "peak at most 8 GB": peak <= _LIMIT_BYTES,
        "at most 50 GMACs": result["macs"] <= 50e9,
        "every node on the NPU": set(result["placement"]) == {"npu"},
        "SRCC within 0.01 of the original": abs(result["srcc"] - result["original_srcc"]) <= 0.01,
        "emulator within one output step": result["worst_steps"] <= 1.0,
    }
    save(
        "demo",
        {"seconds": seconds, "peak_bytes": peak, "verify": options.verify, **result, "ok": checks},
    )
    for text, ok in checks.items():
        sys.stderr.write(f"{'ok  ' if ok else 'MISS'} {text}\n")
    return 0 if all(checks.values()) else 1


def _result(summary: dict[str, Any], manifest: Path) -> dict[str, Any]:
    notes = json.loads(manifest.read_text())["notes"]
    agreed = next(n for n in notes if "quantization steps" in n)
    return {
        "macs": summary["cost"]["macs"]["value"],
        "size_bytes": summary["cost"]["size_bytes"]["value"],
        "original_macs": summary["original_cost"]["macs"]["value"],
        "original_size_bytes": summary["original_cost"]["size_bytes"]["value"],
        "srcc": summary["quality"]["value"],
        "srcc_interval": [summary["quality"]["low"], summary["quality"]["high"]],
        "original_srcc": summary["original_quality"]["value"],
        "pictures": summary["quality"]["count"],
        "placement": summary["placement"]["counts"],
        "worst_steps": float(agreed.split("within ")[1].split(" ")[0]),
        "agreement": agreed,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
