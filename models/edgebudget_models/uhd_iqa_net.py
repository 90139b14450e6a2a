"""The network of `uhd-iqa`: a residual network over a whole 3840x2160 picture.

Only what an integer NPU does well: convolutions with channels in multiples of 32, batch
normalisation, ReLU, additions, one global average and one linear layer. The shrinking of the
picture is a convolution of the network (4x4 patches), so its cost is counted like any other.

Source: residual blocks from "Deep Residual Learning for Image Recognition", He et al., 2015;
patch stem from "An Image is Worth 16x16 Words", Dosovitskiy et al., 2020.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDTHS = (32, 64, 128, 192)
DEPTHS = (2, 3, 3, 2)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (a 1x1 convolution where the size changes)."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, channels, ceil(H / stride), ceil(W / stride)]."""
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        z: Tensor = self.relu2(y + self.shortcut(x))
        return z


class UhdIqa(nn.Module):
    """Quality in [0, 1] of RGB pictures [N, 3, H, W] in [0, 1]; made for 2160x3840.

    Fully convolutional up to the average: any height and width from 64 up work.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, WIDTHS[0], 4, 4, bias=False), nn.BatchNorm2d(WIDTHS[0]), nn.ReLU()
        )
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
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, image: Tensor) -> Tensor:
        """[N, 3, H, W] -> quality [N, 1]."""
        x: Tensor = self.blocks(self.stem(image))
        score: Tensor = self.head(torch.flatten(self.pool(x), 1))
        return torch.sigmoid(score)
