"""ResNet-56 for 32x32 pictures with early exits beside it.

The body is `cifar_resnet_net.CifarResNet`, parameter names included. Beside it runs a ladder of
coarse features: at each tap a rung shrinks the body's features to 16x16 and 8x8 pixels and adds
what the rungs before have found there, so a later exit builds on the work of the earlier ones.
Carrying coarse features along for the exits: "Multi-Scale Dense Networks for Resource Efficient
Image Classification", Huang et al., 2018.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgebudget_models.cifar_ladder import Laddered
from edgebudget_models.cifar_resnet_net import Block, CifarResNet

BLOCKS = 9  # of each stage of the body
STAGES = (16, 32, 64)  # channels at 32x32, 16x16 and 8x8 pixels


@dataclass(frozen=True, slots=True)
class Tap:
    """An exit after the body's block `after` (from 1): blocks of its rung at 16x16 and 8x8."""

    after: int
    middle: int
    coarse: int


TAPS = (Tap(1, 1, 2), Tap(3, 1, 1))


class Shrink(nn.Module):
    """A 3x3 convolution to half the size, to which earlier features of that size are added."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels, 3, 2, 1, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor, earlier: Tensor | None) -> Tensor:
        """[N, C, H, W] -> [N, channels, H / 2, W / 2]."""
        y: Tensor = self.bn(self.conv(x))
        return F.relu(y if earlier is None else y + earlier)


class Rung(nn.Module):
    """From the body's features to a coarser set of its own, and scores from the coarsest."""

    def __init__(self, tap: Tap, classes: int) -> None:
        super().__init__()
        _, middle, coarse = STAGES
        self.from_fine = tap.after <= BLOCKS
        if self.from_fine:
            self.shrink1 = Shrink(STAGES[0], middle)
            self.middle = _blocks(middle, tap.middle)
        self.shrink2 = Shrink(middle, coarse)
        self.coarse = _blocks(coarse, tap.coarse)
        self.linear = nn.Linear(coarse, classes)

    def forward(
        self, x: Tensor, middle: Tensor | None, coarse: Tensor | None
    ) -> tuple[Tensor | None, Tensor]:
        """The rung's features at 16x16 (none once the body is that coarse) and 8x8 pixels."""
        if not self.from_fine:
            return None, self.coarse(self.shrink2(x, coarse))
        here: Tensor = self.middle(self.shrink1(x, middle))
        return here, self.coarse(self.shrink2(here, coarse))


class ElasticResNet(Laddered):
    """The body of ResNet-56, an exit at each tap, and a last answer from body and ladder."""

    def __init__(self, taps: tuple[Tap, ...] = TAPS, classes: int = 10) -> None:
        super().__init__()
        body = CifarResNet(BLOCKS, classes)
        self.conv1, self.bn1 = body.conv1, body.bn1
        self.layer1, self.layer2, self.layer3 = body.layer1, body.layer2, body.layer3
        self.taps = taps
        self.rungs = nn.ModuleList(Rung(tap, classes) for tap in taps)
        self.linear = nn.Linear(2 * STAGES[-1], classes)
        for module in self.rungs.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """[N, 3, 32, 32], normalised RGB, -> class scores [N, classes] of every exit in depth
        order, the last from the whole network."""
        answers, x, coarse = self.early(image)
        both = torch.cat((self.pooled(self.late(x)), self.pooled(coarse)), 1)
        return (*answers, self.linear(both))

    def early(self, image: Tensor) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """All exits but the last; the features of the body and of the ladder at the last tap."""
        x = F.relu(self.bn1(self.conv1(image)))
        blocks, start = self._body(), 0
        middle: Tensor | None = None
        coarse: Tensor | None = None
        answers: list[Tensor] = []
        for tap, rung in zip(self.taps, self._ladder(), strict=True):
            for block in blocks[start : tap.after]:
                x = block(x)
            middle, coarse = rung(x, middle, coarse)
            answers.append(rung.linear(self.pooled(coarse)))
            start = tap.after
        assert coarse is not None
        return tuple(answers), x, coarse

    def late(self, x: Tensor) -> Tensor:
        """The body's last features [N, 64, 8, 8] from those at the last tap."""
        for block in self._body()[self.taps[-1].after :]:
            x = block(x)
        return x

    def last_exit(self) -> nn.Linear:
        """The head of the last exit."""
        return self._ladder()[-1].linear

    def _ladder(self) -> list[Rung]:
        return [rung for rung in self.rungs if isinstance(rung, Rung)]

    def _body(self) -> list[nn.Module]:
        return [*self.layer1, *self.layer2, *self.layer3]


def _blocks(channels: int, count: int) -> nn.Sequential:
    return nn.Sequential(*(Block(channels, channels, 1) for _ in range(count)))
