"""A small residual network for the 8x8 handwritten digits."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def _conv_bn(channels_in: int, channels: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False), nn.BatchNorm2d(channels)
    )


class DigitsNet(nn.Module):
    """Class scores [N, 10] of grey pictures [N, 1, 8, 8] in [0, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv_bn(1, 16)
        self.down = _conv_bn(16, 32, stride=2)
        self.first = _conv_bn(32, 32)
        self.second = _conv_bn(32, 32)
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(32, 10)

    def forward(self, image: Tensor) -> Tensor:
        """[N, 1, 8, 8] -> [N, 10]."""
        x = self.relu(self.down(self.relu(self.stem(image))))
        x = self.relu(x + self.second(self.relu(self.first(x))))
        scores: Tensor = self.linear(torch.flatten(self.pool(x), 1))
        return scores
