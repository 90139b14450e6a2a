"""The network of `uhd-iqa`: a residual network over a whole 3840x2160 picture.

Only what an integer NPU does well: convolutions with channels in multiples of 32, batch
normalisation, ReLU6, additions, one global average and one linear layer. ReLU6 rather than ReLU:
strong noise drives unbounded activations fifty standard deviations high, which eight bits cannot
hold together with what the score of a good picture hangs on. The shrinking of the
picture is a convolution of the network (4x4 patches), so its cost is counted like any other.

Source: residual blocks from "Deep Residual Learning for Image Recognition", He et al., 2015;
patch stem from "An Image is Worth 16x16 Words", Dosovitskiy et al., 2020; ReLU6 from
"MobileNetV2", Sandler et al., 2018.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

_TO_YCC = ((0.299, 0.587, 0.114), (-0.169, -0.331, 0.5), (0.5, -0.419, -0.081))
WIDTHS = (32, 64, 128, 192)
DEPTHS = (2, 3, 3, 2)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (a 1x1 convolution where the size changes)."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU6()
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )
        self.relu2 = nn.ReLU6()

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, channels, ceil(H / stride), ceil(W / stride)]."""
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        z: Tensor = self.relu2(y + self.shortcut(x))
        return z


def _detail_filters(count: int) -> Tensor:
    """[count, 3, 4, 4]: cosine patterns from coarse to fine, grey ones first, then colour."""
    k = torch.arange(4.0)
    cosines = torch.cos(math.pi / 4 * (k[None, :] + 0.5) * k[:, None])
    patterns = sorted(((i, j) for i in range(4) for j in range(4)), key=lambda ij: (sum(ij), ij))
    colours = torch.tensor(_TO_YCC)
    pairs = [(0, p) for p in patterns] + [(c, p) for p in patterns for c in (1, 2)]
    filters = [
        colours[c][:, None, None] * torch.outer(cosines[i], cosines[j]) for c, (i, j) in pairs
    ]
    return torch.stack([math.sqrt(2) * f / f.norm() for f in filters[:count]])


class UhdIqa(nn.Module):
    """Quality in [0, 1] of RGB pictures [N, 3, H, W] in [0, 1]; made for 2160x3840.

    Fully convolutional up to the average: any height and width from 64 up work.
    """

    def __init__(self) -> None:
        super().__init__()
        patches = nn.Conv2d(3, WIDTHS[0], 4, 4, bias=False)
        self.stem = nn.Sequential(patches, nn.BatchNorm2d(WIDTHS[0]), nn.ReLU6())
        blocks: list[nn.Module] = []
        channels_in = WIDTHS[0]
        for stage, (channels, depth) in enumerate(zip(WIDTHS, DEPTHS, strict=True)):
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(ResidualBlock(channels_in, channels, stride))
                channels_in = channels
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels_in, 1)
        self._initialise(patches)

    def _initialise(self, patches: nn.Conv2d) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, ResidualBlock):
                nn.init.zeros_(module.bn2.weight)  # start as the shortcut alone
        # Neighbouring pixels of a large picture are nearly equal: random filters would all see
        # the local mean, and next to nothing of the detail that quality is made of.
        with torch.no_grad():
            patches.weight.copy_(_detail_filters(WIDTHS[0]))

    def forward(self, image: Tensor) -> Tensor:
        """[N, 3, H, W] -> quality [N, 1]."""
        x: Tensor = self.blocks(self.stem(image))
        score: Tensor = self.head(torch.flatten(self.pool(x), 1))
        return torch.sigmoid(score)
