"""MobileNetV2 1.0 at 224x224, ten classes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edgebudget_models import cifar
from edgebudget_models.entry import PACKAGE, Split, ZooData, ZooEntry

if TYPE_CHECKING:
    from edgebudget_models.mobilenet_v2_net import MobileNetV2

_NAME = "mobilenet-v2"
_WEIGHTS = f"{_NAME}.safetensors"


def build() -> MobileNetV2:
    """The network with random weights."""
    from edgebudget_models.mobilenet_v2_net import MobileNetV2

    return MobileNetV2(classes=len(cifar.CLASSES))


def load(weights: Path | None = None) -> MobileNetV2:
    """The network with the packaged weights, or with those of a safetensors file."""
    from edgebudget_models.checkpoint import load_into

    return load_into(build(), weights or PACKAGE / "weights" / _WEIGHTS)


def data(split: Split, root: Path | None = None) -> ZooData:
    """A folder of pictures, brought to 224x224."""
    return cifar.folder_data(split, root, 224, _NAME)


ENTRY = ZooEntry(
    name=_NAME,
    summary="MobileNetV2 1.0 at 224x224, ten classes, 299.5 MMACs",
    task="classification",
    metric="top1",
    classes=cifar.CLASSES,
    input_name="image",
    input_shape=(1, 3, 224, 224),
    preprocessing=cifar.describe(224),
    weights=_WEIGHTS,
    card=f"{_NAME}.md",
    needs_data=True,
    build=build,
    load=load,
    data=data,
)
