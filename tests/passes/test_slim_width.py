from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgebudget.counter import count
from edgebudget.program import PassResult
from edgebudget_passes import slim_width
from edgebudget_passes._allocate import Ladder, solve
from edgebudget_passes._nested_edits import CutChannels
from edgebudget_passes.slim_width import Config, _solved
from edgebudget_runtime.errors import UsageError
from tests.passes.nested_nets import Chain, Noise, answers, context, nested, program, resnet, vit


@cache
def _slimmed() -> PassResult:
    base = resnet()
    config = Config(shares=(0.75, 0.4), candidates=2, samples=24)
    return slim_width.run(base, config, context(base, Path(), Noise(32)))


def test_widths_cost_what_was_asked_and_narrower_channels_lie_within_wider_ones() -> None:
    body = nested(_slimmed().program)
    whole = count(resnet()).macs
    assert [v.macs for v in body.variants] == sorted((v.macs for v in body.variants), reverse=True)
    assert body.variants[0].macs == whole
    for variant, share in zip(body.variants[1:], (0.75, 0.4), strict=True):
        assert 0.85 * share * whole < variant.macs <= share * whole
        assert variant.choices["width"] == f"{variant.macs / whole:.3g}"
    wide, narrow = (v.edits[0] for v in body.variants[1:])
    assert isinstance(wide, CutChannels)
    assert isinstance(narrow, CutChannels)
    for gone, less in ((wide.gone.out, narrow.gone.out), (wide.gone.into, narrow.gone.into)):
        assert all(set(positions) <= set(less[layer]) for layer, positions in gone.items())


def test_a_variant_cut_out_answers_as_the_one_that_is_trained() -> None:
    for _, cut, linked in answers(_slimmed().program):
        torch.testing.assert_close(cut, linked)


def test_every_width_has_statistics_of_its_own() -> None:
    body = nested(_slimmed().program)
    assert any("re-estimated on 24 samples" in n.what for n in _slimmed().did)
    means = [body.cut(v).get_buffer("layer1.0.bn2.running_mean") for v in body.variants]
    rows = body.link(body.variants[1]).sources["layer1.0.bn2.weight"].kept[0]
    kept = means[0] if rows is None else means[0][rows]
    assert not torch.allclose(kept, means[1])


def test_the_same_seed_gives_the_same_channels(tmp_path: Path) -> None:
    base = resnet()
    config = Config(shares=(0.75, 0.4), candidates=2, samples=24)
    again = nested(slim_width.run(base, config, context(base, tmp_path, Noise(32))).program)
    first = nested(_slimmed().program)
    assert again.variants == first.variants
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in first.state_dict().items())


def test_without_calibration_data_weights_rank_and_equal_widths_are_one(tmp_path: Path) -> None:
    base = program(Chain(), (1, 1, 8, 8))
    whole = count(base).macs
    config = Config(macs=(whole - 1, whole - 2, whole + 1, 10))
    result = slim_width.run(base, config, context(base, tmp_path))
    body = nested(result.program)
    assert len(body.variants) == 2
    assert body.variants[1].macs < whole
    said = {(n.what, n.why.split(" ")[0]) for n in result.declined if "MACs" in n.where}
    assert said == {("no variant", "the"), ("no variant", "widths")}
    assert any(n.what == "merged" for n in result.declined)
    assert any("no calibration data" in n.why for n in result.did)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_widths_solved_for_smaller_bounds_never_exceed_those_for_larger_ones(
    data: st.DataObject,
) -> None:
    groups = data.draw(st.integers(1, 4))
    costs = st.lists(st.floats(0.01, 9.0), min_size=4, max_size=4)
    ladders = []
    for _ in range(groups):
        falls = sorted(data.draw(costs), reverse=True)
        ladders.append(Ladder((4, 8, 12, 16), (*falls[:3], 0.0)))
    weights = data.draw(st.lists(st.integers(1, 9), min_size=groups, max_size=groups))

    def macs(widths: object) -> int:
        assert isinstance(widths, list | tuple)
        return sum(w * k for w, k in zip(widths, weights, strict=True))

    whole, least = macs([16] * groups), macs([4] * groups)
    bounds = sorted(data.draw(st.sets(st.integers(least, whole), min_size=2)), reverse=True)
    found = _solved(ladders, macs, bounds)
    for wide, narrow, bound in zip(found, found[1:], bounds[1:], strict=False):
        assert all(n <= w for n, w in zip(narrow, wide, strict=True))
        assert macs(narrow) <= bound
    assert found[0] == solve(ladders, macs, bounds[0])


def test_a_transformer_slims_inside_its_layers_and_says_what_cannot_shrink(tmp_path: Path) -> None:
    base = vit(1)
    config = Config(shares=(0.85, 0.1))
    result = slim_width.run(base, config, context(base, tmp_path))
    body = nested(result.program)
    assert body.cut(body.variants[1]).vit.encoder.layer[0].intermediate.dense.out_features < 64  # type: ignore[union-attr, index]
    whys = [n.why for n in result.declined]
    assert any("normalises over these channels" in w for w in whys)
    assert any("at the least" in w for w in whys)


@pytest.mark.parametrize("config", [Config(shares=(1.5,)), Config(macs=(0,))])
def test_shares_without_meaning_are_refused(config: Config, tmp_path: Path) -> None:
    base = program(Chain(), (1, 1, 8, 8))
    with pytest.raises(UsageError, match="EB155"):
        slim_width.run(base, config, context(base, tmp_path))
