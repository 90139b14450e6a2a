"""Folding is exact, finds layers by what forward() does, and gives reasons otherwise."""

from __future__ import annotations

from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgebudget import graph
from edgebudget.export import run_module
from edgebudget.facts import FACTS
from edgebudget.program import Context, PassResult, Program, TensorSpec
from edgebudget_passes import fold_batchnorm


def _program(net: nn.Module, shape: tuple[int, ...] = (2, 3, 8, 8)) -> Program:
    torch.manual_seed(0)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) and m.track_running_stats:
            nn.init.normal_(m.get_buffer("running_mean"))
            nn.init.uniform_(m.get_buffer("running_var"), 0.5, 2)
            if m.affine:
                nn.init.normal_(m.weight)
                nn.init.normal_(m.bias)
    return Program("module", net.eval(), (TensorSpec("x", shape),), ("y",))


def _run(program: Program) -> PassResult:
    values = graph.probe(program.inputs, seed=3)
    expected = run_module(program, values)["y"]
    result = fold_batchnorm.run(program, fold_batchnorm.Config(), cast(Context, None))
    np.testing.assert_allclose(
        run_module(result.program, values)["y"], expected, rtol=1e-4, atol=1e-5
    )
    assert FACTS["batchnorm_folded"](result.program) is None or not result.did
    return result


class Control(nn.Module):
    """Python control flow over shapes, a loop over layers, a norm that is not foldable."""

    def __init__(self) -> None:
        super().__init__()
        self.pre = nn.BatchNorm2d(3)
        self.convs = nn.ModuleList([nn.Conv2d(3, 4, 3, bias=i == 0) for i in range(2)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(4, affine=i == 0) for i in range(2)])
        self.forked = nn.Conv2d(3, 4, 3)
        self.fork_norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, 4, H - 2, W - 2]."""
        if x.shape[0] > 100:
            raise ValueError("too many")
        x = self.pre(x)
        y: Tensor = self.forked(x)
        y = y + self.fork_norm(y)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            y = y + torch.relu(norm(conv(x)))
        return y


def test_any_forward_that_can_be_captured() -> None:
    result = _run(_program(Control()))
    assert [(n.where, n.what) for n in result.did] == [
        ("norms.0", "folded into convs.0"),
        ("norms.1", "folded into convs.1"),
    ]
    why = {n.where: n.why for n in result.declined}
    assert "directly before" in why["pre"]
    assert "used elsewhere" in why["fork_norm"]


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(3, 6, 3, groups=3, padding="same"), (2, 3, 8, 8)),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
        (nn.Linear(5, 6, bias=False), (4, 5)),
    ],
)
def test_layers(layer: nn.Module, shape: tuple[int, ...]) -> None:
    norm = nn.BatchNorm2d(6) if len(shape) == 4 else nn.BatchNorm1d(6)
    result = _run(_program(nn.Sequential(layer, norm), shape))
    assert len(result.did) == 1
    assert not any(isinstance(m, nn.BatchNorm2d) for m in result.program.body.modules())


def test_a_layer_used_twice_is_left_alone() -> None:
    conv = nn.Conv2d(3, 3, 3, padding=1)
    result = _run(_program(nn.Sequential(conv, nn.BatchNorm2d(3), conv, nn.BatchNorm2d(3))))
    assert not result.did
    assert {n.why for n in result.declined} == {"the layer or the norm is used more than once"}


def test_no_statistics_and_no_norms() -> None:
    unknown = nn.BatchNorm2d(4, track_running_stats=False)
    result = _run(_program(nn.Sequential(nn.Conv2d(3, 4, 1), unknown)))
    assert "running statistics" in result.declined[0].why
    assert _run(_program(nn.Conv2d(3, 4, 1))).declined[0].why == "it has no batch norm"


class Reads(nn.Module):
    """Reads the attributes of its norm, which folding takes away."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, 4, H, W]."""
        y: Tensor = self.norm(self.conv(x)) * self.norm.eps
        return y


def test_a_forward_that_breaks_is_left_alone() -> None:
    result = _run(_program(Reads()))
    assert not result.did
    assert "eps" in result.declined[-1].why
