"""Networks, data and contexts for the passes that nest smaller networks in a larger one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from edgebudget import target_registry
from edgebudget.events import ignore
from edgebudget.nested import Nested, Variant
from edgebudget.program import Context, Program, TensorSpec
from edgebudget.tasks import Classification
from edgebudget.train import Caller
from edgebudget.workload import Data, Sample
from edgebudget_models import digits
from edgebudget_models.cifar_resnet_net import CifarResNet
from edgebudget_runtime.budget import Budget

TARGET = target_registry.get("cpu").spec


@dataclass(frozen=True)
class Noise:
    """Random pictures with labels."""

    count: int
    shape: tuple[int, ...] = (3, 32, 32)
    name: str = "noise"

    def __len__(self) -> int:
        return self.count

    def sample(self, index: int) -> Sample:
        draw = np.random.default_rng(index)
        picture = draw.standard_normal(self.shape).astype(np.float32)
        return Sample({"image": picture}, np.asarray(index % 10))

    def digest(self) -> str:
        return repr(self)


@dataclass(frozen=True)
class Digits:
    """The zoo's digits."""

    split: digits.DigitsData
    name: str = "digits"

    def __len__(self) -> int:
        return len(self.split)

    def sample(self, index: int) -> Sample:
        inputs, label = self.split.sample(index)
        return Sample(inputs, label)

    def digest(self) -> str:
        return self.split.digest()


class Chain(nn.Module):
    """Two convolutions without a shortcut, then classes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 16, 3, 1, 1), nn.BatchNorm2d(16)
        self.second, self.linear = nn.Conv2d(16, 16, 3, 2, 1), nn.Linear(16, 10)

    def forward(self, image: Tensor) -> Tensor:
        """[N, 1, H, W] -> [N, 10]."""
        x = torch.relu(self.second(torch.relu(self.norm(self.first(image)))))
        scores: Tensor = self.linear(x.mean((2, 3)))
        return scores


def program(body: nn.Module, shape: tuple[int, ...]) -> Program:
    """A module-stage program with one picture and one answer."""
    return Program("module", body.eval(), (TensorSpec("image", shape),), ("scores",))


def resnet(blocks: int = 1) -> Program:
    """A residual network with drawn weights and statistics."""
    torch.manual_seed(0)
    body = CifarResNet(blocks)
    for m in body.modules():
        if isinstance(m, nn.BatchNorm2d) and m.running_mean is not None:
            nn.init.uniform_(m.running_mean, -0.2, 0.2)
            nn.init.uniform_(m.weight, 0.5, 1.5)
    return program(body, (1, 3, 32, 32))


def vit(layers: int = 3) -> Program:
    """A vision transformer of 4x4 patches on 16x16 pictures."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=16,
        patch_size=4,
        num_labels=10,
    )
    return program(ViTForImageClassification(config), (1, 3, 16, 16))


def context(program: Program, folder: Path, calibration: Any = None, **more: Any) -> Context:
    """A context whose original is the program itself."""
    data = Data(calibration=calibration)
    rng = np.random.default_rng(0)
    base = Context(Budget(), TARGET, Classification(), data, program, 0, rng, folder, ignore)
    return replace(base, **more)


def nested(program: Program) -> Nested:
    """The body, which a pass has made nested."""
    assert isinstance(program.body, Nested)
    return program.body


def answers(program: Program) -> Iterator[tuple[Variant, Tensor, Tensor]]:
    """Every variant with what it answers cut out, and linked to the shared weights."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(2, *program.inputs[0].shape[1:], generator=draw)
    forward, body = Caller.of(program), nested(program)
    for variant in body.variants:
        with torch.no_grad(), body.link(variant).bound() as linked:
            yield variant, forward(body.cut(variant), (x,))[0], forward(linked, (x,))[0]
