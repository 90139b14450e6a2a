"""What a device says of its state: memory, temperature, clock frequency, throttling.

Everything is read from files whose root is a parameter; what cannot be read is unknown.
"""

from __future__ import annotations

import resource
import sys
from contextlib import suppress
from pathlib import Path

from edgebudget_runtime.cost import Figure

ROOT = Path("/")
_MOST_BYTES = 65_536


def text(path: Path) -> str | None:
    """A small file's text without the blanks around it, or None."""
    try:
        with path.open("rb") as f:
            return f.read(_MOST_BYTES).decode("utf-8", "replace").strip()
    except OSError:
        return None


def number(path: Path) -> int | None:
    """A file that holds one whole number, or None."""
    found = text(path)
    try:
        return None if found is None else int(found)
    except ValueError:
        return None


def unknown(why: str) -> Figure:
    """A figure without a value, and the reason."""
    return Figure(value=None, evidence="unknown", how=why)


def temperature_c(root: Path = ROOT) -> Figure:
    """The hottest sensor of the system, in degrees Celsius."""
    zones = sorted((root / "sys/class/thermal").glob("thermal_zone*"))
    read = {z: number(z / "temp") for z in zones}
    found = {z: t / 1000 for z, t in read.items() if t is not None and -40_000 < t < 200_000}
    if not found:
        return unknown("no readable sensor in /sys/class/thermal")
    hottest = max(found, key=lambda z: found[z])
    kind = text(hottest / "type") or hottest.name
    return Figure(value=found[hottest], evidence="measured", how=f"hottest sensor: {kind}")


def frequency_mhz(root: Path = ROOT) -> Figure:
    """The mean clock of the processors at this moment."""
    cpus = sorted((root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_cur_freq"))
    found = [k for k in map(number, cpus) if k is not None and k > 0]
    if not found:
        return unknown("the system does not tell clock frequencies")
    how = f"mean of {len(found)} processors, at one moment"
    return Figure(value=sum(found) / len(found) / 1e3, evidence="measured", how=how)


def throttle_events(root: Path = ROOT) -> Figure:
    """How often processors were slowed down for heat since the system started."""
    pattern = "cpu[0-9]*/thermal_throttle/*_throttle_count"
    files = sorted((root / "sys/devices/system/cpu").glob(pattern))
    found = [n for n in map(number, files) if n is not None]
    if not found:
        return unknown("the system does not count throttling")
    return Figure(value=float(sum(found)), evidence="measured", how="since the system started")


def load(root: Path = ROOT) -> Figure:
    """Processes that wanted to run in the last minute, on average."""
    with suppress(AttributeError, ValueError, IndexError):
        value = float((text(root / "proc/loadavg") or "").split()[0])
        return Figure(value=value, evidence="measured", how="mean of the last minute")
    return unknown("no /proc/loadavg")


def state(when: str, root: Path = ROOT) -> dict[str, Figure]:
    """All of it, under names that end in `when`."""
    return {
        f"temperature_{when}_c": temperature_c(root),
        f"frequency_{when}_mhz": frequency_mhz(root),
        f"throttle_events_{when}": throttle_events(root),
        f"load_{when}": load(root),
    }


class Memory:
    """This process's memory above what it held when the object was made."""

    def __init__(self) -> None:
        self._resettable = False
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
            self._resettable = True
        self._before = _status("VmRSS") or _most_ever()
        self._seen = self._before

    def look(self) -> None:
        """Note what is held now, for systems that keep no high-water mark."""
        self._seen = max(self._seen, _status("VmRSS") or _most_ever())

    def high_water(self) -> Figure:
        """Bytes of RSS at their highest, above the start."""
        self.look()
        mark = _status("VmHWM") if self._resettable else None
        above = max(self._seen, mark or 0) - self._before
        how = "RSS of the process, highest over the runs less what it held before loading"
        if not self._resettable:
            how += ", seen between runs"
        return Figure(value=float(max(above, 0)), evidence="measured", how=how, count=1)


def _status(field: str) -> int | None:
    for line in (text(Path("/proc/self/status")) or "").splitlines():
        if line.startswith(f"{field}:"):
            with suppress(ValueError, IndexError):
                return int(line.split()[1]) * 1024
    return None


def _most_ever() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
