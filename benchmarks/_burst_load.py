"""Another process that loads the machine in bursts of half a second, with calm in between."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np

_BUSY_S, _CALM_S = 0.5, 1.5  # mean lengths


@contextmanager
def running(processes: int) -> Iterator[None]:
    """Load the machine with this many processes meanwhile."""
    with ExitStack() as stack:
        for seed in range(processes):
            command = [sys.executable, "-m", "benchmarks._burst_load", str(seed), str(os.getpid())]
            process = stack.enter_context(subprocess.Popen(command))
            stack.callback(process.kill)  # runs before the process is waited for
        yield


def main(seed: int, parent: int) -> None:
    """Work and rest in turn for as long as the parent lives."""
    rng = random.Random(seed)
    matrix = np.full((256, 256), 1.0 / 256, np.float32)
    while os.getppid() == parent:
        end = time.monotonic() + rng.expovariate(1.0 / _BUSY_S)
        while time.monotonic() < end:
            matrix = matrix @ matrix
        time.sleep(rng.expovariate(1.0 / _CALM_S))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
