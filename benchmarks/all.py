"""Run every benchmark that can run here: `python -m benchmarks.all [NAME ...]`.

A benchmark is a module of this folder with `main(arguments) -> int`. One that misses its data, or
a device, says so and is skipped; the exit code is 1 when any other one fails. Each has a process
of its own: none inherits another's memory or threads. What writes files that the project ships or
its documents hold, and what takes an hour by itself, runs only where it is named.
"""

from __future__ import annotations

import pkgutil
import subprocess
import sys
from pathlib import Path

from benchmarks.harness import ROOT

_PARTS = {"all", "harness"}
_NAMED = {"compare", "hexagon_cost", "latency_plan", "layer_times"}


def names() -> list[str]:
    """Every benchmark, in alphabetical order."""
    found = (m.name for m in pkgutil.iter_modules([str(Path(__file__).parent)]))
    return [n for n in found if n not in _PARTS and not n.startswith("_")]


def main(chosen: list[str]) -> int:
    """Run the benchmarks named, or all of them."""
    unknown = sorted(set(chosen) - set(names()))
    if unknown:
        sys.stderr.write(f"no benchmark {', '.join(unknown)}; there are {', '.join(names())}\n")
        return 2
    failed = []
    for name in chosen or [n for n in names() if n not in _NAMED]:
        sys.stderr.write(f"== {name}\n")
        command = [sys.executable, "-m", f"benchmarks.{name}"]
        if subprocess.run(command, cwd=ROOT, check=False).returncode:
            failed.append(name)
    if failed:
        sys.stderr.write(f"failed: {', '.join(failed)}\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
