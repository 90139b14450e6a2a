"""A battery's own gauges, through Linux' power_supply: the power of the whole device.

Gauges of batteries are slow (one value in a second to half a minute) and coarse; only while the
battery is what feeds the device do they say anything about it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from threading import Event, Thread

from edgebudget_runtime.measure.conditions import ROOT, number, text
from edgebudget_runtime.measure.counters import MOST_W, Reading

_PERIOD_S = 0.2


class Gauge:
    """Joules, by sampling a power in watts on a thread and adding up.

    A sample that is missing or absurd leaves a gap; intervals with a gap are discarded.
    """

    def __init__(
        self,
        name: str,
        watts: Callable[[], float | None],
        clock: Callable[[], float] = time.perf_counter,
        period_s: float = _PERIOD_S,
    ) -> None:
        self.name, self._watts, self._clock, self._period_s = name, watts, clock, period_s
        self._joules, self._gaps = 0.0, 0
        self._last: tuple[float, float] | None = None
        self._stop = Event()
        self._thread: Thread | None = None

    def sample(self) -> None:
        """Take one value in."""
        now, watts = self._clock(), self._watts()
        if watts is None or not 0 <= watts <= MOST_W:
            self._gaps += 1
            self._last = None
            return
        if self._last is not None:
            before, then = self._last
            if now < before:
                self._gaps += 1
            else:
                self._joules += (now - before) * (watts + then) / 2
        self._last = (now, watts)

    def start(self) -> None:
        """Sample from now on."""
        self.sample()
        self._thread = Thread(target=self._sampling, name="edgebudget-energy", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Sample no more."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def read(self) -> Reading | None:
        """Joules so far, up to the last sample, and gaps so far."""
        last = self._last
        return None if last is None else Reading(last[0], (self._joules, float(self._gaps)))

    def joules(self, before: Reading, after: Reading) -> float | None:
        """Between two readings; None where a sample was missing."""
        if before.values[1] != after.values[1] or after.at_s <= before.at_s:
            return None
        return after.values[0] - before.values[0]

    def _sampling(self) -> None:
        while not self._stop.wait(self._period_s):
            self.sample()


def find(root: Path = ROOT) -> tuple[Gauge | None, str]:
    """A discharging battery's gauge, or None and why not."""
    why = "no battery in /sys/class/power_supply"
    for supply in sorted((root / "sys/class/power_supply").glob("*")):
        if text(supply / "type") != "Battery" or text(supply / "scope") == "Device":
            continue  # a mouse has a battery too
        status = text(supply / "status")
        if status != "Discharging":
            why = f"{supply.name} is {status or 'in an unknown state'}: unplug the device"
            continue
        if _watts(supply) is None:
            why = f"{supply.name} tells neither its power nor its current and voltage"
            if any((supply / name).exists() for name in ("energy_now", "charge_now")):
                why += "; its steps of charge are far too coarse for one inference"
            continue
        return Gauge(f"battery {supply.name}", partial(_discharging_watts, supply)), ""
    return None, why


def _discharging_watts(supply: Path) -> float | None:
    return _watts(supply) if text(supply / "status") == "Discharging" else None


def _watts(supply: Path) -> float | None:
    """Power now; some drivers give what leaves the battery as negative."""
    power = number(supply / "power_now")  # microwatts
    if power is not None:
        return abs(power) * 1e-6
    current, voltage = number(supply / "current_now"), number(supply / "voltage_now")
    if current is None or voltage is None:
        return None
    return abs(current) * 1e-6 * voltage * 1e-6
