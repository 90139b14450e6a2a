"""Every error edgebudget raises on purpose.

EdgeBudgetError                     exit code
├── UsageError          EB1xx  2    the caller's arguments or plan are wrong
├── UnsupportedError    EB2xx  5    the model or operator cannot do this
├── PassError           EB3xx  1    a pass broke its contract
├── InfeasibleError     EB4xx  3    nothing we can build fits the budget (known before work)
│   └── MissedError     EB4xx  4    the budget was missed; the best so far is saved
├── ArtifactError       EB5xx  5    a manifest, model or data file is not what it claims to be
└── TargetError         EB6xx  6    the target's engine is missing or failed

``runtime/errors.toml`` lists every code with its meaning; a test keeps it and the sources equal.
"""

from __future__ import annotations

from typing import ClassVar


class EdgeBudgetError(Exception):
    """Base class: a stable code, what happened, and what to try next."""

    exit_code: ClassVar[int] = 1

    def __init__(self, code: str, what: str, *, hint: str = "") -> None:
        self.code, self.what, self.hint = code, what, hint
        super().__init__(f"[{code}] {what}" + (f"\n  try: {hint}" if hint else ""))


def first_line(e: Exception) -> str:
    """What an exception of somebody else's says, in one line."""
    return (str(e).strip().splitlines() or [type(e).__name__])[0]


class UsageError(EdgeBudgetError, ValueError):
    """The caller's arguments or plan are wrong."""

    exit_code = 2


class UnsupportedError(EdgeBudgetError):
    """The model or operator cannot do this."""

    exit_code = 5


class PassError(EdgeBudgetError):
    """A pass broke its contract, or crashed."""


class InfeasibleError(EdgeBudgetError):
    """Nothing we can build fits the budget."""

    exit_code = 3


class MissedError(InfeasibleError):
    """The budget was missed after work was spent; the best so far is saved."""

    exit_code = 4


class ArtifactError(EdgeBudgetError):
    """A manifest, model or data file is not what it claims to be."""

    exit_code = 5


class TargetError(EdgeBudgetError):
    """The target's engine is missing, or failed."""

    exit_code = 6
