"""ResNet-56 with early exits for 32x32 pictures of ten classes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgebudget_models import cifar

if TYPE_CHECKING:
    from edgebudget_models.cifar_elastic_net import ElasticResNet


def build() -> ElasticResNet:
    """The network with random weights."""
    from edgebudget_models.cifar_elastic_net import ElasticResNet

    return ElasticResNet()


ENTRY = cifar.entry(
    "cifar10-resnet56-elastic",
    "ResNet-56 with early exits for 32x32 pictures of ten classes, 22 to 154 MMACs",
    build,
    32,
    outputs=("scores.exit1", "scores.exit2", "scores"),
    kept_back=cifar.KEPT_BACK,
)
