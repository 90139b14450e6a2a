"""How long segments and paths may take on this device, from its own recent history.

Split-conformal prediction: of the last n latencies the ceil((n + 1)(1 - alpha))-th smallest bounds
the next one with probability 1 - alpha, whatever their distribution, as long as the next is like
the last. Contention and throttling break that, so that latencies are first divided by a slowdown
factor that follows them within a few runs (ALERT: Accurate Learning for Energy and Timeliness,
2020), and alpha itself is moved by what was missed (Adaptive Conformal Inference Under
Distribution Shift, 2021).

Nothing here grows with the number of requests, and nothing reads a clock.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Callable, Mapping, Sequence
from threading import Lock

SIZE = 256  # latencies remembered of each segment and path
TARGET = 0.01  # the part of the requests that may take longer than their bound

_GAMMA = 0.005  # how far one miss moves alpha
_BEYOND = 1.25  # times the largest latency seen, where history cannot bound the next one
_RISE, _FALL = 0.5, 0.25  # how fast the slowdown follows a slower and a faster run
_SPREAD = 0.5  # standard deviations of the slowdown that its factor includes
_LARGEST_RATIO = 8.0  # one stall is not a slowdown of hundreds
_LONGEST_MS = 600_000.0
_ABSURD = 1000.0  # times the usual latency: the clock jumped, or the machine slept
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
            if latency > self.value:
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
        names = list(dict.fromkeys(s for path in self.paths for s in path))
        self._segments = {s: LatencyBound(target=target, size=size) for s in names}
        self._whole = {p: LatencyBound(target=target, size=size) for p in self.paths}
        self._within = {
            s: tuple(i for i, path in enumerate(self.paths) if s in path) for s in names
        }
        self._usual: dict[str, float] = {}
        self._learning: dict[str, list[float]] = {}
        self._speed, self._off_runs = Slowdown(), 0
        self._on_drift, self._lock = on_drift, Lock()
        for segment in names:
            self._begin(segment, (usual or {}).get(segment, ()))
        # Before the slowdown, in the order of `paths`.
        self.whole_ms = [math.inf] * len(self.paths)
        self.reach_ms = [math.inf] * len(self.paths)
        self._refresh(range(len(self.paths)))

    def rest_ms(self, option: int, done: int) -> float:
        """Bound on what is left of one path after `done` segments, before the slowdown."""
        return min(self._parts_ms(self.paths[option][done:]), self.whole_ms[option])

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
            changed = self._segments[segment].add(ms / speed.factor)
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
            if drifted is not None:
                self._refresh(range(len(self.paths)))
            elif changed:
                self._refresh(self._within[segment])
        if drifted is not None and self._on_drift is not None:
            self._on_drift(drifted)

    def observe_path(self, path: tuple[str, ...], ms: float, slowdown: float) -> None:
        """Take in what a whole path took, and the `slowdown` when it was chosen.

        Paths of one segment too: the time between the segments, and around them, is in `ms`.
        """
        with self._lock:
            if path not in self._whole:
                return
            parts = [self._usual.get(s) for s in path]
            usual = sum(p for p in parts if p is not None)
            if not self._plausible(ms, usual or None):
                return
            ring = self._whole[path]
            knew = ring.enough
            if ring.add(ms / slowdown) or ring.enough != knew:
                self._refresh([i for i, p in enumerate(self.paths) if p == path])

    def history(self) -> dict[str, tuple[float, ...]]:
        """The remembered latencies of every segment that has run, at the usual speed, in ms."""
        found = {}
        with self._lock:
            for segment, ring in self._segments.items():
                median = ring.median()
                if median is not None:
                    scale = self._usual.get(segment, median) / median
                    found[segment] = tuple(ms * scale for ms in ring.history())
        return found

    def _begin(self, segment: str, samples: Sequence[float]) -> None:
        ring = self._segments[segment]
        for ms in samples:
            if self._plausible(ms, None):
                ring.add(ms)
        usual = ring.median()
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
        for ring in (*self._segments.values(), *self._whole.values()):
            if len(ring):
                ring.scale(mean)
        for segment in self._usual:
            # Segments slow down unequally: each is measured again.
            self._usual[segment] *= mean
            self._learning[segment] = []
        self._speed.restart()
        return mean

    def _refresh(self, options: Sequence[int]) -> None:
        for i in options:
            whole = self._whole[self.paths[i]]
            self.whole_ms[i] = whole.value if whole.enough else self._parts_ms(self.paths[i])
        best = math.inf
        for i in range(len(self.paths) - 1, -1, -1):
            best = min(best, self.whole_ms[i])
            self.reach_ms[i] = best

    def _parts_ms(self, segments: Sequence[str]) -> float:
        """Bound on a path from its parts: exact for one; of several, all are rarely late at once.

        What makes all of them late is in the slowdown; what is left is independent, and adds in
        squares. The path's own history corrects it.
        """
        usual = excess = 0.0
        for segment in segments:
            ring = self._segments[segment]
            median = ring.median()
            if median is None:
                return math.inf
            usual += median
            excess += (ring.value - median) ** 2
        return usual + math.sqrt(excess)
