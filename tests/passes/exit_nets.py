"""Small networks and data for the tests of early exits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgebudget import graph, target_registry
from edgebudget.events import ignore
from edgebudget.export import run_module
from edgebudget.program import Context, PassResult, Program, TensorSpec
from edgebudget.tasks import Classification
from edgebudget.train import Caller, load_tensors
from edgebudget.workload import Data, Dataset, Sample, Task
from edgebudget_models import digits
from edgebudget_passes import insert_exits
from edgebudget_passes.insert_exits import Config
from edgebudget_runtime.budget import Budget

TARGET = target_registry.get("cpu").spec
QUICK = Config(samples=96, fit_steps=30, steps=6, batch=16, augment="none")


@dataclass(frozen=True)
class Noise:
    """Samples without labels for any inputs, drawn by number."""

    inputs: tuple[TensorSpec, ...]
    count: int = 80
    name: str = "noise"

    def __len__(self) -> int:
        return self.count

    def sample(self, index: int) -> Sample:
        values = graph.probe(self.inputs, seed=index)
        return Sample({k: v[0] for k, v in values.items()}, None)

    def digest(self) -> str:
        return repr(self)


@dataclass(frozen=True)
class Digits:
    """The zoo's digits, labels included; the first `count` of them."""

    count: int = 400
    numbers: bool = False  # the label is a number in [0, 1]
    name: str = "digits"

    def __len__(self) -> int:
        return self.count

    def sample(self, index: int) -> Sample:
        inputs, label = train_split().sample(index)
        assert label is not None
        return Sample(inputs, np.asarray(label / 9, np.float32) if self.numbers else label)

    def digest(self) -> str:
        return repr(self)


@cache
def train_split() -> Any:
    return digits.data("train")


@dataclass(frozen=True)
class Marked:
    """Noise with a mark that is the class: a bright band of a picture, or one telling word."""

    words: bool = False
    count: int = 200
    name: str = "marked"

    def __len__(self) -> int:
        return self.count

    def sample(self, index: int) -> Sample:
        draw, label = np.random.default_rng(index), index % 4
        if self.words:
            words = draw.integers(1, 20, 12)
            words[draw.integers(1, 12)] = 30 + label
            mask = np.ones(12, np.int64)
            return Sample({"input_ids": words, "attention_mask": mask}, np.asarray(label))
        picture = 0.3 * draw.standard_normal((3, 16, 16)).astype(np.float32)
        picture[:, 4 * label : 4 * label + 4] += 1.0
        return Sample({"pixel_values": picture}, np.asarray(label))

    def digest(self) -> str:
        return repr(self)


def taught(program: Program, data: Dataset, steps: int, lr: float = 3e-3) -> Program:
    """The program, trained a little on labels."""
    seen = load_tensors(data, [s.name for s in program.inputs])
    assert seen.labels is not None
    optimizer = torch.optim.AdamW(program.body.parameters(), lr=lr)
    forward = Caller.of(program)
    program.body.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for step in range(steps):
            part = seen.take(torch.arange(32 * step, 32 * step + 32) % len(seen))
            assert part.labels is not None
            loss = F.cross_entropy(forward(program.body, part.inputs)[0], part.labels)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
    program.body.eval()
    return program


def digits_program() -> Program:
    return Program(
        "module", digits.load().eval(), (TensorSpec("image", (1, 1, 8, 8)),), ("scores",)
    )


def program_of(body: nn.Module, *inputs: TensorSpec) -> Program:
    return Program("module", body.eval(), inputs, ("y",))


def context(folder: Path, program: Program, data: Dataset, task: Task, **more: Any) -> Context:
    base = Context(
        Budget(),
        TARGET,
        task,
        Data(train=data),
        program,
        7,
        np.random.default_rng(7),
        folder,
        ignore,
    )
    return replace(base, **more)


def on_digits(folder: Path, config: Config, **more: Any) -> tuple[Program, PassResult]:
    program = digits_program()
    ctx = context(folder, program, Digits(), Classification(), **more)
    return program, insert_exits.run(program, config, ctx)


def answers(program: Program, count: int = 3) -> dict[str, Any]:
    specs = [replace(s, shape=(count, *s.shape[1:])) for s in program.inputs]
    return run_module(program, graph.probe(specs, seed=1))


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


class Residual(nn.Module):
    """Conv, normalisation, ReLU, and a shortcut."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(after)
        self.short = nn.Conv2d(before, after, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)) + self.short(x))


def residual_net(answers: int = 10) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        Residual(1, 8, 1),
        Residual(8, 8, 1),
        Residual(8, 16, 2),
        Residual(16, 16, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, answers),
    )


def plain_net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(inplace=True),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


def tiny_vit() -> Program:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=16,
        patch_size=4,
        num_labels=4,
    )
    return program_of(
        transformers.ViTForImageClassification(config), TensorSpec("pixel_values", (1, 3, 16, 16))
    )


def tiny_bert() -> Program:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    config = transformers.BertConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
        vocab_size=40,
        num_labels=4,
        max_position_embeddings=16,
    )
    inputs = (
        TensorSpec("input_ids", (1, 12), "int64"),
        TensorSpec("attention_mask", (1, 12), "int64"),
    )
    return program_of(transformers.BertForSequenceClassification(config), *inputs)
