"""Handwritten digits: small, offline, trained in seconds."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgebudget_models.entry import PACKAGE, Array, Split, ZooData, ZooEntry

if TYPE_CHECKING:
    from edgebudget_models.digits_net import DigitsNet

_NAME = "digits"
_WEIGHTS = f"{_NAME}.safetensors"
_SEED = 20240
_EVALUATION, _CALIBRATION = 500, 200


class DigitsData:
    """One split of scikit-learn's 1797 digits; pictures [1, 8, 8] in [0, 1]."""

    def __init__(self, split: Split) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        order = np.random.default_rng(_SEED).permutation(len(digits.target))
        bounds = {
            "evaluation": slice(0, _EVALUATION),
            "calibration": slice(_EVALUATION, _EVALUATION + _CALIBRATION),
            "train": slice(_EVALUATION + _CALIBRATION, None),
        }
        chosen = np.sort(order[bounds[split]])
        self.name = f"digits/{split}"
        self._images: Array = (digits.images[chosen, None] / 16.0).astype(np.float32)
        self._labels: Array = digits.target[chosen].astype(np.int64)

    def __len__(self) -> int:
        return len(self._labels)

    def sample(self, index: int) -> tuple[dict[str, Array], Array | None]:
        """The picture as [1, 8, 8] under "image", and its digit."""
        return {"image": self._images[index]}, np.asarray(self._labels[index])

    def digest(self) -> str:
        """SHA-256 over pictures and labels."""
        return hashlib.sha256(self._images.tobytes() + self._labels.tobytes()).hexdigest()


def build() -> DigitsNet:
    """The network with random weights."""
    from edgebudget_models.digits_net import DigitsNet

    return DigitsNet()


def load(weights: Path | None = None) -> DigitsNet:
    """The network with the packaged weights, or with those of a safetensors file."""
    from edgebudget_models.checkpoint import load_into

    return load_into(build(), weights or PACKAGE / "weights" / _WEIGHTS)


def data(split: Split, root: Path | None = None) -> ZooData:
    """scikit-learn's digits; ValueError when a folder is given, since none is read."""
    if root is not None:
        raise ValueError(f"digits brings its own data: leave out the folder {root}")
    return DigitsData(split)


ENTRY = ZooEntry(
    name=_NAME,
    summary="8x8 handwritten digits, a small residual network, offline",
    task="classification",
    metric="top1",
    classes=tuple("0123456789"),
    input_name="image",
    input_shape=(1, 1, 8, 8),
    preprocessing={
        "layout": "NCHW",
        "color": "grey",
        "range": [0.0, 1.0],
        "mean": [0.0],
        "std": [1.0],
        "resize": "none: 8x8, levels 0..16 scaled to [0, 1]",
    },
    weights=_WEIGHTS,
    card=f"{_NAME}.md",
    needs_data=False,
    build=build,
    load=load,
    data=data,
)
