"""The fast count agrees with the truth, and with arithmetic."""

from __future__ import annotations

import logging
import math
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from edgebudget.count_onnx import count_graph
from edgebudget.count_torch import count_exported
from edgebudget.counter import CountReport
from edgebudget_runtime.errors import UnsupportedError


def exported(module: nn.Module, *example: torch.Tensor) -> torch.export.ExportedProgram:
    with torch.no_grad():
        return torch.export.export(module.eval(), example, strict=False)


def both(module: nn.Module, *example: torch.Tensor) -> tuple[CountReport, CountReport]:
    """The fast count, and the count of the exported file."""
    program = exported(module, *example)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        onnx_program = torch.onnx.export(
            program, (), dynamo=True, external_data=False, verbose=False
        )
    assert onnx_program is not None
    return count_exported(program), count_graph(onnx_program.model_proto)


def randomised(module: nn.Module) -> nn.Module:
    """Trained-like: no two tensors equal, so that the exporter merges none."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return module


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut that subsamples and pads channels (option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.pad, self.stride = outputs - inputs, stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        short = x[:, :, :: self.stride, :: self.stride]
        return torch.relu(y + nn.functional.pad(short, (0, 0, 0, 0, 0, self.pad)))


def resnet(depth: int) -> nn.Sequential:
    layers: list[nn.Module] = [
        nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
    ]  # fmt: skip
    width = 16
    for stage in range(3):
        for block in range((depth - 2) // 6):
            out = 16 << stage
            layers.append(BasicBlock(width, out, 2 if stage and block == 0 else 1))
            width = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def test_resnet20_is_40_551_040_multiply_accumulates() -> None:
    fast, true = both(randomised(resnet(20)), torch.zeros(1, 3, 32, 32))
    stem = 16 * 3 * 9 * 32 * 32
    convolutions = 6 * 16 * 16 * 9 * 1024 + 2 * 3 * 32 * 32 * 9 * 256 + 2 * 3 * 64 * 64 * 9 * 64
    halves = (32 * 16 * 9 * 256) + (64 * 32 * 9 * 64)  # a strided block's first sees half as many
    assert stem + convolutions - halves + 640 == 40_551_040
    assert fast.macs == true.macs == 40_551_040
    # 269,722 of the module, less the batch-norm affines and statistics that folding absorbs.
    channels = 16 * 7 + 32 * 6 + 64 * 6
    assert fast.params == true.params == 269_722 - 2 * channels + channels


class Stack(nn.Module):
    """Convolutions, then linear layers, as drawn by hypothesis."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layers(x)
        return y.flatten(1) @ y.flatten(1).T


@dataclass(frozen=True)
class Drawn:
    module: Stack
    batch: int
    size: int
    channels: int


@st.composite
def stacks(draw: Any) -> Drawn:
    batch, size = draw(st.integers(1, 3)), draw(st.integers(5, 9))
    first = width = draw(st.sampled_from([2, 4, 6]))
    layers: list[nn.Module] = []
    for _ in range(draw(st.integers(1, 3))):
        out, kernel = 2 * draw(st.integers(1, 4)), draw(st.sampled_from([1, 3]))
        group = draw(st.sampled_from([g for g in (1, 2) if width % g == 0 and out % g == 0]))
        bias, transposed = draw(st.booleans()), draw(st.booleans())
        conv = nn.ConvTranspose2d if transposed else nn.Conv2d
        stride = draw(st.sampled_from([1, 2]))
        layers.append(conv(width, out, kernel, stride, kernel // 2, groups=group, bias=bias))
        if draw(st.booleans()):
            layers.append(nn.BatchNorm2d(out))
        layers.append(draw(st.sampled_from([nn.ReLU(), nn.Hardswish(), nn.GELU()])))
        width = out
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3, draw(st.booleans()))]
    return Drawn(Stack(layers), batch, size, first)


def brute_force(drawn: Drawn) -> int:
    """Sum of the textbook formula over layers, sizes found by running them."""
    total, x = 0, torch.zeros(drawn.batch, drawn.channels, drawn.size, drawn.size)
    for layer in drawn.module.layers:
        y = layer(x)
        if isinstance(layer, nn.Conv2d):
            kernel = math.prod(layer.kernel_size)
            total += y.numel() * (layer.in_channels // layer.groups) * kernel
        elif isinstance(layer, nn.ConvTranspose2d):
            kernel = math.prod(layer.kernel_size)
            total += x.numel() * (layer.out_channels // layer.groups) * kernel
        elif isinstance(layer, nn.Linear):
            total += x.numel() * layer.out_features
        x = y
    return total + drawn.batch * drawn.batch * 3


@given(stacks())
@settings(max_examples=12, deadline=None, derandomize=True)
def test_fast_count_equals_the_formula(drawn: Drawn) -> None:
    x = torch.zeros(drawn.batch, drawn.channels, drawn.size, drawn.size)
    assert count_exported(exported(drawn.module, x)).macs == brute_force(drawn)


@given(stacks())
@settings(max_examples=2, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_both_counts_agree_on_random_networks(drawn: Drawn) -> None:
    x = torch.zeros(drawn.batch, drawn.channels, drawn.size, drawn.size)
    fast, true = both(randomised(drawn.module), x)
    assert fast.macs == true.macs == brute_force(drawn)
    assert fast.params == true.params


class Mixed(nn.Module):
    """Recurrence, packed attention, einsum and a constant product that the exporter folds."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 5, 2, bidirectional=True, batch_first=True)
        self.attention = nn.MultiheadAttention(10, 2, batch_first=True)
        self.gru = nn.GRU(10, 4)
        self.table = nn.Buffer(torch.ones(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.lstm(x)[0]
        y = self.gru(self.attention(y, y, y)[0])[0]
        y = y @ (self.table @ self.table)
        return torch.einsum("bij,bkj->bik", y, y)


def test_recurrence_attention_einsum_and_folded_constants() -> None:
    fast, true = both(Mixed(), torch.zeros(2, 3, 6))
    b, t = 2, 3
    lstm = b * t * 2 * 20 * (6 + 5 + 10 + 5)
    attention = b * t * 10 * 40 + 2 * b * 2 * t * t * 5
    gru = b * t * 12 * (10 + 4)
    assert fast.macs == true.macs == lstm + attention + gru + b * t * 16 + b * t * t * 4


class Wrapped(nn.Module):
    """A transformers model reduced to tensors in, tensor out."""

    def __init__(self, model: nn.Module, output: str, **settings: Any) -> None:
        super().__init__()
        self.model, self.output, self.settings = model, output, settings

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = getattr(self.model(x, **self.settings), self.output)
        return found


@pytest.mark.parametrize("kernel", ["sdpa", pytest.param("eager", marks=pytest.mark.slow)])
def test_vision_transformer(kernel: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        image_size=32, patch_size=8, num_labels=5, attn_implementation=kernel,
    )  # fmt: skip
    vit = Wrapped(transformers.ViTForImageClassification(config), "logits")
    fast, true = both(vit, torch.zeros(2, 3, 32, 32))
    n, d, length = 2, 32, 17
    block = length * (4 * d * d + 2 * d * 64) + 2 * length * length * d
    assert fast.macs == true.macs == n * (16 * 3 * 64 * d + 2 * block + 5 * d)


@pytest.mark.parametrize("kernel", ["sdpa", pytest.param("eager", marks=pytest.mark.slow)])
def test_decoder_with_grouped_key_heads(kernel: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        attn_implementation=kernel,
    )  # fmt: skip
    llama = Wrapped(transformers.LlamaForCausalLM(config), "logits", use_cache=False)
    fast, true = both(llama, torch.zeros(1, 12, dtype=torch.long))
    d, length = 32, 12
    block = length * (2 * d * d + 2 * d * 16 + 3 * d * 48) + 2 * length * length * d
    # The rotary table is a product of constants: the exporter stores its result.
    assert fast.macs == true.macs == 2 * block + length * d * 64


def depthwise(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    hidden = 6 * inputs
    return nn.Sequential(
        nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(),
        nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
        nn.BatchNorm2d(hidden), nn.ReLU6(),
        nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs),
    )  # fmt: skip


def test_inverted_residuals() -> None:
    fast, true = both(
        randomised(nn.Sequential(depthwise(8, 12, 2), depthwise(12, 16, 1))),
        torch.zeros(1, 8, 16, 16),
    )
    first = 256 * 8 * 48 + 64 * 48 * 9 + 64 * 48 * 12
    second = 64 * (12 * 72 + 72 * 9 + 72 * 16)
    assert fast.macs == true.macs == first + second
    assert fast.params == true.params


def test_tied_weights_are_stored_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(10, 4)
            self.head = nn.Linear(4, 10, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.head(self.embed(ids))
            return out

    report = count_exported(exported(Tied(), torch.zeros(2, 3, dtype=torch.long)))
    assert (report.params, report.macs) == (40, 6 * 40)


def test_what_no_output_needs_is_not_counted() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(4, 3), nn.Linear(4, 100)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.idle(x)
            y: torch.Tensor = self.used(x)
            y += 1  # written in place
            return y

    report = count_exported(exported(Idle(), torch.zeros(1, 4)))
    assert (report.macs, report.params) == (12, 15)
    assert [x.op for x in report.layers] == ["linear", "add_"]


def test_an_operator_without_a_rule_is_named() -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return torch.linalg.inv(x)

    with pytest.raises(UnsupportedError, match=r"EB214.*inv"):
        count_exported(exported(Odd(), torch.eye(3)))


def test_dynamic_shapes_are_refused() -> None:
    program = torch.export.export(
        nn.Linear(4, 2), (torch.zeros(3, 4),), dynamic_shapes=({0: torch.export.Dim("n")},)
    )
    with pytest.raises(UnsupportedError, match="EB211"):
        count_exported(program)
