"""The processor's own energy counters (Running Average Power Limit), through Linux' powercap.

One counter for each package, and one for its memory where it is not part of the package; what
lies inside a package (cores, graphics) or around it (the platform) would be counted twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from edgebudget_runtime.measure.conditions import ROOT, number, text
from edgebudget_runtime.measure.counters import Reading, difference

_MICRO = 1e-6  # joules


class Rapl:
    """The sum over packages and their memory."""

    def __init__(self, domains: list[Path], clock: Callable[[], float] = time.perf_counter) -> None:
        self._domains, self._clock = domains, clock
        self._ranges = [number(d / "max_energy_range_uj") for d in domains]
        self.name = "RAPL " + "+".join(text(d / "name") or d.name for d in domains)

    def start(self) -> None:
        """Nothing: it always counts."""

    def stop(self) -> None:
        """Nothing."""

    def read(self) -> Reading | None:
        """Microjoules of each domain."""
        found = [number(d / "energy_uj") for d in self._domains]
        values = tuple(float(v) for v in found if v is not None)
        return Reading(self._clock(), values) if len(values) == len(found) else None

    def joules(self, before: Reading, after: Reading) -> float | None:
        """Between two readings; None where a counter jumped."""
        return difference(before, after, _MICRO, self._ranges)


def find(root: Path = ROOT) -> tuple[Rapl | None, str]:
    """The counters of this machine, or None and why not."""
    base = root / "sys/class/powercap"
    all_domains = sorted(base.glob("intel-rapl:*"))
    chosen = [d for d in all_domains if _counts(d)]
    if not chosen:
        return None, "no RAPL in /sys/class/powercap"
    closed = [d for d in chosen if number(d / "energy_uj") is None]
    if closed:
        return None, f"{closed[0].name}/energy_uj is not readable: usually only root may read it"
    return Rapl(chosen), ""


def _counts(domain: Path) -> bool:
    name = text(domain / "name") or ""
    inner = domain.name.count(":") > 1
    return name == "dram" if inner else name.startswith("package")
