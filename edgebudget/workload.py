"""A workload: a model, the data that goes through it, and what counts as a good answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

if TYPE_CHECKING:
    from edgebudget.program import Program

Array = np.ndarray[Any, Any]
TaskKind = Literal["classification", "regression", "detection", "custom"]


@dataclass(frozen=True, slots=True)
class Sample:
    """One input without its batch dimension (name -> array), and its label if there is one."""

    inputs: Mapping[str, Array]
    target: Array | None = None


class Dataset(Protocol):
    """Numbered samples, the same at every read."""

    @property
    def name(self) -> str:
        """What a person calls this data."""
        ...

    def __len__(self) -> int:
        """How many samples there are."""
        ...

    def sample(self, index: int) -> Sample:
        """Sample number `index`, ready for the model (already pre-processed)."""
        ...

    def digest(self) -> str:
        """SHA-256 over what the samples are made of."""
        ...


@dataclass(frozen=True, slots=True)
class Data:
    """The three uses of data; None where the user gave none.

    `calibration` sets activation ranges and ranks candidates; `train` feeds passes that learn
    (its spatial size may differ from the model's input where the model allows that);
    `evaluation` proves the result and is never seen by a pass.
    """

    calibration: Dataset | None = None
    train: Dataset | None = None
    evaluation: Dataset | None = None


@dataclass(frozen=True, slots=True)
class Quality:
    """The task's metric on a data set, with a 95 % interval and the other metrics beside it."""

    metric: str
    value: float
    low: float
    high: float
    count: int
    others: Mapping[str, float] = field(default_factory=dict)


class Task(Protocol):
    """Turns predictions into a quality. Higher is better, always."""

    @property
    def kind(self) -> TaskKind:
        """What sort of answers the model gives."""
        ...

    @property
    def metric(self) -> str:
        """Name of the quality, as `Quality.metric` and the manifest show it."""
        ...

    @property
    def needs_reference(self) -> bool:
        """True: the labels are the original model's own outputs."""
        ...

    def quality(
        self, outputs: Mapping[str, Array], targets: Mapping[str, Array] | Array
    ) -> Quality:
        """Score `outputs` (name -> [N, ...]) against labels [N, ...] or reference outputs."""
        ...


@dataclass(frozen=True, slots=True)
class Workload:
    """All that a compile starts from."""

    name: str
    program: Program
    task: Task
    data: Data
    preprocessing: Mapping[str, Any]  # plain JSON: layout, colour order, range, mean, std
    digest: str  # SHA-256 of the model's weights and structure
    notes: tuple[str, ...] = ()  # on the data: what was skipped, what was divided


def batches(
    dataset: Dataset, size: int, indices: Sequence[int] | None = None
) -> Iterator[tuple[dict[str, Array], Array | None]]:
    """Stack samples into batches of `size` (the last may be smaller), in order."""
    order = list(range(len(dataset))) if indices is None else list(indices)
    for start in range(0, len(order), size):
        samples = [dataset.sample(i) for i in order[start : start + size]]
        inputs = {k: np.stack([s.inputs[k] for s in samples]) for k in samples[0].inputs}
        labels = [s.target for s in samples if s.target is not None]
        yield inputs, np.stack(labels) if len(labels) == len(samples) else None
