"""No-reference image quality of 3840x2160 photographs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edgebudget_models.entry import PACKAGE, Split, ZooData, ZooEntry

if TYPE_CHECKING:
    from edgebudget_models.uhd_iqa_net import UhdIqa

_NAME = "uhd-iqa"
_WEIGHTS = f"{_NAME}.safetensors"


def build() -> UhdIqa:
    """The network with random weights."""
    from edgebudget_models.uhd_iqa_net import UhdIqa

    return UhdIqa()


def load(weights: Path | None = None) -> UhdIqa:
    """The network with the packaged weights, or with those of a safetensors file."""
    from edgebudget_models.checkpoint import load_into

    return load_into(build(), weights or PACKAGE / "weights" / _WEIGHTS)


def data(split: Split, root: Path | None = None) -> ZooData:
    """Distorted photographs with known quality: of the folder `root`, or built in."""
    from edgebudget_models.iqa_data import iqa_data

    return iqa_data(split, root)


ENTRY = ZooEntry(
    name=_NAME,
    summary="quality in [0, 1] of a 3840x2160 photograph without a reference, 83.1 GMACs",
    task="regression",
    metric="srcc",
    classes=(),
    input_name="image",
    input_shape=(1, 3, 2160, 3840),
    preprocessing={
        "layout": "NCHW",
        "color": "RGB",
        "range": [0.0, 1.0],
        "mean": [0.0, 0.0, 0.0],
        "std": [1.0, 1.0, 1.0],
        "resize": "none: the whole 3840x2160 picture",
    },
    weights=_WEIGHTS,
    card=f"{_NAME}.md",
    needs_data=False,
    build=build,
    load=load,
    data=data,
)
