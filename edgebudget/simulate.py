"""Replay a trace of requests against an artifact's profile, without hardware.

One device serves one request at a time, first come first served; a deadline counts from the
arrival. A segment takes one of its own profiled latencies, times the slowdown that the trace
states for that time. Every policy meets the same draws, so that policies can be compared, and
learns its latency bounds as a runner would.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from edgebudget_runtime.errors import UsageError
from edgebudget_runtime.latency_bound import Latencies
from edgebudget_runtime.manifest import Manifest
from edgebudget_runtime.policy import Ask, Front, Policy, decide, options, prepare
from edgebudget_runtime.profile import Profile
from edgebudget_runtime.token_bucket import TokenBucket
from edgebudget_runtime.trace import Request

Samples = Mapping[str, Sequence[float]]  # segment -> latencies in milliseconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Store:
    """An energy store that fills with time, in millijoules and milliwatts."""

    capacity_mj: float
    rate_mw: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """What one policy did with a trace. Shares are of the requests; None: not known."""

    policy: str
    requests: int
    late: int  # answered after the deadline
    avoidable: int  # of these, where some sub-network would have been in time
    overspent: int  # took more energy than was allowed, or than is known to be allowed
    quality: float | None  # mean over all answers
    quality_in_time: float | None  # late answers count as 0
    energy_mj: float | None  # mean
    p50_ms: float | None  # from arrival to answer
    p99_ms: float | None
    ran: Mapping[str, int]  # sub-network -> answers, the most frequent first
    drifts: int

    @property
    def late_share(self) -> float:
        """The part of the requests that was answered late."""
        return self.late / self.requests if self.requests else 0.0


@dataclass(frozen=True, slots=True)
class _Answer:
    """One simulated answer."""

    place: int
    took_ms: float  # without waiting
    ended_s: float
    allowed_mj: float | None


def segment_samples(manifest: Manifest, profile: Profile | None) -> Samples:
    """Latencies of every segment: from a profile, else from the manifest's own figures.

    The manifest knows whole paths: a path's latency beyond what its known segments take is
    divided by MACs, and has no spread.

    Raises:
        UsageError: EB184 a segment's latency is not known.
    """
    if profile is not None:
        found = {s: tuple(v) for s, v in profile.samples_ms.items()}
    else:
        found = _from_manifest(manifest)
    missing = [s for sub in manifest.subnetworks for s in sub.path if s not in found]
    if missing:
        raise UsageError(
            "EB184",
            f"nothing says how long segment {missing[0]!r} takes",
            hint="measure it with `edgebudget frontier --measure`, or give a --profile",
        )
    return found


def _from_manifest(manifest: Manifest) -> dict[str, tuple[float, ...]]:
    macs = {s.id: max(s.macs, 1.0) for s in manifest.segments}
    found: dict[str, tuple[float, ...]] = {}
    for sub in sorted(manifest.subnetworks, key=lambda s: len(s.path)):
        total_ms = sub.cost.latency_ms.value
        new = [s for s in sub.path if s not in found]
        if total_ms is None or not new:
            continue
        left_ms = total_ms - sum(found[s][0] for s in sub.path if s in found)
        whole = sum(macs[s] for s in new)
        for segment in new:
            # A deeper path that was measured as faster took no time beyond the shallower one.
            found[segment] = (max(left_ms * macs[segment] / whole, 1e-6),)
    return found


def usual_ms(samples: Samples, path: Sequence[str]) -> float:
    """The median latency of a path's segments, one after the other."""
    return sum(sorted(samples[s])[len(samples[s]) // 2] for s in path)


def prepare_front(manifest: Manifest, samples: Samples, power_w: float | None = None) -> Front:
    """The options of an artifact, with the energy of each: from a mean power, or the manifest."""
    found = options(manifest)
    if power_w is not None:
        found = tuple(
            replace(o, energy_mj=power_w * usual_ms(samples, o.path))  # W x ms = mJ
            for o in found
        )
    return prepare(found)


def replay(
    requests: Iterable[Request],
    front: Front,
    samples: Samples,
    policy: Policy,
    *,
    name: str,
    store: Store | None = None,
    seed: int = 0,
) -> Replay:
    """Answer every request of a trace with one policy.

    Raises:
        UsageError: EB181 the policy's choice cannot be run, EB182 the store is impossible,
            EB184 the energy of a sub-network is not known and there is a store to keep.
    """
    bucket = None if store is None else TokenBucket(store.rate_mw, store.capacity_mj)
    if bucket is not None and math.inf in front.energy_mj:
        unknown = front.options[front.energy_mj.index(math.inf)].id
        raise UsageError(
            "EB184",
            f"nothing says what energy the sub-network {unknown!r} takes",
            hint="state the device's mean power with --power",
        )
    device = _Device(front, samples, policy, seed, bucket)
    tally = _Tally(front)
    for request in requests:
        tally.add(request, device.answer(request), device)
    return tally.result(name, device.latencies.drifts)


class _Device:
    """One simulated device: what it is busy with, what it has learnt, its energy."""

    def __init__(
        self, front: Front, samples: Samples, policy: Policy, seed: int, bucket: TokenBucket | None
    ) -> None:
        self._front, self._policy, self._bucket = front, policy, bucket
        self._samples = {s: np.asarray(v) for s, v in samples.items()}
        self._row = {s: i for i, s in enumerate(self._samples)}
        self._rng = np.random.default_rng(seed)
        self._draws = np.zeros(len(self._row))
        self._free_s = 0.0
        self.latencies = Latencies([o.path for o in front.options], samples)

    def answer(self, request: Request) -> _Answer:
        """Wait until the device is free, then run as the policy says."""
        start_s = max(request.at_s, self._free_s)
        self._draws = self._rng.random(len(self._row))
        allowed, fill = request.energy_mj, None
        if self._bucket is not None:
            held = self._bucket.allowance(start_s)
            allowed = held if allowed is None else min(allowed, held)
            fill = self._bucket.fill(start_s)
        waited_ms = (start_s - request.at_s) * 1e3
        place, took_ms = self._run(request, waited_ms, allowed, fill)
        self._free_s = start_s + took_ms / 1e3
        if self._bucket is not None:
            self._bucket.spend(self._front.energy_mj[place], start_s)
        return _Answer(place, took_ms, self._free_s, allowed)

    def takes_ms(self, segment: str, request: Request) -> float:
        """How long a segment takes for the present request."""
        history = self._samples[segment]
        drawn = history[int(self._draws[self._row[segment]] * len(history))]
        return float(drawn) * request.slowdown

    def fastest_ms(self, request: Request) -> float:
        """How long the sub-network takes that is the fastest for the present request."""
        return min(sum(self.takes_ms(s, request) for s in o.path) for o in self._front.options)

    def _run(
        self, request: Request, waited_ms: float, allowed: float | None, fill: float | None
    ) -> tuple[int, float]:
        front, slowdown = self._front, self.latencies.slowdown
        busy = self.latencies.busy
        ran: tuple[str, ...] = ()
        chosen, took_ms = -1, 0.0
        while True:
            left_ms = None
            if request.latency_ms is not None:
                left_ms = request.latency_ms - waited_ms - took_ms
            spent = front.energy_mj[front.at[ran]] if ran else 0.0
            left_mj = None if allowed is None else allowed - (spent if spent < math.inf else 0.0)
            sure = request.confidence.get(ran[-1]) if ran else None
            ask = Ask(left_ms, left_mj, ran, chosen, sure, fill)
            chosen = decide(self._policy, front, ask, self.latencies).place
            path = front.options[chosen].path
            if path == ran:
                self.latencies.observe_path(ran, took_ms, slowdown, busy)
                return chosen, took_ms
            for segment in path[len(ran) :]:
                ms = self.takes_ms(segment, request)
                self.latencies.observe(segment, ms)
                took_ms += ms
                ran = (*ran, segment)
                if ran in front.at:
                    break


class _Tally:
    """Adds up what happened."""

    def __init__(self, front: Front) -> None:
        self._front = front
        self._ran: Counter[str] = Counter()
        self._late = self._avoidable = self._overspent = 0
        self._latencies: list[float] = []
        self._quality: list[float | None] = []
        self._in_time: list[float | None] = []
        self._energy: list[float] = []

    def add(self, request: Request, answer: _Answer, device: _Device) -> None:
        """Count one answer."""
        option = self._front.options[answer.place]
        self._ran[option.id] += 1
        total_ms = (answer.ended_s - request.at_s) * 1e3
        late = request.latency_ms is not None and total_ms > request.latency_ms
        if late:
            assert request.latency_ms is not None
            self._late += 1
            waited_ms = total_ms - answer.took_ms
            self._avoidable += waited_ms + device.fastest_ms(request) <= request.latency_ms
        spent = self._front.energy_mj[answer.place]
        self._overspent += answer.allowed_mj is not None and spent > answer.allowed_mj
        quality = request.quality.get(option.id, option.quality)
        self._latencies.append(total_ms)
        self._quality.append(quality)
        self._in_time.append(0.0 if late else quality)
        self._energy.append(spent)

    def result(self, name: str, drifts: int) -> Replay:
        """The sums and means."""
        ms = np.asarray(self._latencies)
        return Replay(
            policy=name,
            requests=len(ms),
            late=self._late,
            avoidable=self._avoidable,
            overspent=self._overspent,
            quality=_mean(self._quality),
            quality_in_time=_mean(self._in_time),
            energy_mj=_mean([None if e == math.inf else e for e in self._energy]),
            p50_ms=float(np.quantile(ms, 0.5)) if len(ms) else None,
            p99_ms=float(np.quantile(ms, 0.99)) if len(ms) else None,
            ran=dict(self._ran.most_common()),
            drifts=drifts,
        )


def _mean(values: Sequence[float | None]) -> float | None:
    """None where one value is unknown: the rest would tell another story."""
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None
