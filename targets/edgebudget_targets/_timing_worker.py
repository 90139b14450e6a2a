"""A process that times one file as the runtime would run it, and nothing else.

Reads `job.json` in its folder and `inputs.npz`, writes `times.npy`: milliseconds [runs].
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np

from edgebudget_runtime.engine import open_session, run_session
from edgebudget_runtime.errors import EdgeBudgetError

_WARM_UP = 10  # runs at least
_WARM_UP_S = 0.2  # and seconds: memory is touched, the clock has risen


def main(folder: Path) -> int:
    """Time the job in `folder`; 0, or 1 with the reason in `error.txt`."""
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    with np.load(folder / "inputs.npz", allow_pickle=False) as stored:
        feed = {name: stored[f"arr_{i}"] for i, name in enumerate(job["names"])}
    try:
        session = open_session(Path(job["file"]), threads=job["threads"])
        outputs = [o.name for o in session.get_outputs()]
        began, warm = time.perf_counter(), 0
        while warm < _WARM_UP or time.perf_counter() - began < _WARM_UP_S:
            run_session(session, feed, outputs)
            warm += 1
        found: list[float] = []
        began = time.perf_counter()
        while len(found) < job["least"] or (
            len(found) < job["most"] and time.perf_counter() - began < job["seconds"]
        ):
            start = time.perf_counter()
            run_session(session, feed, outputs)
            found.append((time.perf_counter() - start) * 1e3)
    except EdgeBudgetError as e:
        (folder / "error.txt").write_text(e.what, encoding="utf-8")
        return 1
    np.save(folder / "times.npy", np.array(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
