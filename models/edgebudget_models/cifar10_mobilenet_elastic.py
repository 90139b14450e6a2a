"""MobileNetV2 with early exits for 32x32 pictures of ten classes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgebudget_models import cifar

if TYPE_CHECKING:
    from edgebudget_models.cifar_mobilenet_net import ElasticMobileNet


def build() -> ElasticMobileNet:
    """The network with random weights."""
    from edgebudget_models.cifar_mobilenet_net import ElasticMobileNet

    return ElasticMobileNet()


ENTRY = cifar.entry(
    "cifar10-mobilenet-elastic",
    "MobileNetV2 with early exits for 32x32 pictures of ten classes, 29 to 90 MMACs",
    build,
    32,
    outputs=("scores.exit1", "scores.exit2", "scores"),
    kept_back=cifar.KEPT_BACK,
)
