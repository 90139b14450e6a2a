"""How long segments and paths may take on this device, from its own recent history.

Split-conformal prediction: of the last n latencies the ceil((n + 1)(1 - alpha))-th smallest bounds
the next one with probability 1 - alpha, whatever their distribution, as long as the next is like
the last. Contention and throttling break that, so that latencies are first divided by a slowdown
factor that follows them within a few runs (ALERT: Accurate Learning for Energy and Timeliness,
2020), and alpha itself is moved by what was missed (Adaptive Conformal Inference Under
Distribution Shift, 2021). Stalls are no factor, and come with other work: what was seen while the
device was busy is kept apart from what was seen in calm, so that the one does not forbid in calm
what is safe there. What was too slow once and has not run since is forgotten by and by.

Nothing here grows with the number of requests, and nothing reads a clock.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Callable, Mapping, Sequence
from threading import Lock

SIZE = 256  # latencies remembered of each segment and path
TARGET = (
    0.005  # the part of the runs that may take longer than their bound: half of what a p99 allows,
)
# since the choice falls on the runs whose bounds are too low

_GAMMA = 0.005  # how far one miss moves alpha
_ROUNDING = 1 + 1e-9
_BEYOND = 1.25  # times the largest latency seen, where history cannot bound the next one
_RISE, _FALL = 0.5, 0.25  # how fast the slowdown follows a slower and a faster run
_SPREAD = 0.5  # standard deviations of the slowdown that its factor includes
_LARGEST_RATIO = 8.0  # one stall is not a slowdown of hundreds
_LONGEST_MS = 600_000.0
_ABSURD = 1000.0  # times the usual latency: the clock jumped, or the machine slept
_BUSY = 1.6  # a slowdown from which on other work has the device
_HOLD = 128  # runs in a row below it until the device counts as calm again
_FORGET = 256  # calls after which what did not run loses its largest latency
_SWEEP = 16  # calls between two looks at what did not run
_DRIFTED = 1.5  # a slowdown, or its inverse, that is not a burst when it stays
_USUAL_LEAST = 1 / _DRIFTED
_DRIFT_RUNS = 256
_ONE_IN = 4  # calls without a limit on time that are observed once all segments are known
_LEARNED_FROM = 16  # runs whose median becomes a segment's usual latency


class LatencyBound:
    """The conformal bound on one latency, over a ring of the last `size` ones."""

    __slots__ = ("_alpha", "_next", "_ring", "_size", "_sorted", "_target", "enough", "value")

    def __init__(self, *, target: float = TARGET, size: int = SIZE) -> None:
        self._target, self._alpha, self._size = target, target, size
        self._ring: list[float] = []  # oldest first from _next
        self._sorted: list[float] = []
        self._next = 0
        self.enough = False  # whether the history is long enough for the quantile to exist
        self.value = math.inf  # no history bounds nothing

    def __len__(self) -> int:
        return len(self._ring)

    def add(self, latency: float) -> bool:
        """Take one latency in; whether the bound changed."""
        ring, ordered = self._ring, self._sorted
        if self.enough:
            moved = self._alpha + _GAMMA * self._target
            if latency > self.value * _ROUNDING:
                moved = max(moved - _GAMMA, 0.0)
            # Not far above the target: a long quiet time is no reason to be careless.
            self._alpha = min(moved, 2 * self._target)
        if len(ring) < self._size:
            ring.append(latency)
            self.enough = (len(ring) + 1) * self._target >= 1.0 - 1e-9
        else:
            at = self._next
            del ordered[bisect_left(ordered, ring[at])]
            ring[at] = latency
            self._next = (at + 1) % self._size
        insort(ordered, latency)
        return self._renew()

    def forget(self) -> bool:
        """Put the usual latency in the place of the largest one; whether the bound changed."""
        largest, usual = self._sorted[-1], self._sorted[len(self._sorted) // 2]
        self._ring[self._ring.index(largest)] = usual
        self._sorted.pop()
        insort(self._sorted, usual)
        return self._renew()

    def scale(self, factor: float) -> None:
        """Multiply the history by `factor`."""
        self._ring = [x * factor for x in self._ring]
        self._sorted = [x * factor for x in self._sorted]
        self._renew()

    def history(self) -> tuple[float, ...]:
        """What is remembered, oldest first."""
        return (*self._ring[self._next :], *self._ring[: self._next])

    def median(self) -> float | None:
        """The usual latency, None without history."""
        return self._sorted[len(self._sorted) // 2] if self._sorted else None

    def _renew(self) -> bool:
        count = len(self._sorted)
        rank = math.ceil((count + 1) * (1.0 - self._alpha) - 1e-9)
        value = self._sorted[rank - 1] if rank <= count else self._sorted[-1] * _BEYOND
        changed, self.value = value != self.value, value
        return changed


class Slowdown:
    """How much slower runs are just now than usual, as a mean and a variance.

    Rises fast and falls slowly: the first slow run of a burst already warns the next one.
    """

    __slots__ = ("_variance", "factor", "mean")

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Back to the usual speed."""
        self.mean, self._variance, self.factor = 1.0, 0.0, 1.0

    def observe(self, ratio: float) -> None:
        """Take in one observed latency over the usual one."""
        gap = min(ratio, _LARGEST_RATIO) - self.mean
        weight = _RISE if gap > 0 else _FALL
        self.mean += weight * gap
        self._variance = (1.0 - weight) * (self._variance + weight * gap * gap)
        self.factor = self.mean + _SPREAD * math.sqrt(self._variance)


class _Regime:
    """What was seen while the device was calm, or while it was busy, and the bounds that gives."""

    def __init__(self, paths: Sequence[tuple[str, ...]], target: float, size: int) -> None:
        self.paths = paths
        names = list(dict.fromkeys(s for path in paths for s in path))
        self.segments = {s: LatencyBound(target=target, size=size) for s in names}
        self.whole = {p: LatencyBound(target=target, size=size) for p in paths}
        self.other = self  # whose segments stand in for those that have not run here
        self.whole_ms = [math.inf] * len(paths)
        self.reach_ms = [math.inf] * len(paths)
        self._within = {s: [i for i, path in enumerate(paths) if s in path] for s in names}
        self._idle = dict.fromkeys(paths, 0)  # calls since a path ran
        self._calls = 0
        self._recent: set[tuple[str, ...]] = set()

    def add(self, segment: str, ms: float) -> None:
        """One run of a segment."""
        if self.segments[segment].add(ms):
            self.refresh(self._within[segment])

    def add_path(self, path: tuple[str, ...], ms: float) -> None:
        """One run of a whole path."""
        ring = self.whole[path]
        knew = ring.enough
        if ring.add(ms) or ring.enough != knew:
            self.refresh([self.paths.index(path)])
        self._calls += 1
        self._recent.add(path)
        if self._calls % _SWEEP == 0:
            self._sweep()

    def rings(self) -> tuple[LatencyBound, ...]:
        """Everything that is remembered."""
        return (*self.segments.values(), *self.whole.values())

    def parts_ms(self, segments: Sequence[str]) -> float:
        """Bound on a path from its parts: exact for one; of several, all are rarely late at once.

        What makes all of them late is in the slowdown; what is left is independent, and adds in
        squares. The path's own history corrects it.
        """
        usual = excess = 0.0
        for segment in segments:
            ring = self.segments[segment]
            if not len(ring):
                ring = self.other.segments[segment]
            median = ring.median()
            if median is None:
                return math.inf
            usual += median
            excess += (ring.value - median) ** 2
        return usual + math.sqrt(excess)

    def rest_ms(self, option: int, done: int) -> float:
        """Bound on what is left of a path after `done` segments, and on handing it over."""
        path = self.paths[option]
        whole = self.whole[path].median()
        around = 0.0
        if done and whole is not None:
            usual = [self.segments[s].median() for s in path]
            around = max(whole - sum(u for u in usual if u is not None), 0.0)
            around = 0.0 if None in usual else around
        return min(self.parts_ms(path[done:]) + around, self.whole_ms[option])

    def refresh(self, options: Sequence[int]) -> None:
        """Bounds of these options, and what follows from them."""
        for i in options:
            whole = self.whole[self.paths[i]]
            self.whole_ms[i] = whole.value if whole.enough else self.parts_ms(self.paths[i])
        best = math.inf
        for i in range(len(self.paths) - 1, -1, -1):
            best = min(best, self.whole_ms[i])
            self.reach_ms[i] = best

    def _sweep(self) -> None:
        """Forget what has kept a path from running for long: it cannot show that it has passed."""
        ran = {s for path in self._recent for s in path}
        idle = []
        for path in self.paths:
            self._idle[path] = 0 if path in self._recent else self._idle[path] + _SWEEP
            if self._idle[path] >= _FORGET:
                self._idle[path] = 0
                idle.append(path)
        # A segment that several paths share forgets once.
        segments = dict.fromkeys(s for path in idle for s in path if s not in ran)
        rings = [*(self.whole[p] for p in idle), *(self.segments[s] for s in segments)]
        if any([r.forget() for r in rings if len(r)]):
            self.refresh(range(len(self.paths)))
        self._recent.clear()


class Latencies:
    """Bounds on every path, and on what is left of it, from the latencies of its segments.

    `paths` are in the order of `Front.options`; this is the `Bounds` that policies ask. One
    object may serve many threads. `usual` gives samples of each segment in milliseconds, from
    calibration or an earlier run; a segment without any has no bound until it has run.
    `on_drift` hears the factor by which the device has become slower for good.
    """

    def __init__(
        self,
        paths: Sequence[tuple[str, ...]],
        usual: Mapping[str, Sequence[float]] | None = None,
        *,
        target: float = TARGET,
        size: int = SIZE,
        on_drift: Callable[[float], None] | None = None,
    ) -> None:
        self.paths = tuple(paths)
        self.slowdown = 1.0
        self._calls = 0
        self.discarded = 0  # durations that no run can have had
        self.drifts = 0
        self._calm = _Regime(self.paths, target, size)
        self._busy = _Regime(self.paths, target, size)
        self._calm.other, self._busy.other = self._busy, self._calm
        self._usual: dict[str, float] = {}
        self._learning: dict[str, list[float]] = {}
        self._speed, self._off_runs, self._hold = Slowdown(), 0, 0
        self._on_drift, self._lock = on_drift, Lock()
        for segment in self._calm.segments:
            self._begin(segment, (usual or {}).get(segment, ()))
        self._refresh()

    @property
    def whole_ms(self) -> Sequence[float]:
        """Bounds on whole paths as the device is now, before the slowdown, in their order."""
        return self._now().whole_ms

    @property
    def reach_ms(self) -> Sequence[float]:
        """The least bound of each path and of those after it."""
        return self._now().reach_ms

    @property
    def busy(self) -> bool:
        """Whether other work has had the device lately."""
        return self._hold > 0

    def rest_ms(self, option: int, done: int) -> float:
        """Bound on what is left of one path after `done` segments, before the slowdown."""
        return self._now().rest_ms(option, done)

    def segment_ms(self, segment: str) -> float | None:
        """The usual latency of a segment on this device, None when not known yet."""
        return self._usual.get(segment)

    def wants(self, *, limited: bool) -> bool:
        """Whether to observe a call: each with a limit on time, else enough of them to keep up."""
        if limited or self._learning:
            return True
        self._calls += 1
        return self._calls % _ONE_IN == 0

    def observe(self, segment: str, ms: float) -> None:
        """Take in what one run of a segment took, as soon as it has ended."""
        drifted = None
        with self._lock:
            usual, speed = self._usual.get(segment), self._speed
            if not self._plausible(ms, usual):
                return
            self._now().add(segment, ms / speed.factor)
            if segment in self._learning:
                self._learn(segment, ms)
                usual = self._usual.get(segment)
            if usual is not None:
                speed.observe(ms / usual)
                if not _USUAL_LEAST < speed.mean < _DRIFTED:
                    drifted = self._drift()
                else:
                    self._off_runs = 0
            self.slowdown = speed.factor
            self._hold = _HOLD if speed.factor >= _BUSY else max(self._hold - 1, 0)
            if drifted is not None:
                self._refresh()
        if drifted is not None and self._on_drift is not None:
            self._on_drift(drifted)

    def observe_path(
        self, path: tuple[str, ...], ms: float, slowdown: float, busy: bool | None = None
    ) -> None:
        """Take in what a whole path took, and `slowdown` and `busy` when it was chosen.

        Paths of one segment too: the time between the segments, and around them, is in `ms`.
        """
        with self._lock:
            if path not in self._calm.whole:
                return
            parts = [self._usual.get(s) for s in path]
            usual = sum(p for p in parts if p is not None)
            if not self._plausible(ms, usual or None):
                return
            regime = self._busy if (self.busy if busy is None else busy) else self._calm
            regime.add_path(path, ms / slowdown)

    def history(self) -> dict[str, tuple[float, ...]]:
        """The remembered latencies of every segment that has run, at the usual speed, in ms."""
        found = {}
        with self._lock:
            for segment, ring in self._calm.segments.items():
                if not len(ring):
                    ring = self._busy.segments[segment]
                median = ring.median()
                if median is not None:
                    scale = self._usual.get(segment, median) / median
                    found[segment] = tuple(ms * scale for ms in ring.history())
        return found

    def _begin(self, segment: str, samples: Sequence[float]) -> None:
        for ms in samples:
            if self._plausible(ms, None):
                self._calm.segments[segment].add(ms)
        usual = self._calm.segments[segment].median()
        if usual is None:
            self._learning[segment] = []
        else:
            self._usual[segment] = usual

    def _plausible(self, ms: float, usual: float | None) -> bool:
        longest = _LONGEST_MS if usual is None else min(_LONGEST_MS, _ABSURD * usual)
        if 0.0 < ms <= longest:  # false for NaN too
            return True
        self.discarded += 1
        return False

    def _learn(self, segment: str, ms: float) -> None:
        """Collect the runs whose median will be the segment's usual latency."""
        seen = self._learning[segment]
        seen.append(ms / self._speed.factor)
        if len(seen) >= _LEARNED_FROM:
            self._usual[segment] = sorted(seen)[len(seen) // 2]
            del self._learning[segment]

    def _drift(self) -> float | None:
        """One more run off the usual speed: where it has come to stay, it becomes the usual one."""
        mean = self._speed.mean
        self._off_runs += 1
        if self._off_runs < _DRIFT_RUNS:
            return None
        self._off_runs = 0
        self.drifts += 1
        for ring in (*self._calm.rings(), *self._busy.rings()):
            if len(ring):
                ring.scale(mean)
        for segment in self._usual:
            # Segments slow down unequally: each is measured again.
            self._usual[segment] *= mean
            self._learning[segment] = []
        self._speed.restart()
        self._hold = 0
        return mean

    def _now(self) -> _Regime:
        return self._busy if self._hold else self._calm

    def _refresh(self) -> None:
        for regime in (self._calm, self._busy):
            regime.refresh(range(len(self.paths)))
