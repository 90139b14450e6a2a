"""Energy of one inference: what the device draws while it runs, less what it draws idle.

Idle power is measured first, on the same counter. Both figures are kept: with it, as the device
really draws, and without, as the inference adds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edgebudget_runtime.cost import Figure
from edgebudget_runtime.measure.conditions import unknown
from edgebudget_runtime.measure.counters import Counter, Reading

_INTERVALS = 5
_MOVES_S = 0.25  # within which a counter that is read while work goes on shows something new
_RESOLUTION = 1e-6  # of the whole: no counter tells less
_WARM_S = 2.0  # after a rest as long: clocks rise, and some counters lag behind the power
# A GPU holds its clocks for seconds after work: an H200 draws 121 W then, and 79 W at rest.
GPU_SETTLE_S = 8.0


@dataclass(frozen=True, slots=True)
class Energy:
    """Millijoules of one inference without and with idle power."""

    net_mj: Figure
    gross_mj: Figure


def idle_power(
    counter: Counter,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> Figure:
    """Watts while this process waits: the median of some intervals."""
    found: list[float] = []
    for _ in range(_INTERVALS):
        before, began = counter.read(), clock()
        sleep(seconds / _INTERVALS)
        after, elapsed = counter.read(), clock() - began
        if before is None or after is None or elapsed <= 0:
            continue
        joules = counter.joules(before, after)
        if joules:  # 0: it stands still, which no powered device does
            found.append(joules / (after.at_s - before.at_s))
    if not found:
        return unknown(f"{counter.name} gave no usable interval while idle")
    return _figure(found, f"idle, {counter.name}")


def warm(
    run: Callable[[], int], rested_s: float, clock: Callable[[], float] = time.perf_counter
) -> None:
    """Work until the device draws what it draws at work, after a rest of `rested_s` seconds."""
    until = clock() + min(_WARM_S, rested_s)
    run()
    while clock() < until:
        run()


def inference(
    counter: Counter,
    run: Callable[[], int],
    idle_w: Figure,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> Energy:
    """Millijoules of one inference; `run` does some, tells how many, and is repeated for `seconds`.

    Energy is the counter's: all that happens on that part of the device is in it. An interval
    begins and ends where the counter moves: some move ten times a second. Unknown where the
    counter gave nothing usable, or where the run does not stand out of the idle power by more than
    what either of them varies.
    """
    gross: list[float] = []
    net: list[float] = []
    doubt: list[float] = []
    idle = idle_w.value
    for _ in range(_INTERVALS):
        before, _ = _move(counter, run, clock)
        ended, count = clock() + seconds / _INTERVALS, 0
        while count == 0 or clock() < ended:
            count += max(run(), 1)
        after, more = _move(counter, run, clock)
        count += more
        joules = None if before is None or after is None else counter.joules(before, after)
        if not joules or before is None or after is None:
            continue
        gross.append(joules * 1e3 / count)
        if idle is not None:
            ms = (after.at_s - before.at_s) * 1e3 / count
            net.append(gross[-1] - idle * ms)
            doubt.append((idle_w.spread or 0.0) * ms)
    nothing = unknown(f"{counter.name} gave no usable interval")
    whole = _figure(gross, f"{counter.name}, idle power included") if gross else nothing
    if not net:
        return Energy(nothing if not gross else unknown("idle power is not known"), whole)
    added = _figure(net, f"{counter.name}, less {idle:.3g} W of idle power")
    rounding = _RESOLUTION * (whole.value or 0.0)
    noise = max(added.spread or 0.0, statistics.median(doubt), rounding)
    if added.value is None or added.value <= noise:
        return Energy(unknown(f"{counter.name}: does not stand out of idle power"), whole)
    return Energy(added, whole)


def _move(
    counter: Counter, run: Callable[[], int], clock: Callable[[], float]
) -> tuple[Reading | None, int]:
    """Run until the counter moves: what it shows then, and how many runs that took."""
    first, until, count = counter.read(), clock() + _MOVES_S, 0
    while True:
        count += max(run(), 1)
        now = counter.read()
        if now is None or first is None or now.values != first.values or clock() > until:
            return now, count


def _figure(values: Sequence[float], how: str) -> Figure:
    ordered = sorted(values)
    low, high = ordered[len(ordered) // 4], ordered[(3 * len(ordered)) // 4]
    return Figure(
        value=statistics.median(ordered),
        evidence="measured",
        how=f"median of {len(ordered)} intervals, {how}",
        count=len(ordered),
        spread=(high - low) / 2,
    )
