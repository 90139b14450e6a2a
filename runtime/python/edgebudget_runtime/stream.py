"""A stream of inputs at a rate, within an energy allowance."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from edgebudget_runtime.errors import UsageError
from edgebudget_runtime.inputs import Inputs
from edgebudget_runtime.outcome import Outcome
from edgebudget_runtime.token_bucket import TokenBucket

Late = Literal["drop", "degrade"]
# (inputs, milliseconds left, millijoules left, fill of the energy store)
Answer = Callable[[Inputs, float, float | None, float | None], Outcome]
_STORE_S = 10.0  # seconds of the allowance that can be saved up, where `joules` do not say
_WAITED = 0.1  # of a period: a source that takes longer has made us wait for its input
_ASLEEP_S = 10.0  # so late is nobody: the clock jumped, or the machine slept


@dataclass(frozen=True, slots=True)
class Frame:
    """One input of a stream. No outcome: it was dropped, `why` says for what reason."""

    number: int
    outcome: Outcome | None
    late: bool  # answered after the next input was due
    why: str = ""


class Stream:
    """Iterates over `source`, an input every 1/`rate_hz` seconds, each to be answered by the next.

    An input is not read before it is due, so that a source that is always ready (a list) is
    paced; one that makes us wait (a camera) sets the pace itself, and its inputs are due when
    they come. An input whose time has passed before it could be started is dropped, or with
    `late="degrade"` answered by the fastest sub-network; so it is when the energy is used up.
    `watts` come in all the time and `joules` can be saved up, and are there at the start;
    without `watts`, `joules` are all there are. An error ends no stream: go on with `next`.

    Raises:
        UsageError: EB182 the allowance makes no sense, EB185 the rate is not positive, or `late`
            is neither of the two.
    """

    def __init__(
        self,
        answer: Answer,
        source: Iterable[Inputs],
        rate_hz: float,
        watts: float | None,
        joules: float | None,
        late: Late,
        clock: Callable[[], float],
        sleep: Callable[[float], None],
    ) -> None:
        if not 0 < rate_hz < math.inf:
            raise UsageError("EB185", f"rate_hz={rate_hz} is not positive", hint="write 30.0")
        if late not in ("drop", "degrade"):
            raise UsageError("EB185", f"late={late!r} is unknown", hint="write drop or degrade")
        self._answer, self._source, self._late = answer, iter(source), late
        self._clock, self._sleep, self._period_s = clock, sleep, 1.0 / rate_hz
        self._store: TokenBucket | None = None
        if watts is not None or joules is not None:
            rate_mw = 0.0 if watts is None else watts * 1e3
            capacity = _STORE_S * rate_mw if joules is None else joules * 1e3
            self._store = TokenBucket(rate_mw, capacity, now_s=clock())
        self.answered = self.dropped = self.degraded = 0
        self.missed = 0  # answered, but late
        self.jumps = 0  # of the clock, or sleeps of the machine
        self.unknown_energy = 0  # answers whose energy nobody knows: not taken from the store
        self._number, self._due = -1, clock()

    @property
    def joules_left(self) -> float | None:
        """What is in the energy store; None where there is none."""
        return None if self._store is None else self._store.level(self._clock()) / 1e3

    def __iter__(self) -> Iterator[Frame]:
        return self

    def __next__(self) -> Frame:
        """The next input of the source, answered or dropped.

        Raises:
            EdgeBudgetError: as `Runner.run`; the input is then neither.
        """
        asked = self._on_time()
        given = next(self._source)
        now = self._clock()
        self._number += 1
        if now - asked > _WAITED * self._period_s:
            self._due = now  # it has just come
        due, self._due = self._due, self._due + self._period_s
        return self._frame(given, due, now)

    def _on_time(self) -> float:
        """Wait until the next input is due; returns the time."""
        now = self._clock()
        ahead = self._due - now
        if ahead > self._period_s * (1 + _WAITED) or -ahead > max(_ASLEEP_S, self._period_s):
            self.jumps += 1
            self._due, ahead = now, 0.0
        if ahead > 0:
            self._sleep(ahead)
            return self._clock()
        return now

    def _frame(self, given: Inputs, due: float, now: float) -> Frame:
        end = due + self._period_s
        left_ms = max(end - now, 0.0) * 1e3
        store = self._store
        left_mj = None if store is None else store.allowance(now)
        why = "its time had passed" if left_ms <= 0 else ""
        if left_mj is not None and left_mj <= 0:
            why = "no energy was left"
        if why and self._late == "drop":
            self.dropped += 1
            return Frame(self._number, None, False, why)
        fill = None if store is None else store.fill(now)
        outcome = self._answer(given, left_ms, left_mj, fill)
        now = self._clock()
        spent = outcome.spent.energy_mj.value
        if store is not None and spent is not None:
            store.spend(spent, now)
        self.unknown_energy += store is not None and spent is None
        self.answered += 1
        self.degraded += bool(why) or outcome.degraded
        self.missed += now > end
        return Frame(self._number, outcome, now > end, why or outcome.why)
