"""What one model of the zoo says about itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

if TYPE_CHECKING:
    from torch import nn

Array = np.ndarray[Any, Any]
Split = Literal["calibration", "train", "evaluation"]
SPLITS: tuple[Split, ...] = ("calibration", "train", "evaluation")

PACKAGE = Path(__file__).resolve().parent


class ZooData(Protocol):
    """Numbered samples, the same at every read."""

    @property
    def name(self) -> str:
        """What a person calls this data."""
        ...

    def __len__(self) -> int:
        """How many samples there are."""
        ...

    def sample(self, index: int) -> tuple[dict[str, Array], Array | None]:
        """Inputs without batch dimension, pre-processed float32, and the label.

        The label is an int64 scalar for classification and a float32 scalar for regression.
        """
        ...

    def digest(self) -> str:
        """SHA-256 over what the samples are made of."""
        ...


@dataclass(frozen=True, slots=True)
class ZooEntry:
    """A model with its weights, card and data.

    `input_shape` is [1, C, H, W], float32, what `preprocessing` (plain JSON) leads to.
    `weights` and `card` are file names in the package's `weights/` and `cards/`.
    `needs_data` is true where `data` needs a folder from the user.
    `load(None)` loads the packaged weights; it and `data` raise ValueError with one line of
    text on a bad file or folder.
    `outputs` names what `forward` returns: more than one is a tuple of early exits in depth
    order (`scores.exit1`, ...), the full network's answer last.
    """

    name: str
    summary: str
    task: Literal["classification", "regression"]
    metric: Literal["top1", "srcc"]
    classes: tuple[str, ...]
    input_name: str
    input_shape: tuple[int, int, int, int]
    preprocessing: Mapping[str, Any]
    weights: str
    card: str
    needs_data: bool
    build: Callable[[], nn.Module]
    load: Callable[[Path | None], nn.Module]
    data: Callable[[Split, Path | None], ZooData]
    outputs: tuple[str, ...] = ("scores",)

    @property
    def weights_path(self) -> Path:
        """The packaged weights."""
        return PACKAGE / "weights" / self.weights

    @property
    def card_path(self) -> Path:
        """The model card."""
        return PACKAGE / "cards" / self.card
