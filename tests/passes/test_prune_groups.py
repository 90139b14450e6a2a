"""Groups are only those that can be proven, and cutting them equals silencing them."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from edgebudget.batchnorm import refresh
from edgebudget.train import Caller
from edgebudget_models.cifar_resnet_net import CifarResNet
from edgebudget_models.mobilenet_v2_net import MobileNetV2
from edgebudget_passes._allocate import Ladder, monotone, solve, step_of, widths_of
from edgebudget_passes._channel_groups import find_groups, removal
from edgebudget_passes._slicing import remove_channels, zero_inputs
from edgebudget_passes._width_costs import width_macs

CALL = Caller(("x",), ("y",))


class Concat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(3, 24, 1)
        self.join = nn.Conv2d(40, 16, 1)
        self.head = nn.Linear(16 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([F.relu(self.a(x)), F.relu(self.b(x))], 1)
        return self.head(F.relu(self.join(F.max_pool2d(y, 2))).flatten(1))  # type: ignore[no-any-return]


class Shuffled(nn.Module):
    """Mixes channels in a way that no dependency graph sees."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.c, self.head = nn.Conv2d(16, 16, 1), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        n, c, h, w = y.shape
        y = y.view(n, 4, c // 4, h, w).transpose(1, 2).reshape(n, c, h, w)
        y = F.relu(self.c(F.relu(self.b(y))))
        return self.head(y.mean((2, 3)))  # type: ignore[no-any-return]


class Attention(nn.Module):
    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        heads = [m(y).view(len(y), -1, 2, 8).transpose(1, 2) for m in (self.q, self.k, self.v)]
        y = F.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(x.shape)
        x = x + self.o(y)
        return x + self.down(F.gelu(self.up(self.norm2(x))))  # type: ignore[no-any-return]


class Vit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 8, 8)
        self.position = nn.Parameter(torch.randn(1, 16, 16) * 0.02)
        self.blocks = nn.Sequential(Attention(), Attention())
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.patch(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.blocks(y).mean(1))  # type: ignore[no-any-return]


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "option-a": (lambda: CifarResNet(1), (2, 3, 32, 32), 3),
    "depthwise": (lambda: MobileNetV2(4), (2, 3, 64, 64), 25),
    "concat": (Concat, (2, 3, 8, 8), 3),
    "shuffled": (Shuffled, (2, 3, 8, 8), 2),
    "vit": (Vit, (2, 3, 32, 32), 2),
}


def _net(name: str) -> tuple[nn.Module, tuple[Tensor, ...], int]:
    make, shape, groups = NETS[name]
    torch.manual_seed(0)
    body = make().eval()
    for m in body.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(std=0.1)  # type: ignore[union-attr]
            m.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
    return body, (torch.randn(shape, generator=torch.Generator().manual_seed(1)),), groups


@pytest.mark.parametrize("name", NETS)
def test_every_group_can_be_cut_to_any_width_without_changing_what_the_rest_computes(
    name: str,
) -> None:
    body, inputs, expected = _net(name)
    found = find_groups(body, CALL, inputs)
    assert len(found.groups) == expected, found.declined
    assert found.declined
    assert all(why for _, why in found.declined)
    keep = [list(range(0, g.size, 3)) for g in found.groups]
    gone = removal(found.groups, keep)
    wide, double = copy.deepcopy(body).double(), tuple(x.double() for x in inputs)
    with torch.no_grad():
        less = remove_channels(wide, gone)(*double)
        silent = zero_inputs(wide, gone)(*double)
    torch.testing.assert_close(less, silent, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NETS)
def test_width_formula_agrees_with_the_counter_to_the_last_mac(name: str) -> None:
    from edgebudget.counter import count
    from edgebudget.program import Program, TensorSpec

    body, inputs, _ = _net(name)
    single = tuple(x[:1] for x in inputs)
    specs = (TensorSpec("x", tuple(single[0].shape)),)
    whole = count(Program("module", body, specs, ("y",))).macs
    groups = find_groups(body, CALL, inputs).groups
    macs = width_macs(body, CALL, single, groups, whole)
    assert macs([g.size for g in groups]) == whole
    keep = [list(range(0, g.size, 2)) for g in groups]
    cut = remove_channels(body, removal(groups, keep))
    assert count(Program("module", cut, specs, ("y",))).macs == macs([len(k) for k in keep])


@pytest.mark.parametrize("name", NETS)
def test_what_a_change_adds_is_what_the_whole_then_costs_more(name: str) -> None:
    body, inputs, _ = _net(name)
    groups = find_groups(body, CALL, inputs).groups
    macs = width_macs(body, CALL, inputs, groups)
    draw = random.Random(0)
    for _ in range(20):
        widths = [draw.randint(1, g.size) for g in groups]
        moved = draw.sample(range(len(groups)), draw.randint(1, len(groups)))
        moves = {g: draw.randint(1, groups[g].size) for g in moved}
        after = [moves.get(g, w) for g, w in enumerate(widths)]
        assert macs.change(widths, moves) == macs(after) - macs(widths)
    ladders = []
    for group in groups:
        rungs = widths_of(group.size, 8)
        costs = [draw.random() for _ in rungs[:-1]]
        ladders.append(Ladder(rungs, monotone([*costs, 0.0])))
    for share in (0.3, 0.6, 0.9):
        bound = int(share * macs([g.size for g in groups]))
        assert solve(ladders, macs, bound) == solve(ladders, lambda w: macs(w), bound)


@given(
    sizes=st.lists(st.integers(4, 64), min_size=1, max_size=6),
    share=st.floats(0.05, 1.0),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_solve_never_overshoots_and_leaves_no_group_that_could_still_grow(
    sizes: list[int], share: float, data: st.DataObject
) -> None:
    ladders = []
    for size in sizes:
        widths = widths_of(size, 8)
        draws = st.lists(st.floats(0, 1), min_size=len(widths), max_size=len(widths))
        ladders.append(Ladder(widths, monotone([*data.draw(draws)[:-1], 0.0])))

    def macs(widths: Sequence[int]) -> int:
        chain = [3, *widths, 10]
        return sum(a * b for a, b in pairwise(chain))

    bound = int(share * macs(sizes))
    solved = solve(ladders, macs, bound)
    smallest = macs([x.widths[0] for x in ladders])
    assert (solved is None) == (smallest > bound)
    if solved is None:
        return
    widths = solved
    assert macs(widths) <= bound
    for g, ladder in enumerate(ladders):
        higher = [w for w in ladder.widths if w > widths[g]]
        if higher:
            assert macs([*widths[:g], higher[0], *widths[g + 1 :]]) > bound


@given(size=st.integers(1, 512), multiple=st.sampled_from([1, 4, 8, 16, 32]))
def test_widths_are_multiples_of_a_step_that_divides_the_target_s(size: int, multiple: int) -> None:
    step = step_of(size, multiple)
    widths = widths_of(size, multiple)
    assert multiple % step == 0
    assert widths[-1] == size
    assert all(w % step == 0 for w in widths[:-1])
    assert widths == tuple(sorted(set(widths)))


def test_refresh_pools_statistics_as_if_all_samples_were_one_batch() -> None:
    body = nn.Sequential(nn.BatchNorm2d(3)).eval()
    x = torch.randn(10, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 + 100
    uneven = [(x[:7],), (x[7:9],), (x[9:],)]
    assert refresh(body, uneven) == 1
    norm = body[0]
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    torch.testing.assert_close(norm.running_mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, x.var((0, 2, 3)), rtol=1e-4, atol=1e-4)
    assert not norm.training
    assert norm.momentum == 0.1
    assert math.isfinite(float(norm.running_var.sum()))
