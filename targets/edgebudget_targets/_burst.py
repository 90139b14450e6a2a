"""A short burst of runs, timed one by one."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from edgebudget.workload import Array


def burst(run: Callable[[], object], seconds: float, least: int, most: int) -> Array:
    """Milliseconds [runs]: `least` or more, until `seconds` are over or there are `most`."""
    took, began = list[float](), time.perf_counter()
    while len(took) < least or (len(took) < most and time.perf_counter() - began < seconds):
        start = time.perf_counter()
        run()
        took.append((time.perf_counter() - start) * 1e3)
    return np.asarray(took)
