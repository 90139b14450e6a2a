"""MobileNetV2, width 1.0, with symmetric padding throughout.

Source: "MobileNetV2: Inverted Residuals and Linear Bottlenecks", Sandler et al., 2018, table 2.
Parameter names follow the checkpoints in common use (features.0.0, ..., classifier.1).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# expansion, channels, repeats, stride of the first
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def conv_bn_relu6(
    channels_in: int, channels: int, kernel: int, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    """A convolution that keeps the size but for its stride, normalised and clipped to 0..6."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU6(),
    )


class InvertedResidual(nn.Module):
    """Expand, filter each channel, project; added to the input where the shapes allow it."""

    def __init__(self, channels_in: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = channels_in * expansion
        layers: list[nn.Module] = []
        if expansion != 1:
            layers.append(conv_bn_relu6(channels_in, hidden, 1))
        layers += [
            conv_bn_relu6(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        ]
        self.conv = nn.Sequential(*layers)
        self.adds = stride == 1 and channels_in == channels

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, channels, H / stride, W / stride]."""
        y: Tensor = self.conv(x)
        return x + y if self.adds else y


def initialise(network: nn.Module) -> None:
    """Random weights as such networks are trained from."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)


class MobileNetV2(nn.Module):
    """Class scores [N, classes] of normalised RGB pictures [N, 3, H, W]; made for 224x224."""

    def __init__(self, classes: int = 10, dropout: float = 0.1) -> None:
        super().__init__()
        features: list[nn.Module] = [conv_bn_relu6(3, 32, 3, 2)]
        channels_in = 32
        for expansion, channels, repeats, stride in STAGES:
            for index in range(repeats):
                step = stride if index == 0 else 1
                features.append(InvertedResidual(channels_in, channels, step, expansion))
                channels_in = channels
        features.append(conv_bn_relu6(channels_in, 1280, 1))
        self.features = nn.Sequential(*features)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(1280, classes))
        initialise(self)

    def forward(self, image: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, classes]."""
        scores: Tensor = self.classifier(torch.flatten(self.pool(self.features(image)), 1))
        return scores
