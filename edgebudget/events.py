"""What long work says about itself. The library never prints; callers listen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Started:
    """A piece of work began; `total` is its number of steps, or None when unknown."""

    work: str
    total: int | None = None


@dataclass(frozen=True, slots=True)
class Advanced:
    """`steps` more steps of a piece of work are done; `note` is a short status."""

    work: str
    steps: int = 1
    note: str = ""


@dataclass(frozen=True, slots=True)
class Finished:
    """A piece of work ended."""

    work: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Said:
    """Something a person should read."""

    level: Literal["info", "warning"]
    text: str


Event = Started | Advanced | Finished | Said
Emit = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Listen to nothing."""
