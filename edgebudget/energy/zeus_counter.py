"""Energy counters that zeus reaches: NVIDIA and AMD GPUs, Jetson boards, Apple silicon.

Needs the extra `energy`; not tried on AMD, Jetson and Apple devices. Of several GPUs the first
counts, or the one whose number EDGEBUDGET_GPU holds.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

from edgebudget_runtime.errors import first_line
from edgebudget_runtime.measure.counters import Reading, difference

_MILLI = 1e-3  # joules


@dataclass(slots=True)
class ZeusCounter:
    """One counter in millijoules that only rises."""

    name: str
    millijoules: Callable[[], float | None]
    clock: Callable[[], float] = time.perf_counter

    def start(self) -> None:
        """Nothing: it always counts."""

    def stop(self) -> None:
        """Nothing."""

    def read(self) -> Reading | None:
        """What it shows now, or None where the driver does not answer."""
        try:
            value = self.millijoules()
        except Exception:  # a driver's own errors, of many types
            return None
        return None if value is None else Reading(self.clock(), (float(value),))

    def joules(self, before: Reading, after: Reading) -> float | None:
        """Between two readings; None where the counter went back."""
        return difference(before, after, _MILLI, (None,))


def find(family: str) -> tuple[ZeusCounter | None, str]:
    """A counter for this kind of processor, or None and why not."""
    try:
        import zeus.device  # noqa: F401
    except ImportError:
        return None, 'zeus is not installed (pip install "edgebudget[energy]")'
    return _gpu() if family == "gpu" else _soc()


def _gpu() -> tuple[ZeusCounter | None, str]:
    from zeus.device.gpu import get_gpus

    try:
        gpus = get_gpus()
        index = int(os.environ.get("EDGEBUDGET_GPU", "0"))
        if not gpus.supports_get_total_energy_consumption(index):
            return None, f"GPU {index} has no energy counter"
        name = gpus.get_name(index)
    except Exception as e:  # no driver, no card, no permission: each its own type
        return None, f"zeus finds no GPU: {first_line(e)}"
    return ZeusCounter(f"{name}, GPU {index}", lambda: _gpu_millijoules(index)), ""


def _gpu_millijoules(index: int) -> float:
    from zeus.device.gpu import get_gpus

    return float(get_gpus().get_total_energy_consumption(index))


def _soc() -> tuple[ZeusCounter | None, str]:
    """A system on a chip that counts its processors' energy."""
    from zeus.device.soc import get_soc

    try:
        soc = get_soc()
    except Exception as e:
        return None, f"zeus: {first_line(e)}"

    def millijoules() -> float | None:
        found = soc.get_total_energy_consumption()
        for field in ("cpu_total_mj", "cpu_energy_mj"):  # Apple, Jetson
            value = getattr(found, field, None)
            if value is not None:
                return float(value)
        return None

    return ZeusCounter(f"{type(soc).__name__} processor", millijoules), ""
