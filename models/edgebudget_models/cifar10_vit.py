"""A vision transformer for 32x32 pictures of ten classes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgebudget_models import cifar

if TYPE_CHECKING:
    from edgebudget_models.cifar_vit_net import VisionTransformer


def build() -> VisionTransformer:
    """The network with random weights."""
    from edgebudget_models.cifar_vit_net import VisionTransformer

    return VisionTransformer()


ENTRY = cifar.entry(
    "cifar10-vit",
    "vision transformer (nine layers) for 32x32 pictures of ten classes, 189 MMACs",
    build,
    32,
    kept_back=cifar.KEPT_BACK,
)
