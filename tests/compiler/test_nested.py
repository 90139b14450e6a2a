"""Variants are slices of one set of weights, with statistics of their own."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from edgebudget.nested import Linked, Nested, Variant
from edgebudget_runtime.errors import PassError


class Net(nn.Module):
    """A convolution, its normalisation, another convolution, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6)
        self.second, self.head = nn.Conv2d(6, 4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 1, H, W] -> [N, 3]."""
        x = self.second(torch.relu(self.norm(self.first(x))))
        y: Tensor = self.head(x.mean((2, 3)))
        return y


@dataclass(frozen=True)
class Keep:
    """Keep these channels of the first convolution; `scale` makes it an edit that computes."""

    rows: tuple[int, ...]
    scale: float = 1.0
    order: int = 0

    def __call__(self, body: nn.Module) -> nn.Module:
        assert isinstance(body, Net)
        rows = torch.tensor(self.rows)
        for name in ("weight", "bias", "running_mean", "running_var"):
            for layer in (body.first, body.norm):
                value = getattr(layer, name, None)
                if isinstance(value, nn.Parameter):
                    setattr(layer, name, nn.Parameter(self.scale * value.detach()[rows]))
                elif value is not None:
                    setattr(layer, name, value[rows])
        body.second.weight = nn.Parameter(body.second.weight.detach()[:, rows])
        body.first.out_channels = body.second.in_channels = body.norm.num_features = len(rows)
        return body


@cache
def _x() -> Tensor:
    return torch.randn(8, 1, 7, 7, generator=torch.Generator().manual_seed(0))


def _nested(*rows: tuple[int, ...]) -> Nested:
    torch.manual_seed(0)
    variants = [Variant({"width": str(len(r))}, (Keep(r),)) for r in rows]
    return Nested(Net().eval(), ["x"], [Variant({}), *variants])


@settings(max_examples=25, deadline=None)
@given(st.sets(st.integers(0, 5), min_size=1))
def test_a_cut_and_the_linked_variant_answer_alike_and_teach_only_what_they_share(
    rows: set[int],
) -> None:
    nested = _nested(tuple(sorted(rows)))
    variant = nested.variants[1]
    linked = nested.link(variant)
    cut = nested.cut(variant)
    functional = torch.func.functional_call(linked.body, linked.weights(), (_x(),))
    with linked.bound() as body:
        answer = body(_x())
    assert torch.equal(answer, functional)
    assert torch.equal(answer, cut(_x()))
    torch.autograd.backward(answer.square().sum())
    weight = nested.base.get_parameter("first.weight")
    assert weight.grad is not None
    touched = weight.grad.flatten(1).abs().sum(1) > 0
    assert {i for i in range(6) if touched[i]} <= rows
    assert nested.base.get_parameter("head.weight").grad is not None
    # The same gradient as the cut's own weights have.
    torch.autograd.backward(cut(_x()).square().sum())
    own = cut.get_parameter("first.weight").grad
    assert own is not None
    torch.testing.assert_close(weight.grad[sorted(rows)], own)


def test_statistics_belong_to_one_variant_and_survive_copies_and_checkpoints() -> None:
    nested = _nested((0, 2, 4), (0, 2))
    whole, middle, small = nested.variants
    before = {v.name: _mean(nested, v) for v in nested.variants}
    assert nested.refresh(middle, [(_x(),)], lambda body, x: body(*x)) == 1
    assert not torch.equal(_mean(nested, middle), before[middle.name])
    assert torch.equal(_mean(nested, whole), before[whole.name])
    assert torch.equal(_mean(nested, small), before[small.name])
    copied = copy.deepcopy(nested)
    other = _nested((0, 2, 4), (0, 2))
    other.load_state_dict(nested.state_dict())
    only = nested.having([whole, middle])
    for same in (copied, other, only):
        assert torch.equal(same.cut(middle)(_x()), nested.cut(middle)(_x()))
    with torch.no_grad():
        copied.base.get_parameter("first.weight").zero_()
    assert not torch.equal(copied.cut(middle)(_x()), nested.cut(middle)(_x()))


def test_training_a_linked_variant_moves_its_own_statistics() -> None:
    nested = _nested((1, 3))
    whole, small = nested.variants
    before = _mean(nested, whole), _mean(nested, small)
    linked: Linked = nested.link(small)
    norm = linked.body.get_submodule("norm")
    norm.training = True
    with linked.bound() as body:
        body(_x())
    assert torch.equal(_mean(nested, whole), before[0])
    assert not torch.equal(_mean(nested, small), before[1])


def _mean(nested: Nested, variant: Variant) -> Tensor:
    return nested.cut(variant).get_buffer("norm.running_mean").clone()


def test_it_answers_as_the_whole_and_a_cut_is_independent() -> None:
    nested = _nested((1, 2))
    assert torch.equal(nested(_x()), nested.base(_x()))
    cut = nested.cut(nested.variants[1])
    assert not cut.training
    with torch.no_grad():
        before = nested.base.get_parameter("head.weight").clone()
        cut.get_parameter("head.weight").zero_()
    assert torch.equal(nested.base.get_parameter("head.weight"), before)
    assert isinstance(nested.cut(nested.variants[0]), Net)


def test_an_edit_that_computes_weights_shares_nothing() -> None:
    variant = Variant({"width": "2"}, (Keep((0, 1), scale=0.5),))
    nested = Nested(Net().eval(), ["x"], [Variant({}), variant])
    with pytest.raises(PassError, match="EB361"):
        nested.link(variant)
