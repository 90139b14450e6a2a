"""Train a teacher for the small CIFAR-10 networks and keep its answers to numbered views.

`python -m edgebudget_models.recipes.cifar_teachers --data DIR --out FILE.npy --seed N`, once a
seed. The network: "Wide Residual Networks", Zagoruyko and Komodakis, 2016.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgebudget_models.cifar import KEPT_BACK
from edgebudget_models.recipes.cifar_views import load_pictures
from edgebudget_models.recipes.distillation import Settings, answer_views, scores, train

SETTINGS = Settings(epochs=80, batch=250, rate=0.1, decay=5e-4)
VIEWS = 64
WIDTH = 6


class WideBlock(nn.Module):
    """Normalise, activate and convolve, twice; added to the input or to its projection."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.project = (
            nn.Conv2d(channels_in, channels, 1, stride, bias=False)
            if channels_in != channels
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, channels, H / stride, W / stride]."""
        y = F.relu(self.bn1(x))
        around: Tensor = x if self.project is None else self.project(y)
        added: Tensor = self.conv2(F.relu(self.bn2(self.conv1(y))))
        return added + around


class WideResNet(nn.Module):
    """16 layers: three stages of two blocks, `width` times 16, 32 and 64 channels."""

    def __init__(self, width: int, classes: int = 10) -> None:
        super().__init__()
        channels = [16, *(width * c for c in (16, 32, 64))]
        blocks: list[nn.Module] = []
        for stage in range(3):
            blocks.append(WideBlock(channels[stage], channels[stage + 1], 1 if stage == 0 else 2))
            blocks.append(WideBlock(channels[stage + 1], channels[stage + 1], 1))
        self.stem = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.blocks = nn.Sequential(*blocks)
        self.bn = nn.BatchNorm2d(channels[-1])
        self.linear = nn.Linear(channels[-1], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, image: Tensor) -> Tensor:
        """[N, 3, 32, 32], normalised RGB, -> class scores [N, classes]."""
        x = F.relu(self.bn(self.blocks(self.stem(image))))
        answers: Tensor = self.linear(x.mean((2, 3)))
        return answers


def main() -> None:
    """The command line of the recipe."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="root/{train,test}/<class>/*.jpg")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--epochs", type=int, default=SETTINGS.epochs)
    parser.add_argument("--views", type=int, default=VIEWS)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    pictures = load_pictures(arguments.data, "train", KEPT_BACK, device)
    torch.manual_seed(arguments.seed)
    model = WideResNet(WIDTH).to(device)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    train(model, pictures, replace(SETTINGS, epochs=arguments.epochs), arguments.seed)
    held = load_pictures(arguments.data, "calibration", KEPT_BACK, device)
    right = (scores(model, held.pixels)[-1].argmax(1) == held.labels).float().mean().item()
    sys.stderr.write(f"teacher {arguments.seed}: {right:.4f} of the pictures kept back\n")
    aside = arguments.out.with_name(arguments.out.name + ".part")
    with aside.open("wb") as file:
        np.save(file, answer_views(model, pictures, arguments.views), allow_pickle=False)
    aside.replace(arguments.out)


if __name__ == "__main__":
    main()
