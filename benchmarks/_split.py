"""A split of the zoo as a data set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edgebudget.workload import Sample


@dataclass(frozen=True)
class Evenly:
    """A zoo split, all of it or an even selection of `limit`."""

    source: Any
    limit: int = 0

    @property
    def name(self) -> str:
        return str(self.source.name)

    def __len__(self) -> int:
        return min(self.limit, len(self.source)) if self.limit else len(self.source)

    def sample(self, index: int) -> Sample:
        inputs, label = self.source.sample(index * len(self.source) // len(self))
        return Sample(inputs, label)

    def digest(self) -> str:
        return f"{self.source.digest()}/{len(self)}"
