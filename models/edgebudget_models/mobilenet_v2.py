"""MobileNetV2 1.0 at 224x224, ten classes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgebudget_models import cifar

if TYPE_CHECKING:
    from edgebudget_models.mobilenet_v2_net import MobileNetV2


def build() -> MobileNetV2:
    """The network with random weights."""
    from edgebudget_models.mobilenet_v2_net import MobileNetV2

    return MobileNetV2(classes=len(cifar.CLASSES))


ENTRY = cifar.entry(
    "mobilenet-v2", "MobileNetV2 1.0 at 224x224, ten classes, 299.5 MMACs", build, 224
)
