"""Energy of a run on this machine, from whatever counter its processor has."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

from edgebudget.energy import LOCAL_COUNTERS
from edgebudget_runtime.cost import Figure
from edgebudget_runtime.measure import meter
from edgebudget_runtime.measure.conditions import unknown
from edgebudget_runtime.measure.probe import find_counter

if TYPE_CHECKING:
    from edgebudget_runtime.cost import Resource
    from edgebudget_runtime.measure.counters import Counter

SECONDS = 2.5  # of runs: some counters move ten times a second
_SETTLE_S, _IDLE_S = meter.GPU_SETTLE_S, 2.5  # a GPU's, taken for all


@cache
def counter_of(family: str) -> tuple[Counter | None, str]:
    """The counter of this machine's CPU or GPU, or None and why there is none; looked for once."""
    return find_counter(family, LOCAL_COUNTERS)


def told(tells: tuple[Resource, ...], family: str) -> tuple[Resource, ...]:
    """What a target on this machine tells, with energy where its processor has a counter."""
    if "energy_mj" in tells or counter_of(family)[0] is None:
        return tells
    return (*tells, "energy_mj")


def metered(family: str, run: Callable[[], int], seconds: float = SECONDS) -> Figure:
    """Millijoules that one inference adds to idle power, measured, or unknown with the reason.

    `run` does some inferences and tells how many. All that happens on that part of the device is
    counted. Idle power, that of a device at rest, is measured once in a process.
    """
    counter, why = counter_of(family)
    if counter is None:
        return unknown(why)
    counter.start()
    try:
        began = time.perf_counter()
        idle = _idle(family)
        meter.warm(run, time.perf_counter() - began)
        return meter.inference(counter, run, idle, seconds).net_mj
    finally:
        counter.stop()


@cache
def _idle(family: str) -> Figure:
    counter, _ = counter_of(family)
    assert counter is not None, "asked only where there is one"
    time.sleep(_SETTLE_S)
    return meter.idle_power(counter, _IDLE_S)
