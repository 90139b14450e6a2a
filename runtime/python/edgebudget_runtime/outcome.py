"""What the runner says about an answer."""

from __future__ import annotations

from dataclasses import dataclass

from edgebudget_runtime.budget import Violation
from edgebudget_runtime.cost import Cost
from edgebudget_runtime.inputs import Array


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
