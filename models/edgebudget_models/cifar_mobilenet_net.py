"""MobileNetV2 for 32x32 pictures, and the same with early exits beside it.

The body is that of `mobilenet_v2_net` without its first two strides and its last stage, and with
a narrower last convolution. Beside it runs a ladder: at each tap a rung brings the body's features
to 4x4 pixels and adds what the rung before has found there, so a later exit builds on the work of
the earlier one. Carrying coarse features along for the exits: "Multi-Scale Dense Networks for
Resource Efficient Image Classification", Huang et al., 2018.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgebudget_models.cifar_ladder import Laddered
from edgebudget_models.mobilenet_v2_net import (
    STAGES,
    InvertedResidual,
    conv_bn_relu6,
    initialise,
)

_STRIDES = (1, 1, 2, 2, 1, 2)  # of the stages; the stem has 1
_STEM = 32
LAST = 640  # channels that the body's answer is made of
_EXPANSION = 6
_COARSE = 128  # channels of the ladder at 4x4 pixels
_HALVES = {32: (32, 64, _COARSE), 16: (64, _COARSE), 8: (_COARSE,)}  # by pixels a side at the tap
EXIT = 256  # channels that an exit's answer is made of
TAPS = (5, 8)  # exits after so many of the body's parts


def parts() -> tuple[nn.Sequential, list[tuple[int, int]]]:
    """The body's parts, and channels and pixels a side after each of them."""
    made: list[nn.Module] = [conv_bn_relu6(3, _STEM, 3)]
    channels_in, side = _STEM, 32
    shapes = [(channels_in, side)]
    for (expansion, channels, repeats, _), stride in zip(STAGES[:-1], _STRIDES, strict=True):
        for index in range(repeats):
            step = stride if index == 0 else 1
            made.append(InvertedResidual(channels_in, channels, step, expansion))
            channels_in, side = channels, side // step
            shapes.append((channels, side))
    made.append(conv_bn_relu6(channels_in, LAST, 1))
    return nn.Sequential(*made), [*shapes, (LAST, side)]


class CifarMobileNet(nn.Module):
    """The body and its answer."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.features, _ = parts()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(LAST, classes)
        initialise(self)

    def forward(self, image: Tensor) -> Tensor:
        """[N, 3, 32, 32], normalised RGB, -> class scores [N, classes]."""
        scores: Tensor = self.linear(torch.flatten(self.pool(self.features(image)), 1))
        return scores


class Rung(nn.Module):
    """From the body's features to coarse ones, with those of the rung before added; and scores."""

    def __init__(self, channels: int, side: int, classes: int) -> None:
        super().__init__()
        halves: list[nn.Module] = []
        for wide in _HALVES[side]:
            halves.append(InvertedResidual(channels, wide, 2, _EXPANSION))
            channels = wide
        self.shrink = nn.Sequential(*halves)
        self.refine = InvertedResidual(_COARSE, _COARSE, 1, _EXPANSION)
        self.head = conv_bn_relu6(_COARSE, EXIT, 1)
        self.linear = nn.Linear(EXIT, classes)

    def forward(self, x: Tensor, earlier: Tensor | None) -> tuple[Tensor, Tensor]:
        """Coarse features [N, 128, 4, 4] and those of the answer [N, 256, 4, 4]."""
        coarse: Tensor = self.shrink(x)
        coarse = self.refine(coarse if earlier is None else coarse + earlier)
        return coarse, self.head(coarse)


class ElasticMobileNet(Laddered):
    """The body, an exit at each tap, and a last answer from body and ladder."""

    def __init__(self, taps: tuple[int, ...] = TAPS, classes: int = 10) -> None:
        super().__init__()
        self.features, shapes = parts()
        self.taps = taps
        self.rungs = nn.ModuleList(Rung(*shapes[tap - 1], classes) for tap in taps)
        self.linear = nn.Linear(LAST + EXIT, classes)
        initialise(self)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """[N, 3, 32, 32], normalised RGB, -> class scores [N, classes] of every exit in depth
        order, the last from the whole network."""
        answers, x, seen = self.early(image)
        return (*answers, self.linear(torch.cat((self.pooled(self.late(x)), seen), 1)))

    def early(self, image: Tensor) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """All exits but the last; the body's features at the last tap, and [N, 256] of its exit."""
        x, start = image, 0
        coarse: Tensor | None = None
        answers: list[Tensor] = []
        for tap, rung in zip(self.taps, self._ladder(), strict=True):
            x = self.features[start:tap](x)
            coarse, found = rung(x, coarse)
            seen = self.pooled(found)
            answers.append(rung.linear(seen))
            start = tap
        return tuple(answers), x, seen

    def late(self, x: Tensor) -> Tensor:
        """The body's last features [N, 640, 4, 4] from those at the last tap."""
        features: Tensor = self.features[self.taps[-1] :](x)
        return features

    def last_exit(self) -> nn.Linear:
        """The head of the last exit."""
        return self._ladder()[-1].linear

    def _ladder(self) -> list[Rung]:
        return [rung for rung in self.rungs if isinstance(rung, Rung)]
