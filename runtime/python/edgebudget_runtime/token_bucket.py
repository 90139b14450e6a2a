"""An allowance over time: so much may be spent per second, and saved up to a capacity."""

from __future__ import annotations

import math
from threading import Lock

from edgebudget_runtime.errors import UsageError


class TokenBucket:
    """Fills at `rate` per second up to `capacity`, in any unit: millijoules, requests.

    Time is given with every call, in seconds of a clock of the caller's. A clock that goes back
    adds nothing and is counted; one that leaps ahead cannot add more than the capacity. What
    costs more than was foreseen is taken all the same: the level may fall below zero, and has
    to be earned back. `reserve` is kept for what must not fail. One bucket may serve many threads.

    Raises:
        UsageError: EB182 a rate below 0, a capacity or level out of range.
    """

    def __init__(
        self,
        rate: float,
        capacity: float,
        *,
        level: float | None = None,
        reserve: float = 0.0,
        now_s: float = 0.0,
    ) -> None:
        full = capacity if level is None else level
        if not (0 <= rate < math.inf and 0 < capacity < math.inf and full <= capacity):
            raise UsageError(
                "EB182",
                f"a store of {capacity:g} that holds {full:g} and gains {rate:g} a second",
                hint="the capacity is above 0 and not below the level, the rate 0 or more",
            )
        if not 0 <= reserve < capacity:
            raise UsageError(
                "EB182",
                f"a reserve of {reserve:g} in a store of {capacity:g}",
                hint="keep a reserve of 0 or more, below the capacity",
            )
        self.rate, self.capacity, self.reserve = rate, capacity, reserve
        self.jumps = 0  # times the clock went back, or showed no number
        self._level, self._at_s = full, now_s
        self._lock = Lock()

    def level(self, now_s: float) -> float:
        """What is in the bucket; below zero after more was spent than it held."""
        with self._lock:
            self._refill(now_s)
            return self._level

    def allowance(self, now_s: float) -> float:
        """What one request may spend now, the reserve left untouched; never below zero."""
        return max(self.level(now_s) - self.reserve, 0.0)

    def fill(self, now_s: float) -> float:
        """The allowance as a part of the most it can be, 0 to 1."""
        return self.allowance(now_s) / (self.capacity - self.reserve)

    def take(self, amount: float, now_s: float) -> bool:
        """Spend `amount` if the allowance holds it; whether it was spent."""
        with self._lock:
            self._refill(now_s)
            if not 0 <= amount <= self._level - self.reserve:
                return False
            self._level -= amount
            return True

    def spend(self, amount: float, now_s: float) -> None:
        """Spend what has been used already, or give back (below zero) what was not."""
        with self._lock:
            self._refill(now_s)
            if math.isfinite(amount):
                self._level = min(self._level - amount, self.capacity)

    def _refill(self, now_s: float) -> None:
        elapsed_s = now_s - self._at_s
        if not 0 <= elapsed_s < math.inf:
            self.jumps += 1
            if math.isfinite(now_s):
                self._at_s = now_s
            return
        self._at_s = now_s
        self._level = min(self._level + elapsed_s * self.rate, self.capacity)
