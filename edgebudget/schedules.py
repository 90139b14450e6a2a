"""Learning-rate schedules for a step count that is fixed in advance.

Each maps a step to a factor in [0, 1] of the peak rate: linear warm-up, then a decay that ends
near zero on the last step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

from edgebudget_runtime.errors import UsageError

Name = Literal["rex", "wsd", "linear", "cosine"]
NAMES: tuple[Name, ...] = get_args(Name)
_DECAY = 0.2  # share of the steps that WSD spends going down


def linear(x: float) -> float:
    """1 - x: straight to zero."""
    return 1.0 - x


def cosine(x: float) -> float:
    """Half a cosine ("SGDR: Stochastic Gradient Descent with Warm Restarts", 2016)."""
    return (1.0 + math.cos(math.pi * x)) / 2.0


def rex(x: float) -> float:
    """Reflected exponential ("REX: Revisiting Budgeted Training ...", 2021): above linear."""
    return (1.0 - x) / (0.5 + 0.5 * (1.0 - x))


def wsd(x: float) -> float:
    """Warm-up, stable, decay ("MiniCPM", 2024): flat, then straight to zero."""
    return min(1.0, (1.0 - x) / _DECAY)


_SHAPES: dict[str, Callable[[float], float]] = {
    "rex": rex,
    "wsd": wsd,
    "linear": linear,
    "cosine": cosine,
}


def factor(name: str, step: int, steps: int, warmup: int = 0) -> float:
    """The share of the peak rate at `step` of `steps` (0-based).

    Raises:
        UsageError: EB154, no schedule has this name.
    """
    if name not in _SHAPES:
        raise UsageError(
            "EB154", f"no schedule is called {name!r}", hint=f"one of {', '.join(NAMES)}"
        )
    if step < warmup:
        return (step + 1) / (warmup + 1)
    x = (step - warmup) / max(1, steps - warmup)
    return min(1.0, max(0.0, _SHAPES[name](min(1.0, x))))
