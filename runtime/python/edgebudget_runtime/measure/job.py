"""What the probe is asked to do, as it crosses to the device."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

from edgebudget_runtime import codec
from edgebudget_runtime.errors import ArtifactError, UsageError

_MOST_BYTES = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One measurement of one artifact. `seconds` is for each kind of measuring, not the whole."""

    folder: str  # the artifact
    provider: str
    threads: int | None = None  # None: as a runner would
    seconds: float = 5.0
    runs: int = 256  # the most of each path
    layers: bool = True
    energy: bool = True
    family: str = "cpu"  # whose energy counts
    counters: tuple[str, ...] = ()  # further energy counters, "module:function"

    def __post_init__(self) -> None:
        if not 0 < self.seconds <= 3600 or not math.isfinite(self.seconds):
            raise ValueError("between 0 and 3600 seconds")
        if self.runs < 1:
            raise ValueError("at least one run")

    def encode(self) -> str:
        """JSON on one line."""
        return json.dumps(codec.encode(Job, self), sort_keys=True)

    @staticmethod
    def decode(text: str) -> Job:
        """Read a job back.

        Raises:
            UsageError: EB188 it is none.
        """
        try:
            raw = json.loads(text[:_MOST_BYTES])
            job: Job = codec.decode(Job, raw)
        except (ValueError, ArtifactError) as e:
            raise UsageError(
                "EB188",
                f"this is no measuring job: {e}",
                hint="use the same version of edgebudget on both sides",
            ) from None
        return job
