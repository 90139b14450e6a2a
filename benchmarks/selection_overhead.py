"""What choosing a sub-network costs in Python, apart from the engine, at 64 paths.

Sixteen chains of four exits. Every situation is decided in turn; a decision may take 15 us, and
neither deciding nor learning may hold on to memory.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from benchmarks.harness import save
from edgebudget_runtime.cost import Cost
from edgebudget_runtime.elastic import OperatingPoint
from edgebudget_runtime.latency_bound import Latencies
from edgebudget_runtime.policy import (
    Ask,
    Front,
    Option,
    Policy,
    Thresholds,
    best_within,
    deadline,
    decide,
    paced,
    prepare,
)

_CHAINS, _EXITS = 16, 4
_LIMIT_US = 15.0
_NOISE_BYTES = 1000  # left by 160,000 calls
_LOOP = 200  # decisions between two looks at the clock


def main(arguments: list[str]) -> int:
    """Time decisions and observations, and look at what they leave in memory."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.selection_overhead")
    parser.add_argument("--rounds", type=int, default=200)
    options = parser.parse_args(arguments)
    front, latencies = _prepared()
    decisions = _decisions(front, latencies)
    times = _timed({**decisions, **_observations(front, latencies)}, options.rounds)
    grown = _growth([*decisions.values(), *_observations(front, latencies).values()])
    checks = {
        f"at most {_LIMIT_US:g} us a decision": all(
            times[n]["median_us"] <= _LIMIT_US for n in decisions
        ),
        "nothing grows with history": grown["bytes_later"] <= _NOISE_BYTES,
    }
    save(
        "selection_overhead",
        {"paths": len(front.options), "rounds": options.rounds, "loop": _LOOP, "times": times,
         "memory": grown, "ok": checks},
    )  # fmt: skip
    for name, found in times.items():
        sys.stderr.write(
            f"{name:32} {found['median_us']:6.2f} us  (slowest loop {found['max_us']:.2f})\n"
        )
    for text, ok in checks.items():
        sys.stderr.write(f"{'ok  ' if ok else 'MISS'} {text}\n")
    return 0 if all(checks.values()) else 1


def _prepared() -> tuple[Front, Latencies]:
    """64 options and latencies with history; the figures are drawn, only their order matters."""
    rng = np.random.default_rng(0)
    options, usual = [], {}
    for chain in range(_CHAINS):
        scale = 1.0 + chain
        path: tuple[str, ...] = ()
        for exit in range(_EXITS):
            segment = f"c{chain}s{exit}"
            path = (*path, segment)
            usual[segment] = [float(x) for x in scale * rng.lognormal(0.0, 0.1, 256)]
            options.append(
                Option(
                    id="+".join(path),
                    path=path,
                    quality=float(np.log1p(scale * (exit + 1)) + 0.02 * rng.normal()),
                    macs=scale * (exit + 1),
                    energy_mj=scale * (exit + 1) * float(rng.lognormal(0.0, 0.3)),
                )
            )
    front = prepare(options)
    return front, Latencies([o.path for o in front.options], usual)


def _decisions(front: Front, latencies: Latencies) -> Mapping[str, Callable[[int], object]]:
    longest = max(latencies.whole_ms)
    lefts = [longest * (i + 1) / 50 for i in range(60)]
    dearest = max(front.energy_mj)
    chain = max((o for o in front.options if len(o.path) == _EXITS), key=lambda o: o.macs).path
    point = OperatingPoint("p", chain, {s: 0.9 for s in chain[:-1]}, {}, Cost(), None, None)

    def asking(policy: Policy, asks: list[Ask]) -> Callable[[int], object]:
        return lambda i: decide(policy, front, asks[i % len(asks)], latencies)

    begun = chain[:1]
    here = front.at[begun]
    return {
        "start, deadline": asking(deadline, [Ask(ms) for ms in lefts]),
        "start, deadline and energy": asking(
            best_within, [Ask(ms, dearest * (i % 20) / 20) for i, ms in enumerate(lefts)]
        ),
        "start, nothing fits": asking(deadline, [Ask(1e-3, 1e-3)]),
        "start, paced": asking(paced, [Ask(ms, dearest, fill=ms / longest) for ms in lefts]),
        "after an exit, deadline": asking(
            deadline, [Ask(ms, ran=begun, chosen=here) for ms in lefts]
        ),
        "after an exit, thresholds": asking(
            Thresholds(point), [Ask(ms, ran=begun, confidence=0.5) for ms in lefts]
        ),
    }


def _observations(front: Front, latencies: Latencies) -> Mapping[str, Callable[[int], object]]:
    rng = np.random.default_rng(1)
    drawn = [float(x) for x in rng.lognormal(0.0, 0.1, 997)]
    path = front.options[0].path
    segment, usual = path[0], latencies.segment_ms(path[0]) or 1.0
    return {
        "observe a segment": lambda i: latencies.observe(segment, usual * drawn[i % 997]),
        "observe a path": lambda i: latencies.observe_path(
            path, usual * drawn[i % 997], latencies.slowdown
        ),
    }


def _timed(calls: Mapping[str, Callable[[int], object]], rounds: int) -> dict[str, Any]:
    """Microseconds a call of each, in turn: the median loop, and the slowest one."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 2):
        for name, call in calls.items():
            start = time.perf_counter()
            for i in range(turn * _LOOP, (turn + 1) * _LOOP):
                call(i)
            us = (time.perf_counter() - start) / _LOOP * 1e6
            if turn >= 2:
                found[name].append(us)
    return {
        n: {"median_us": statistics.median(v), "max_us": max(v), "loops": len(v)}
        for n, v in found.items()
    }


def _growth(calls: list[Callable[[int], object]]) -> dict[str, int]:
    """Bytes that 5000 calls of each leave behind, and that 20000 more leave on top."""
    held = []
    tracemalloc.start()
    try:
        for count in (1000, 5000, 20_000):
            for call in calls:
                for i in range(count):
                    call(i)
            held.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    return {"bytes_earlier": held[1] - held[0], "bytes_later": held[2] - held[1]}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
