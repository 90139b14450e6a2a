"""Made traces of requests: steady, in bursts, on a device that heats up, on a battery."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import count as counting
from typing import Literal, get_args

import numpy as np

from edgebudget_runtime.errors import UsageError
from edgebudget_runtime.trace import MOST_REQUESTS, Request

Kind = Literal["steady", "bursts", "throttling", "battery"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_CALM_S, _BURST_S = 4.0, 1.0  # mean lengths
_BURST_RATE = 3.0  # times the usual rate of requests
_BURST_SLOWDOWN = (1.5, 3.0)
_THROTTLED = 2.0
_EMPTY = 0.2  # of the first allowance is left at the end of a battery


def make(
    kind: str,
    *,
    count: int,
    rate_per_s: float,
    deadlines_ms: Sequence[float] = (),
    energy_mj: float | None = None,
    seed: int = 0,
) -> Iterator[Request]:
    """Requests at random times (a Poisson process), each with one of the deadlines by lot.

    steady: nothing else. bursts: now and then more requests on a slower device, as when other
    work comes with them. throttling: the device slows down to half its speed over the trace, and
    recovers at its end. battery: the energy allowed for one input sinks from `energy_mj` to a
    fifth of it.

    Raises:
        UsageError: EB184 no such kind, or a number out of range.
    """
    if kind not in KINDS:
        raise UsageError("EB184", f"no kind of trace {kind!r}", hint=f"one of {', '.join(KINDS)}")
    if not (0 < count <= MOST_REQUESTS and 0 < rate_per_s < 1e6):
        raise UsageError(
            "EB184",
            f"{count} requests at {rate_per_s:g} a second cannot be made",
            hint=f"1 to {MOST_REQUESTS} requests, at a rate above 0",
        )
    if any(not 0 < d < 1e9 for d in deadlines_ms) or (energy_mj is not None and not energy_mj > 0):
        raise UsageError("EB184", "a limit is not positive", hint="use limits above 0")
    if kind == "battery" and energy_mj is None:
        raise UsageError("EB184", "a battery needs an energy", hint="add --energy 5mJ")
    rng = np.random.default_rng(seed)
    slow = _bursts(rng) if kind == "bursts" else lambda at_s: (1.0, 1.0)
    return _requests(kind, count, rate_per_s, deadlines_ms, energy_mj, rng, slow)


def _requests(
    kind: str,
    count: int,
    rate_per_s: float,
    deadlines_ms: Sequence[float],
    energy_mj: float | None,
    rng: np.random.Generator,
    state: Callable[[float], tuple[float, float]],
) -> Iterator[Request]:
    at_s = 0.0
    for i in range(count):
        faster, slowdown = state(at_s)
        at_s += float(rng.exponential(1.0 / (rate_per_s * faster)))
        part = i / count
        if kind == "throttling":
            slowdown = float(
                np.interp(part, [0.3, 0.5, 0.8, 0.9], [1.0, _THROTTLED, _THROTTLED, 1.0])
            )
        allowed = energy_mj
        if kind == "battery" and energy_mj is not None:
            allowed = energy_mj * (1.0 - (1.0 - _EMPTY) * part)
        deadline = float(rng.choice(np.asarray(deadlines_ms))) if deadlines_ms else None
        yield Request(
            at_s=at_s, input=str(i), latency_ms=deadline, energy_mj=allowed, slowdown=slowdown
        )


def _bursts(rng: np.random.Generator) -> Callable[[float], tuple[float, float]]:
    """Time -> (rate of requests, slowdown), each over the usual one."""
    ends_s, slowdown = 0.0, 1.0
    phase = counting()

    def state(at_s: float) -> tuple[float, float]:
        nonlocal ends_s, slowdown
        while at_s >= ends_s:
            burst = next(phase) % 2 == 1
            ends_s += float(rng.exponential(_BURST_S if burst else _CALM_S))
            slowdown = float(rng.uniform(*_BURST_SLOWDOWN)) if burst else 1.0
        return (_BURST_RATE if slowdown > 1.0 else 1.0), slowdown

    return state
