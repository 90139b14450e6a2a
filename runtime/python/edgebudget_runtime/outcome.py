"""What the runner says about an answer."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping
from dataclasses import dataclass

from edgebudget_runtime.budget import Budget, Limit, Violation
from edgebudget_runtime.cost import Cost, Figure, Resource
from edgebudget_runtime.errors import MissedError, UsageError
from edgebudget_runtime.inputs import Array

_MACHINE = platform.machine()


@dataclass(frozen=True, slots=True)
class Item:
    """One input of a batch: the sub-network whose answer it got, where that ended, how sure."""

    subnetwork: str
    exit: str
    confidence: float | None


@dataclass(frozen=True, slots=True)
class Outcome:
    """The answer, and what it took.

    `engine` names what ran it, and what it stood in for when that is not the artifact's own.
    `subnetwork` is the one whose answer this is, `exit` the segment that gave it, `confidence`
    that segment's signal (None: it has none). `degraded`: less ran than was chosen, because
    something failed or time ran out; `why` says in one line how the answer came about.
    """

    outputs: dict[str, Array]
    ran: tuple[str, ...]  # segment ids
    spent: Cost  # of one input
    broke: tuple[Violation, ...]
    engine: str
    subnetwork: str = ""
    exit: str = ""
    confidence: float | None = None
    degraded: bool = False
    why: str = ""
    items: tuple[Item, ...] = ()  # of a batch, in the given order


def limits(
    latency_ms: float | None, energy_mj: float | None, macs: float | None
) -> dict[Resource, float]:
    """The limits that are set. What is 0 or below is a limit that nothing keeps.

    Raises:
        UsageError: EB185 a limit is NaN.
    """
    if latency_ms is energy_mj is macs is None:
        return {}
    asked: tuple[tuple[Resource, float | None], ...] = (
        ("latency_ms", latency_ms),
        ("energy_mj", energy_mj),
        ("macs", macs),
    )
    for name, bound in asked:
        if bound is not None and math.isnan(bound):
            raise UsageError("EB185", f"{name}={bound} is no limit", hint="leave it out for none")
    return {name: bound for name, bound in asked if bound is not None}


def violations(asked: Mapping[Resource, float], spent: Cost) -> tuple[Violation, ...]:
    """The limits that were broken, or cannot be shown to be kept."""
    if not asked:
        return ()
    return Budget(limits=tuple(Limit(r, b) for r, b in asked.items())).violations(spent)


def missed(broken: Violation) -> MissedError:
    """The error of a strict call."""
    name, _, unit = broken.limit.resource.rpartition("_")
    name, unit = (name, f" {unit}") if name else (unit, "")
    actual = "an unknown amount" if broken.actual is None else f"{broken.actual:.3g}{unit}"
    return MissedError(
        "EB490",
        f"the answer took {actual} of {name}, more than {broken.limit.bound:.3g}{unit}",
        hint="allow more, or compile to a smaller budget",
    )


def wall(seconds: float, count: int) -> Figure:
    """The time that one answer took, unknown where the clock went back meanwhile."""
    if not 0.0 <= seconds < math.inf:
        return Figure(value=None, evidence="unknown", how="the clock jumped")
    return Figure(
        value=seconds * 1e3,
        evidence="measured",
        how="wall time, checks included" + (", mean of a batch" if count > 1 else ""),
        device=_MACHINE,
        count=count,
    )
