"""The network runs on a smaller picture where its shapes allow, and says why where not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgebudget import graph, target_registry
from edgebudget.counter import count
from edgebudget.export import run_module, to_graph
from edgebudget.program import Context, PassResult, Program, TensorSpec
from edgebudget.scaled_input import ScaledInput, shrink
from edgebudget_passes import scale_resolution
from edgebudget_passes.scale_resolution import Config, feasible_scales


class Net(nn.Module):
    """Convolutions, a global mean, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 2, 1)
        self.head = nn.Linear(8, 2)

    def forward(self, image: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, 2]."""
        scores: Tensor = self.head(torch.relu(self.conv(image)).mean((2, 3)))
        return scores


class Flat(nn.Module):
    """A linear layer over all pixels: one size only."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 64 * 64, 2)

    def forward(self, image: Tensor) -> Tensor:
        """[N, 3, 64, 64] -> [N, 2]."""
        scores: Tensor = self.head(image.flatten(1))
        return scores


class Skip(nn.Module):
    """Down and up again: sizes must be multiples of 16 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 4, 3, 16, 1), nn.ConvTranspose2d(4, 3, 16, 16)

    def forward(self, image: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, 3, 1, 1]."""
        y: Tensor = image + self.up(self.down(image))
        return y.mean((2, 3), keepdim=True)


def _program(net: nn.Module, shape: tuple[int, ...] = (1, 3, 64, 96)) -> Program:
    torch.manual_seed(0)
    return Program("module", net.eval(), (TensorSpec("image", shape),), ("y",))


def _context(target: str = "cpu") -> Context:
    return cast("Context", SimpleNamespace(target=target_registry.get(target).spec))


def _run(program: Program, config: Config) -> PassResult:
    result = scale_resolution.run(program, config, _context())
    assert bool(result.did) != bool(result.declined)
    return result


def test_the_outer_shape_stays_and_the_cost_falls() -> None:
    program = _program(Net())
    result = _run(program, Config(scale=0.5))
    assert "64x96 is shrunk to 32x48" in result.did[0].what
    assert result.program.inputs == program.inputs
    made = to_graph(result.program)
    before, after = count(program), count(made)
    conv = 8 * 27
    assert before.macs == conv * 32 * 48 + 16
    assert after.macs == count(result.program).macs == conv * 16 * 24 + 16
    assert after.other_ops > 0
    values = graph.probe(program.inputs)
    small = F.avg_pool2d(torch.from_numpy(values["image"]), 2)
    with torch.inference_mode():
        expected = program.body(small).numpy()
    np.testing.assert_allclose(graph.run(made.body, values)["y"], expected, rtol=1e-4, atol=1e-5)


def test_resizing_is_one_node_in_the_form_that_the_npu_takes() -> None:
    made = to_graph(_run(_program(Net()), Config(scale=0.75)).program)
    (resize,) = (n for n in made.body.graph.node if n.op_type == "Resize")
    attributes = graph.attributes(resize)
    assert attributes["mode"] == b"linear"
    assert attributes["coordinate_transformation_mode"] in (b"half_pixel", b"pytorch_half_pixel")
    assert not attributes.get("antialias", 0)


@pytest.mark.parametrize(
    ("config", "size"),
    [
        (Config(scale=0.6), (40, 56)),
        (Config(scale=0.6, multiple=32), (32, 64)),
        (Config(height=40, width=60, multiple=4), (40, 60)),
        (Config(scale=0.01), (8, 8)),
    ],
)
def test_sizes_are_multiples(config: Config, size: tuple[int, int]) -> None:
    body = _run(_program(Net()), config).program.body
    assert isinstance(body, ScaledInput)
    assert body.inner == size


@pytest.mark.parametrize(
    ("net", "config", "why"),
    [
        (Net(), Config(scale=1.0), "not smaller"),
        (Net(), Config(scale=0.99), "not smaller"),
        (Flat(), Config(scale=0.5), "must have same reduction dim"),
        (nn.Conv2d(3, 4, 3), Config(scale=0.5), "output 'y' would be 1x4x30x30"),
        (Skip(), Config(scale=0.625), "broadcast"),
    ],
)
def test_what_cannot_shrink_is_declined(
    net: nn.Module, config: Config, why: str, capfd: pytest.CaptureFixture[str]
) -> None:
    program = _program(net, (1, 3, 64, 64))
    result = _run(program, config)
    assert why in result.declined[0].why
    assert result.program is program
    assert capfd.readouterr() == ("", "")


def test_inputs_that_are_no_picture_are_declined() -> None:
    result = _run(_program(nn.Linear(4, 2), (1, 4)), Config(scale=0.5))
    assert "picture" in result.declined[0].why
    assert feasible_scales(_program(nn.Linear(4, 2), (1, 4))) == ()


def test_feasible_scales_are_those_that_run() -> None:
    assert feasible_scales(_program(Flat(), (1, 3, 64, 64))) == ()
    assert feasible_scales(_program(Skip(), (1, 3, 64, 64))) == (0.75, 0.5, 0.25)
    program = _program(Net())
    scales = feasible_scales(program)
    assert list(scales) == sorted(scales, reverse=True)
    assert len(scales) == 7
    for scale in scales[::3]:
        body = _run(program, Config(scale=scale)).program.body
        h, w = body.inner
        assert h * w / (64 * 96) == pytest.approx(scale**2)


def test_a_target_without_bilinear_resizing_averages_blocks() -> None:
    ctx = _context("npu:ethos-u85-256")
    program = _program(Skip(), (1, 3, 64, 64))
    assert feasible_scales(program, ctx.target) == (0.5, 0.25)
    declined = scale_resolution.run(program, Config(scale=0.75), ctx)
    assert "64x64 to 48x48" in declined.declined[0].why
    assert declined.program is program
    half = scale_resolution.run(program, Config(scale=0.5), ctx).program
    assert half.body.inner == (32, 32)
    large = _program(Net(), (1, 3, 224, 224))  # 112 and 56 are no multiples of 32
    assert feasible_scales(large, ctx.target) == pytest.approx((1 / 2, 1 / 4, 1 / 7))
    assert scale_resolution.run(large, Config(scale=0.25), ctx).program.body.inner == (56, 56)
    small = _context("npu:ethos-u55-128").target  # strides of its convolutions end at 3
    assert feasible_scales(large, small) == (0.5,)


def test_scaling_twice_scales_the_network_once() -> None:
    once = _run(_program(Net()), Config(scale=0.75)).program
    twice = _run(once, Config(scale=0.5)).program
    assert isinstance(twice.body, ScaledInput)
    assert twice.body.inner == (32, 48)
    assert isinstance(twice.body.network, Net)


def test_training_crops_shrink_in_the_same_proportion() -> None:
    body = _run(_program(Net(), (1, 3, 256, 256)), Config(scale=0.5)).program.body
    seen: list[tuple[int, ...]] = []
    body.network.register_forward_pre_hook(lambda m, a: seen.append(tuple(a[0].shape)))
    body(torch.zeros(2, 3, 128, 192))
    assert seen == [(2, 3, 64, 96)]


def test_shrinking_keeps_means_and_straight_lines() -> None:
    ramp = torch.arange(96.0).expand(1, 1, 64, 96)
    for size in ((32, 48), (24, 40), (20, 30)):
        small = shrink(ramp, size)
        assert small.shape[2:] == size
        assert float((small[..., 1:-1].diff() - 96 / size[1]).abs().max()) < 1e-3
        assert float(small.mean()) == pytest.approx(47.5, rel=0.02)


def test_named_inputs_reach_the_network_by_name() -> None:
    class Two(nn.Module):
        def forward(self, bias: Tensor, image: Tensor) -> Tensor:
            return image.mean((2, 3)) + bias

    specs = (TensorSpec("image", (1, 3, 64, 64)), TensorSpec("bias", (1, 3)))
    program = Program("module", Two().eval(), specs, ("y",))
    result = _run(program, Config(scale=0.5))
    values = {"image": np.ones((1, 3, 64, 64), np.float32), "bias": np.full((1, 3), 2, np.float32)}
    assert float(run_module(result.program, values)["y"][0, 0]) == 3
