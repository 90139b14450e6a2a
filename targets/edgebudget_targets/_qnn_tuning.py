"""Searching the settings of the vendor's compiler that move its own estimate."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgebudget_runtime.errors import TargetError
from edgebudget_targets._hexagon_limits import knobs

if TYPE_CHECKING:
    from pathlib import Path

    from edgebudget_targets._qnn_emulator import Emulator


@dataclass(frozen=True, slots=True)
class Tuned:
    """The best settings found. `estimate` is empty where the compiler prints none."""

    estimate: Mapping[str, float]
    knobs: Mapping[str, int]  # empty: the compiler's own defaults are best
    default_us: float
    tried: int

    @property
    def words(self) -> str:
        """What was found, for people; empty where nothing is better than the defaults."""
        if not self.knobs:
            return ""
        chosen = ", ".join(f"{k} {v}" for k, v in self.knobs.items())
        return f"{chosen}, against {self.default_us:.0f} us with the defaults"


def tune(emulator: Emulator, file: Path) -> Tuned:
    """Try every value of one setting after the other, keeping the best of each.

    Raises:
        TargetError: as `Emulator.estimate` with the compiler's own defaults.
    """
    best = emulator.estimate(file)
    if not best:
        return Tuned({}, {}, 0.0, 1)
    default_us, chosen, tried = best["us"], dict[str, int](), 1
    for name, values in knobs().items():
        kept = chosen
        for value in values:
            trial = {**kept, name: value}
            tried += 1
            found = dict[str, float]()
            with suppress(TargetError):  # a setting that this graph does not fit is no choice
                found = emulator.estimate(file, trial)
            if found and (found["us"], found["cycles"]) < (best["us"], best["cycles"]):
                best, chosen = found, trial
    return Tuned(best, chosen, default_us, tried)
