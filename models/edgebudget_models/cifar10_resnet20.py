"""ResNet-20 for 32x32 pictures of ten classes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edgebudget_models import cifar
from edgebudget_models.entry import PACKAGE, Split, ZooData, ZooEntry

if TYPE_CHECKING:
    from edgebudget_models.cifar_resnet_net import CifarResNet

_NAME = "cifar10-resnet20"
_WEIGHTS = f"{_NAME}.safetensors"


def build() -> CifarResNet:
    """The network with random weights."""
    from edgebudget_models.cifar_resnet_net import CifarResNet

    return CifarResNet(blocks=3)


def load(weights: Path | None = None) -> CifarResNet:
    """The network with the packaged weights, or with those of a safetensors file."""
    from edgebudget_models.checkpoint import load_into

    return load_into(build(), weights or PACKAGE / "weights" / _WEIGHTS)


def data(split: Split, root: Path | None = None) -> ZooData:
    """CIFAR-10 as a folder of pictures."""
    return cifar.folder_data(split, root, 32, _NAME)


ENTRY = ZooEntry(
    name=_NAME,
    summary="ResNet-20 for 32x32 pictures of ten classes, 40.6 MMACs",
    task="classification",
    metric="top1",
    classes=cifar.CLASSES,
    input_name="image",
    input_shape=(1, 3, 32, 32),
    preprocessing=cifar.describe(32),
    weights=_WEIGHTS,
    card=f"{_NAME}.md",
    needs_data=True,
    build=build,
    load=load,
    data=data,
)
