"""Are `--latency L@p99` compiles for the CPU kept when another process measures?

Ten limits between the fastest and the slowest that the network can reach, each compiled without
training, and the exported file then timed by a plain ONNX Runtime script in a process of its own:
its 99th percentile of 2,000 runs must keep the limit in nine of ten. Half the fastest must be
refused. Values do not change a latency: the data is seeded noise.

    python -m benchmarks.latency_kept
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import save
from edgebudget import compiler
from edgebudget_runtime.budget import Budget
from edgebudget_runtime.errors import EdgeBudgetError, InfeasibleError, MissedError

_SAMPLES = 32
_ROOM = 1.1  # the fastest limit over the fastest p99: what is proven is an upper bound of it
_SCRIPT = """
import sys, time
import numpy as np, onnxruntime as ort
options = ort.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
given = session.get_inputs()[0]
feed = {given.name: np.random.default_rng(0).random(given.shape).astype(np.float32)}
for _ in range(500):
    session.run(None, feed)
took = []
for _ in range(2000):
    start = time.perf_counter()
    session.run(None, feed)
    took.append((time.perf_counter() - start) * 1e3)
print(np.percentile(took, 99), np.median(took))
"""


def main(arguments: list[str]) -> int:
    """Compile to every limit, measure each result elsewhere, and count."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.latency_kept")
    parser.add_argument("--model", default="cifar10-resnet20")
    parser.add_argument("--limits", type=int, default=10)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="edgebudget-") as name:
        folder = Path(name)
        bench = _Bench(options.model, folder)
        smallest = compiler.propose(options.model, data=bench.data).reach.smallest
        slowest = bench.quietest(bench.compiled(Budget()))
        fastest = bench.quietest(bench.compiled(Budget.parse(macs=1.03 * smallest)))
        limits = np.geomspace(_ROOM * fastest, slowest, options.limits)
        rows = [bench.row(float(limit)) for limit in limits]
        below = bench.row(fastest / 2)
    kept = sum(r["kept"] for r in rows)
    wanted = int(np.floor(0.9 * options.limits))
    checks = {
        f"{wanted} of {options.limits} limits kept": kept >= wanted,
        "half the fastest is refused": below["refused"] != "",
    }
    save(
        "latency_kept",
        {"model": options.model, "fastest_p99_ms": fastest, "slowest_p99_ms": slowest,
         "limits": rows, "below": below, "load_average": os.getloadavg(), "ok": checks},
    )  # fmt: skip
    for text, ok in checks.items():
        sys.stderr.write(f"{'ok  ' if ok else 'MISS'} {text}\n")
    return 0 if all(checks.values()) else 1


class _Bench:
    def __init__(self, model: str, folder: Path) -> None:
        from edgebudget_models import catalogue

        self.model, self.folder, self.count = model, folder, 0
        rng = np.random.default_rng(0)
        shape = (_SAMPLES, *catalogue.get(model).input_shape[1:])
        arrays: dict[str, Any] = {}
        for kind in ("calibration", "evaluation"):
            arrays[f"{kind}_image"] = rng.standard_normal(shape).astype(np.float32)
            arrays[f"{kind}_labels"] = rng.integers(0, 10, _SAMPLES)
        np.savez(folder / "noise.npz", **arrays)
        self.data = f"npz:{folder / 'noise.npz'}"

    def compiled(self, budget: Budget) -> Path:
        self.count += 1
        out = self.folder / f"out{self.count}"
        compiler.compile(self.model, out=out, data=self.data, budget=budget)
        return out

    def measured(self, out: Path) -> tuple[float, float, int]:
        """99th percentile and median in ms elsewhere, and the MACs of the manifest."""
        import json

        file = out / "segments" / "main.onnx"
        done = subprocess.run(
            [sys.executable, "-c", _SCRIPT, str(file)], capture_output=True, text=True, check=True
        )
        p99, median = map(float, done.stdout.split())
        manifest = json.loads((out / "manifest.json").read_text())
        return p99, median, int(manifest["subnetworks"][0]["cost"]["macs"]["value"])

    def quietest(self, out: Path) -> float:
        """The smallest p99 of three processes: where the limits lie should not hang on one."""
        return min(self.measured(out)[0] for _ in range(3))

    def row(self, limit: float) -> dict[str, Any]:
        """One limit: compiled or refused, and what another process then measures."""
        began, row = time.monotonic(), {"limit_ms": limit, "kept": False, "refused": ""}
        try:
            out = self.compiled(Budget.parse(latency=f"{limit:.6f}ms@p99"))
        except (InfeasibleError, MissedError) as e:
            row["refused"] = str(e)
        except EdgeBudgetError as e:
            row["failed"] = str(e)
        else:
            p99, median, macs = self.measured(out)
            row |= {"p99_ms": p99, "median_ms": median, "macs": macs, "kept": p99 <= limit}
        row["seconds"] = time.monotonic() - began
        sys.stderr.write(f"{row}\n")
        return row


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
