from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from edgebudget.counter import count
from edgebudget.export import to_graph
from edgebudget.program import PassResult
from edgebudget.scaled_input import ScaledInput
from edgebudget_passes import nest_resolution, skip_layers
from edgebudget_passes._patch_resize import Resample, kernel_matrix, position_matrix
from edgebudget_passes.nest_resolution import Config, find_patch_embedding
from edgebudget_runtime.errors import UsageError
from tests.passes.nested_nets import Chain, Noise, answers, context, nested, program, vit


@cache
def _patched() -> PassResult:
    base = vit(1)
    return nest_resolution.run(base, Config(scales=(0.5,)), context(base, Path()))


def test_a_convolutional_network_gets_a_variant_for_each_size(tmp_path: Path) -> None:
    base = program(Chain(), (1, 1, 32, 32))
    config = Config(scales=(0.75, 0.5, 0.51))
    result = nest_resolution.run(base, config, context(base, tmp_path, Noise(8, (1, 32, 32))))
    body = nested(result.program)
    assert [v.choices["resolution"] for v in body.variants] == ["1", "0.75", "0.5"]
    half = body.cut(body.variants[2])
    assert isinstance(half, ScaledInput)
    assert half.inner == (16, 16)
    assert body.variants[2].macs == count(replace(base, body=half)).macs
    assert body.variants[2].macs < 0.26 * body.variants[0].macs
    for _, cut, linked in answers(result.program):
        torch.testing.assert_close(cut, linked)
    mean = "network.norm.running_mean"
    assert not torch.equal(half.get_buffer(mean), body.base.get_buffer("norm.running_mean"))
    whys = {n.what: n.why for n in result.declined}
    assert "no patch embedding" in whys["not resized"]
    assert "merged" in whys


def test_a_transformer_gets_larger_patches_where_it_takes_one_size_only() -> None:
    result = _patched()
    body = nested(result.program)
    assert [v.choices["patch"] for v in body.variants] == ["4", "8"]
    assert any("doesn't match model" in n.why for n in result.declined)
    cut = body.cut(body.variants[1])
    conv = cut.get_submodule("vit.embeddings.patch_embeddings.projection")
    assert type(conv) is nn.Conv2d
    assert conv.weight.shape == (32, 3, 8, 8)
    assert cut.get_parameter("vit.embeddings.position_embeddings").shape == (1, 5, 32)
    for _, got, linked in answers(result.program):
        torch.testing.assert_close(got, linked)
    graph = replace(result.program, body=cut)
    assert count(to_graph(graph)).macs == body.variants[1].macs


def test_gradients_of_a_larger_patch_reach_the_stored_kernel() -> None:
    body = nested(_patched().program)
    x = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with body.link(body.variants[1]).bound() as linked:
        torch.autograd.backward(linked(x).logits.square().sum())
    names = ("vit.embeddings.patch_embeddings.projection.weight", "classifier.weight")
    for name in (*names, "vit.embeddings.position_embeddings"):
        grad = body.base.get_parameter(name).grad
        assert grad is not None
        assert bool(grad.abs().sum() > 0)
    body.base.zero_grad(set_to_none=True)


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 8), st.integers(1, 8))
def test_a_larger_patch_answers_to_the_enlarged_picture_as_the_stored_one_to_the_picture(
    old: int, more: int
) -> None:
    draw = torch.Generator().manual_seed(old)
    kernel = torch.randn(3, 2, old, old, generator=draw)
    picture = torch.randn(5, 2, old, old, generator=draw)
    new = old + more
    larger = Resample(kernel_matrix((old, old), (new, new)), 2, (new, new))(kernel)
    enlarged = F.interpolate(picture, (new, new), mode="bilinear", align_corners=False)
    torch.testing.assert_close(
        F.conv2d(enlarged, larger), F.conv2d(picture, kernel), atol=1e-3, rtol=1e-3
    )


@given(st.integers(2, 6), st.integers(1, 6), st.integers(0, 2))
def test_interpolated_positions_keep_the_prefix_and_weigh_to_one(
    old: int, new: int, prefix: int
) -> None:
    matrix = position_matrix((old, old), (new, new), prefix)
    assert matrix.shape == (prefix + new * new, prefix + old * old)
    torch.testing.assert_close(matrix.sum(1), torch.ones(len(matrix)))
    assert torch.equal(matrix[:prefix], torch.eye(prefix, matrix.shape[1]))
    same = position_matrix((old, old), (old, old), prefix)
    torch.testing.assert_close(same, torch.eye(len(same)))


def test_patches_and_depths_combine(tmp_path: Path) -> None:
    base = vit(3)
    ctx = context(base, tmp_path)
    config = Config(scales=(), patches=(8, 5), combine=True)
    shallow = skip_layers.Config(shares=(), speedups=(1.0 + 1e-6,))
    assert skip_layers.run(base, shallow, ctx).declined  # 2 of 3 layers are too few
    deep = skip_layers.run(
        base, skip_layers.Config(shares=(0.7,)), context(base, tmp_path, Noise(8, (3, 16, 16)))
    )
    both = nest_resolution.run(deep.program, config, ctx)
    assert {v.name for v in nested(both.program).variants} == {
        "whole",
        "depth=2 of 3 patch=4",
        "depth=3 of 3 patch=8",
        "depth=2 of 3 patch=8",
    }
    assert any(n.where == "patch=5" for n in both.declined)
    for _, cut, linked in answers(both.program):
        torch.testing.assert_close(cut, linked)


def test_convolutions_that_are_no_patches_are_told_apart() -> None:
    stem = nn.Sequential(nn.Conv2d(1, 8, 4, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert "learned positions" in str(find_patch_embedding(program(stem, (1, 1, 16, 16))))
    pooled = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(1, 8, 4, 4), nn.Flatten())
    assert "straight" in str(find_patch_embedding(program(pooled, (1, 1, 16, 16))))


def test_scales_without_meaning_are_refused(tmp_path: Path) -> None:
    base = program(Chain(), (1, 1, 32, 32))
    with pytest.raises(UsageError, match="EB155"):
        nest_resolution.run(base, Config(scales=(1.0,)), context(base, tmp_path))
