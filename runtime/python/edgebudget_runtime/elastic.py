"""What a manifest says of an artifact with several sub-networks.

Sub-networks that are prefixes of one chain of segments form its *exits*: every segment of the
chain that can end it gives the model's own outputs under their own names, and a later segment's
answer replaces an earlier one's. A chain runs on until a segment is sure enough.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from edgebudget_runtime.cost import Cost
from edgebudget_runtime.quality import Quality

Signal = Literal["max_softmax", "energy"]


@dataclass(frozen=True, slots=True)
class Exit:
    """How sure a segment's answer is, read from its class scores [N, classes].

    max_softmax: the largest probability of `output / temperature`; energy: the log of the sum of
    exponentials of it, times `temperature`. Larger is surer for both.
    """

    segment: str
    output: str
    signal: Signal
    temperature: float

    def __post_init__(self) -> None:
        if not self.temperature > 0.0:
            raise ValueError("a temperature above 0")


@dataclass(frozen=True, slots=True)
class Certificate:
    """A bound on the quality lost to leaving early, and how sure it is."""

    max_drop: float  # relative to the original, as `--max-drop`
    confidence: float
    count: int  # samples the bound rests on
    how: str = ""


@dataclass(frozen=True, slots=True)
class OperatingPoint:
    """Thresholds of one chain, solved on the exported files for a mean cost.

    A sample leaves after a segment whose signal reaches the segment's threshold; segments that
    are not named never end the chain. `shares` is the part of the samples that ended at each
    segment, the last one included. Worst case is the whole path.
    """

    id: str
    path: tuple[str, ...]
    thresholds: Mapping[str, float]
    shares: Mapping[str, float]
    mean_cost: Cost
    quality: Quality | None
    certificate: Certificate | None


@dataclass(frozen=True, slots=True)
class Sharing:
    """How much of the weights sub-networks have in common, in bytes of deployable files."""

    stored_bytes: int  # of all files, each once
    separate_bytes: int  # were every sub-network stored alone
    largest_bytes: int  # of the largest sub-network alone
