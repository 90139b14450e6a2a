"""One input's way through segments: an answer at every exit, the best so far whatever happens."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from edgebudget_runtime import engine
from edgebudget_runtime.confidence import row_signals
from edgebudget_runtime.elastic import Exit
from edgebudget_runtime.errors import ArtifactError, EdgeBudgetError, UsageError, first_line
from edgebudget_runtime.inputs import Array
from edgebudget_runtime.manifest import Manifest
from edgebudget_runtime.planner import Planner, View
from edgebudget_runtime.policy import Ask, Fixed, Policy, Thresholds, best_within, deadline, paced
from edgebudget_runtime.sessions import Sessions
from edgebudget_runtime.watchdog import Watchdog

# Policies that never look at how sure an answer is: reading it would only take time.
_BLIND: tuple[Policy, ...] = (best_within, deadline, paced)
_HANDING_OVER = 0.03  # of a deadline: what is left when a late segment is stopped


class StoppedError(Exception):
    """A segment was stopped, since its answer would have come too late."""

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self.seconds = seconds  # that it had run


@dataclass(frozen=True, slots=True)
class Wish:
    """What one call asks for. `start` is when it came, on the runner's clock."""

    policy: Policy
    start: float
    latency_ms: float | None = None
    energy_mj: float | None = None
    fill: float | None = None


class Segments:
    """Runs segments by id, and reads how sure they are."""

    def __init__(self, manifest: Manifest, sessions: Sessions, clock: Callable[[], float]) -> None:
        self.by_id = {s.id: s for s in manifest.segments}
        last = [self.by_id[s.path[-1]].outputs for s in manifest.subnetworks]
        # The end of one path may also hand tensors to a deeper one: answers are what all give.
        common = set.intersection(*({t.name for t in made} for made in last))
        self.outputs = tuple(t.name for t in last[0] if t.name in common)
        self.exits: Mapping[str, Exit] = {e.segment: e for e in manifest.exits}
        self.answers = frozenset(
            s.id for s in manifest.segments if common <= {t.name for t in s.outputs}
        )
        self._inputs = {s.id: [t.name for t in s.inputs] for s in manifest.segments}
        self._outputs = {s.id: [t.name for t in s.outputs] for s in manifest.segments}
        self.sessions, self.clock = sessions, clock
        # A clock of the caller's own says nothing of how long the engine may run.
        self.watchdog = Watchdog() if clock is time.perf_counter else None

    def run(
        self, id: str, state: dict[str, Array], left_s: Callable[[], float] | None = None
    ) -> tuple[float, bool]:
        """Run one segment on `state`, which takes in what it makes; stop it after `left_s()`.

        Returns:
            The seconds it took, and whether it had to be opened first (not in the seconds).

        Raises:
            EdgeBudgetError: as `Sessions.get`; EB509 the engine failed.
            StoppedError: there was no time left.
        """
        session, opened = self.sessions.get(id)
        feed = {n: state[n] for n in self._inputs[id]}
        start = self.clock()
        if left_s is None or self.watchdog is None:
            state.update(engine.run_session(session, feed, self._outputs[id]))
            return self.clock() - start, opened
        with self.watchdog.limit(left_s()) as options:
            try:
                state.update(engine.run_session(session, feed, self._outputs[id], options))
            except ArtifactError:
                if options.terminate:
                    raise StoppedError(self.clock() - start) from None
                raise
        return self.clock() - start, opened

    def close(self) -> None:
        """Stop watching."""
        if self.watchdog is not None:
            self.watchdog.close()

    def confidences(self, id: str, state: Mapping[str, Array]) -> Array | None:
        """How sure a segment is of each row [N], or None where it has no signal."""
        exit = self.exits.get(id)
        if exit is None:
            return None
        return np.array(row_signals(state[exit.output], exit.signal, exit.temperature))

    def failure(self, path: tuple[str, ...]) -> tuple[str, EdgeBudgetError] | None:
        """The first segment of a path that is known not to work now, and why."""
        if not self.sessions.troubled:
            return None
        for id in path:
            error = self.sessions.failure(id)
            if error is not None:
                return id, error
        return None


class Way:
    """One call on its way. After `go`: `best` are the outputs of `exit`, of the path `ran`."""

    def __init__(self, segments: Segments, planner: Planner, view: View, wish: Wish) -> None:
        self._segments, self._planner, self._view, self._wish = segments, planner, view, wish
        self._curious = wish.policy not in _BLIND and not isinstance(wish.policy, Fixed)
        self.slowdown, self.busy = planner.latencies.slowdown, planner.latencies.busy
        several = len(planner.front.options) > 1
        limited = wish.latency_ms is not None or wish.energy_mj is not None
        self.observed = several and planner.latencies.wants(limited=limited)
        self.ran: tuple[str, ...] = ()
        self.all_ran: tuple[str, ...] = ()  # with beginnings that had to be given up
        self.best: dict[str, Array] = {}
        self.answered: tuple[str, ...] = ()  # the path that gave `best`
        self.confidence: float | None = None
        self._scores: dict[str, Array] = {}
        self.degraded = False
        self.why = ""
        self.opened = False
        self._path: tuple[str, ...] = ()
        self._first: tuple[str, ...] | None = None
        self._avoid: dict[str, EdgeBudgetError] = {}

    def go(self, given: Mapping[str, Array]) -> None:
        """Run to the end that the policy wants, or as far as it works.

        Raises:
            EdgeBudgetError: there is no answer at all: what failed first on the last path.
            UsageError: EB180, EB181 the policy's first choice cannot be run.
        """
        state = dict(given)
        self._choose()
        while len(self.ran) < len(self._path):
            id = self._path[len(self.ran)]
            try:
                seconds, opened = self._segments.run(id, state, self._time_for_more())
            except StoppedError as e:
                self.all_ran += (id,)
                latencies, ms = self._planner.latencies, e.seconds * 1e3
                if ms > (latencies.segment_ms(id) or math.inf):
                    latencies.observe(id, ms)  # it would have taken longer still
                self._stop(f"{id} was stopped: it would have been late")
                break
            except EdgeBudgetError as e:
                if isinstance(e, UsageError) and e.code in {"EB174", "EB175"} and not self.best:
                    raise
                if self.best:
                    self._stop(_failed(id, e))
                    break
                self._leave_out(id, e)
                state, self.ran, self._path = dict(given), (), ()
                self._choose()
                continue
            self._advance(id, state, seconds, opened)
        self._judge()
        if not self.degraded and self._cut_short():
            self.degraded = True

    def _judge(self) -> None:
        """How sure the answer is: the least sure row counts."""
        if self.confidence is None:
            exit = self._segments.exits.get(self.answered[-1])
            if exit is not None:
                rows = row_signals(self._scores[exit.output], exit.signal, exit.temperature)
                least = min(rows, default=math.nan)
                self.confidence = least if math.isfinite(least) else None

    def _advance(self, id: str, state: dict[str, Array], seconds: float, opened: bool) -> None:
        self.ran += (id,)
        self.all_ran += (id,)
        self.opened |= opened
        if self.observed and not opened:
            self._planner.latencies.observe(id, seconds * 1e3)
        if id not in self._segments.answers:
            return
        self.best = {n: state[n] for n in self._segments.outputs}
        self.answered = self.ran
        self.confidence = None
        exit = self._segments.exits.get(id)
        self._scores = {} if exit is None else {exit.output: state[exit.output]}
        if self._curious:
            self._judge()
        if self._view.front.beyond.get(self.ran):
            self._reconsider(id)

    def _reconsider(self, id: str) -> None:
        """After an answer: stop, go on, or go on to somewhere else."""
        left = self._left_ms()
        try:
            self._choose()
        except Exception as e:  # a policy of the user's own; the answer stands
            self._stop(f"no way on after {id}: {first_line(e)}")
            return
        late = left is not None and left <= 0 and not isinstance(self._wish.policy, Fixed)
        if late and len(self._path) > len(self.ran):
            self._stop(f"out of time after {id}")

    def _choose(self) -> None:
        """Ask the policy; paths with a segment known to fail are left out, with a reason."""
        while True:
            self._path = self._ask()
            if self._first is None:
                self._first = self._path
            known = self._segments.failure(self._path[len(self.ran) :])
            if known is None:
                return
            self._leave_out(*known)

    def _ask(self) -> tuple[str, ...]:
        view, wish = self._view, self._wish
        ran = self.ran
        ask = Ask(
            None if wish.latency_ms is None else self._left_ms(),
            None if wish.energy_mj is None else view.left_mj(wish.energy_mj, ran),
            ran,
            view.front.at.get(self._path, -1),
            self.confidence if ran else None,
            wish.fill,
        )
        try:
            choice = view.decide(wish.policy, ask)
        except UsageError:
            if not self._avoid:
                raise
            choice = view.decide(deadline, ask)  # what the policy insists on does not work
        if not self.degraded:
            self.why = choice.why
        return view.front.options[choice.place].path

    def _leave_out(self, id: str, error: EdgeBudgetError) -> None:
        """Narrow the choice to what does without this segment."""
        self._avoid[id] = error
        left = self._planner.without(self._view.places, self._avoid)
        if not left:
            raise error
        self._view = self._planner.view(left)
        self.degraded, self.why = True, _failed(id, error)

    def _stop(self, why: str) -> None:
        self._path, self.degraded, self.why = self.ran, True, why

    def _left_ms(self) -> float | None:
        if self._wish.latency_ms is None:
            return None
        gone = max(self._segments.clock() - self._wish.start, 0.0)  # a clock may go back
        return self._wish.latency_ms - gone * 1e3

    def _time_for_more(self) -> Callable[[], float] | None:
        """Seconds that the next segment may take, where another answer can stand for it."""
        allowed, policy = self._wish.latency_ms, self._wish.policy
        if allowed is None or not self.best or isinstance(policy, Fixed):
            return None
        return lambda: ((self._left_ms() or 0.0) - _HANDING_OVER * allowed) / 1e3

    def _cut_short(self) -> bool:
        """Whether limits ended the way before what was first chosen for this input."""
        policy = self._wish.policy
        if isinstance(policy, Thresholds):
            needed = policy.point.thresholds.get(self.answered[-1])
            reached = self.confidence
            sure = needed is not None and reached is not None and reached >= needed
            return self.answered != policy.point.path and not sure
        at = self._planner.front.at
        return at[self.answered] < at[self._first or self.answered]


def _failed(id: str, error: EdgeBudgetError) -> str:
    return f"{id} failed: [{error.code}] {error.what}"
