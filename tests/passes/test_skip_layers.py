from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from edgebudget.counter import count
from edgebudget.export import to_graph
from edgebudget.program import PassResult, Program, TensorSpec
from edgebudget.train import Caller
from edgebudget_models import digits
from edgebudget_passes import skip_layers, slim_width
from edgebudget_passes._blocks import find_blocks
from edgebudget_passes._nested_edits import LeaveOut
from edgebudget_passes.skip_layers import Config, balanced
from edgebudget_runtime.errors import UsageError
from tests.passes.nested_nets import Chain, Noise, answers, context, nested, program, resnet, vit


@cache
def _shallow() -> PassResult:
    base = resnet(2)
    config = Config(shares=(0.8, 0.4), samples=16)
    return skip_layers.run(base, config, context(base, Path(), Noise(16)))


def _gone(result: PassResult) -> list[set[str]]:
    edits = [v.edits[0] for v in nested(result.program).variants[1:]]
    assert all(isinstance(e, LeaveOut) for e in edits)
    return [{s.module for s in e.skips} for e in edits if isinstance(e, LeaveOut)]


def test_blocks_are_found_in_the_graph_with_the_work_they_save() -> None:
    base = resnet(2)
    blocks = find_blocks(base)
    assert {b.name: b.skip.keeps_input for b in blocks.found} == {
        "layer1.0": True,
        "layer1.1": True,
        "layer2.0.bn2": False,  # where the shape changes, the shortcut stays
        "layer2.1": True,
        "layer3.0.bn2": False,
        "layer3.1": True,
    }
    assert blocks.whole == count(base).macs
    assert blocks.macs(blocks.found) == blocks.whole - sum(b.macs for b in blocks.found)


def test_depths_cost_what_was_asked_and_shallower_ones_lack_what_deeper_ones_lack() -> None:
    body = nested(_shallow().program)
    whole = body.variants[0].macs
    assert [v.macs <= s * whole for v, s in zip(body.variants[1:], (0.8, 0.4), strict=True)]
    deep, shallow = _gone(_shallow())
    assert deep < shallow
    assert body.variants[0].choices == {"depth": "6 of 6"}
    assert body.variants[1].choices == {"depth": f"{6 - len(deep)} of 6"}
    steps = [n.what for n in _shallow().did if n.what.startswith("left out")]
    assert len(steps) == len(shallow)


def test_a_variant_answers_as_the_network_without_these_blocks() -> None:
    for _, cut, linked in answers(_shallow().program):
        torch.testing.assert_close(cut, linked)
    body = nested(_shallow().program)
    gone = _gone(_shallow())[0]
    shallow = body.cut(body.variants[1])
    for name in gone:
        assert not list(shallow.get_submodule(name).parameters())


def test_a_branch_in_the_forward_of_the_whole_leaves_no_trace_in_the_graph(tmp_path: Path) -> None:
    base = program(digits.load(), (1, 1, 8, 8))
    result = skip_layers.run(
        base, Config(samples=16), context(base, tmp_path, Noise(16, (1, 8, 8)))
    )
    body = nested(result.program)
    exported = to_graph(replace(base, body=body.cut(body.variants[1]))).body
    operators = [n.op_type for n in exported.graph.node]
    assert "Add" not in operators
    assert operators.count("Conv") == 2
    assert any(n.what == "merged" for n in result.declined)


def test_the_least_important_block_goes_first(tmp_path: Path) -> None:
    base = resnet(2)
    with torch.no_grad():
        base.body.get_parameter("layer2.1.bn2.weight").mul_(1e-4)
        base.body.get_parameter("layer2.1.bn2.bias").zero_()
        base.body.get_buffer("layer2.1.bn2.running_mean").zero_()
    config = Config(shares=(0.95,), samples=16)
    result = skip_layers.run(base, config, context(base, tmp_path, Noise(16)))
    assert _gone(result) == [{"layer2.1"}]


def test_layers_of_a_transformer_are_skipped_evenly_without_data(tmp_path: Path) -> None:
    base = vit(6)
    config = Config(shares=(0.66, 0.2))
    result = skip_layers.run(base, config, context(base, tmp_path))
    kept = set(range(6)) - {int(n.rsplit(".", 1)[1]) for n in _gone(result)[0]}
    assert kept == {0, 3, 5}
    assert any("below 3" in n.why for n in result.declined)
    for _, cut, linked in answers(result.program):
        torch.testing.assert_close(cut, linked)


def test_the_published_example_of_balanced_skipping() -> None:
    assert balanced(30, 5) == (0, 6, 12, 18, 24, 29)
    assert balanced(4, 2) is None


@given(st.integers(3, 80), st.floats(1.0, 20.0))
def test_balanced_skipping_keeps_the_ends_and_no_more_than_the_speed_allows(
    layers: int, speedup: float
) -> None:
    kept = balanced(layers, speedup)
    if kept is None:
        assert int(layers / speedup) < 3
        return
    assert kept[0] == 0
    assert kept[-1] == layers - 1
    assert list(kept) == sorted(set(kept))
    assert len(kept) <= int(layers / speedup)


def test_widths_and_depths_combine(tmp_path: Path) -> None:
    base = resnet()
    ctx = context(base, tmp_path)
    slim = slim_width.run(base, slim_width.Config(shares=(0.5,)), ctx).program
    both = skip_layers.run(slim, Config(shares=(0.7,)), context(base, tmp_path, Noise(8)))
    body = nested(both.program)
    names = [v.name for v in body.variants]
    assert len(names) == 4
    assert len(set(names)) == 4
    assert all({"width", "depth"} == set(v.choices) for v in body.variants)
    assert min(v.macs for v in body.variants) == body.variants[-1].macs
    for _, cut, linked in answers(both.program):
        torch.testing.assert_close(cut, linked)


class Twice(nn.Module):
    """One block that runs twice: leaving out one run is not leaving out the module."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 1, 3, 1, 1), nn.Linear(1, 10)

    def forward(self, image: Tensor) -> Tensor:
        """[N, 1, H, W] -> [N, 10]."""
        x = image + 1.0
        for _ in range(2):
            x = x + self.conv(x)
        scores: Tensor = self.head(x.mean((2, 3)))
        return scores


def test_whole_layers_of_a_text_encoder_are_blocks_also_with_a_mask_beside_them(
    tmp_path: Path,
) -> None:
    config = BertConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=16,
    )
    torch.manual_seed(0)
    tokens = tuple(TensorSpec(n, (1, 6), "int64") for n in ("input_ids", "attention_mask"))
    body = BertForSequenceClassification(config).eval()
    base = Program("module", body, tokens, ("logits",))
    result = skip_layers.run(base, Config(shares=(0.8,)), context(base, tmp_path))
    assert _gone(result) == [{"bert.encoder.layer.1"}]
    nest = nested(result.program)
    inputs = (torch.ones(1, 6, dtype=torch.int64),) * 2
    with torch.no_grad():
        full = Caller.of(base)(body, inputs)[0]
        shallow = Caller.of(base)(nest.cut(nest.variants[1]), inputs)[0]
        body.bert.encoder.layer = nn.ModuleList(body.bert.encoder.layer[i] for i in (0, 2, 3))
        torch.testing.assert_close(shallow, Caller.of(base)(body, inputs)[0])
    assert not torch.allclose(full, shallow)


@pytest.mark.parametrize(("body", "reason"), [(Chain(), "no addition"), (Twice(), "runs twice")])
def test_it_declines_with_a_reason(body: nn.Module, reason: str, tmp_path: Path) -> None:
    base = program(body, (1, 1, 8, 8))
    result = skip_layers.run(base, Config(), context(base, tmp_path))
    assert result.program is base
    assert any(reason in n.why for n in result.declined)


@pytest.mark.parametrize("config", [Config(shares=(0.0,)), Config(speedups=(1.0,))])
def test_settings_without_meaning_are_refused(config: Config, tmp_path: Path) -> None:
    base = program(Chain(), (1, 1, 8, 8))
    with pytest.raises(UsageError, match="EB155"):
        skip_layers.run(base, config, context(base, tmp_path))
