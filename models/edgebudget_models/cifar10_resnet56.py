"""ResNet-56 for 32x32 pictures of ten classes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgebudget_models import cifar

if TYPE_CHECKING:
    from edgebudget_models.cifar_resnet_net import CifarResNet


def build() -> CifarResNet:
    """The network with random weights."""
    from edgebudget_models.cifar_resnet_net import CifarResNet

    return CifarResNet(blocks=9)


ENTRY = cifar.entry(
    "cifar10-resnet56", "ResNet-56 for 32x32 pictures of ten classes, 125.5 MMACs", build, 32
)
