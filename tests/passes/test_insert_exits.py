from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from edgebudget import counter, graph
from edgebudget.events import Advanced, Event
from edgebudget.exits import exit_outputs
from edgebudget.export import run_module, to_graph
from edgebudget.program import PassResult, Program, TensorSpec
from edgebudget.tasks import Agreement, Classification, Regression
from edgebudget.workload import Data
from edgebudget_passes import insert_exits, recover
from edgebudget_passes._exit_choice import Candidate, best_exits
from edgebudget_passes._exit_graph import exit_macs
from edgebudget_passes._exit_heads import Design
from edgebudget_passes._exit_network import ExitNetwork, Tap
from edgebudget_passes._exit_places import Place, survey
from edgebudget_passes.insert_exits import Config
from edgebudget_runtime.errors import UsageError
from tests.passes.exit_nets import (
    QUICK,
    Digits,
    Marked,
    Noise,
    answers,
    context,
    digits_program,
    on_digits,
    plain_net,
    program_of,
    residual_net,
    same,
    taught,
    tiny_bert,
    tiny_vit,
    train_split,
)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Program, PassResult]:
    """The digits with exits fitted and trained for a moment; tests do not change it."""
    return on_digits(tmp_path_factory.mktemp("quick"), QUICK)


def test_digits_answers_early_and_finally_to_the_bit(tmp_path: Path) -> None:
    before, result = on_digits(tmp_path, replace(QUICK, samples=350, fit_steps=120))
    after = result.program
    assert after.outputs == exit_outputs(after.outputs)
    assert len(after.outputs) >= 2
    early, final = after.outputs[0], after.outputs[-1]
    picked = [train_split().sample(i) for i in range(800, 1000)]
    inputs = {"image": np.stack([s[0]["image"] for s in picked])}
    labels = np.array([s[1] for s in picked])
    got = run_module(after, inputs)
    assert np.array_equal(got[final], run_module(before, inputs)["scores"])
    assert float((got[early].argmax(1) == labels).mean()) > 0.5
    assert float((got[after.outputs[-2]].argmax(1) == labels).mean()) > 0.8


def test_costs_add_up_and_the_export_agrees(quick: tuple[Program, PassResult]) -> None:
    before, result = quick
    after, body = result.program, result.program.body
    macs = exit_macs(after)
    assert list(macs) == sorted(set(macs))
    exported = to_graph(after)  # compares the answers with the module's
    assert counter.count(exported).macs == counter.count(after).macs == macs[-1]
    assert [o.name for o in exported.body.graph.output] == list(after.outputs)
    heads = sum(m.weight.numel() for m in body.exits.modules() if isinstance(m, nn.Linear))
    assert macs[-1] == counter.count(before).macs + heads
    again = to_graph(after)
    assert graph.canonical_bytes(again.body) == graph.canonical_bytes(exported.body)


@pytest.mark.parametrize("make", [residual_net, plain_net])
def test_convolutional_networks_get_exits_and_keep_their_answer(make: Any, tmp_path: Path) -> None:
    program = taught(program_of(make(), TensorSpec("image", (1, 1, 8, 8))), Digits(), 40)
    ctx = context(tmp_path, program, Digits(), Classification())
    result = insert_exits.run(program, replace(QUICK, head_share=0.5), ctx)
    assert len(result.program.outputs) >= 2, result.declined
    before, after = answers(program), answers(result.program)
    assert np.array_equal(before["y"], after["y"])
    assert exit_macs(result.program)[-1] == counter.count(to_graph(result.program)).macs


@pytest.mark.parametrize("make", [tiny_vit, tiny_bert])
def test_transformers_are_cut_between_layers(make: Any, tmp_path: Path) -> None:
    data = Marked(words=make is tiny_bert)
    program = taught(make(), data, 50)
    found = survey(program)
    assert not isinstance(found, str)
    assert all(p.layout == "tokens" and p.token == 0 for p in found.places)
    assert sum(".layer." in p.tap.module for p in found.places) >= 2
    ctx = context(tmp_path, program, data, Classification())
    result = insert_exits.run(program, QUICK, ctx)
    assert len(result.program.outputs) >= 2, result.declined
    assert np.array_equal(answers(program)["y"], answers(result.program)["y"])
    exported = to_graph(result.program)
    assert counter.count(exported).macs == exit_macs(result.program)[-1]


def test_a_regressor_ends_as_the_model_does(tmp_path: Path) -> None:
    body = nn.Sequential(residual_net(1), nn.Sigmoid())
    program = program_of(body, TensorSpec("image", (1, 1, 8, 8)))
    found = survey(program)
    assert not isinstance(found, str)
    assert found.tail == (("sigmoid", ()),)
    ctx = context(tmp_path, program, Digits(numbers=True), Agreement())
    result = insert_exits.run(program, QUICK, ctx)
    early = answers(result.program, 50)[result.program.outputs[0]]
    assert early.shape == (50, 1)
    assert 0 < early.min() < early.max() < 1
    ctx = replace(ctx, task=Regression(), workdir=tmp_path / "labels")
    trained = insert_exits.run(program, replace(QUICK, train="joint", steps=20), ctx)
    assert any("joint final_before" in n.what for n in trained.did) or trained.declined


def test_exits_of_a_model_of_probabilities_give_probabilities(tmp_path: Path) -> None:
    body = nn.Sequential(digits_program().body, nn.Softmax(-1))
    program = program_of(body, TensorSpec("image", (1, 1, 8, 8)))
    ctx = context(tmp_path, program, Digits(), Classification())
    result = insert_exits.run(program, replace(QUICK, fit_steps=60), ctx)
    early = answers(result.program)[result.program.outputs[0]]
    assert early.sum(1) == pytest.approx(1.0, abs=1e-5)
    quality = next(n.what for n in result.did if n.where == result.program.outputs[-2])
    assert float(quality.split()[0].removeprefix("top1=")) > 0.6


class Pixels(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.argmax(1)


class UnitLength(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x)


class Tangle(nn.Module):
    """Every layer reads all before it: nothing narrows."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(1 + 4 * i, 4, 3, padding=1) for i in range(4))
        self.last = nn.Linear(17, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, F.relu(layer(x))], 1)
        y: Tensor = self.last(x.mean((2, 3)))
        return y


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (nn.Sequential(residual_net(), Pixels()), "answers in int64"),
        (nn.Sequential(residual_net(), UnitLength()), "ends in div"),
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)), "one answer per input"),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), "nowhere inside"),
    ],
)
def test_networks_that_cannot_have_exits_are_told_why(
    body: nn.Module, why: str, tmp_path: Path
) -> None:
    program = program_of(body, TensorSpec("x", (1, 1, 8, 8)))
    result = insert_exits.run(
        program, QUICK, context(tmp_path, program, Noise(program.inputs), Agreement())
    )
    assert result.program is program
    assert not result.did
    assert why in result.declined[-1].why


def test_a_dense_block_is_cut_only_where_everything_is_in_one_tensor() -> None:
    found = survey(program_of(Tangle(), TensorSpec("x", (1, 1, 8, 8))))
    assert not isinstance(found, str)
    assert all(p.tap.side == "in" for p in found.places)


def test_several_outputs_no_data_and_second_exits_are_declined(
    quick: tuple[Program, PassResult], tmp_path: Path
) -> None:
    program, result = quick
    ctx = context(tmp_path, program, Digits(), Classification())
    again = insert_exits.run(result.program, QUICK, ctx)
    assert "already" in again.declined[-1].why
    empty = insert_exits.run(program, QUICK, replace(ctx, data=Data()))
    assert "no training" in empty.declined[-1].why
    two = replace(program, outputs=("a", "b"))
    assert "2 outputs" in insert_exits.run(two, QUICK, ctx).declined[-1].why


def test_equal_seeds_give_equal_weights(quick: tuple[Program, PassResult], tmp_path: Path) -> None:
    program, (_, one) = digits_program(), quick
    torch.manual_seed(2)  # the global generator has no say, and is left alone
    state = torch.random.get_rng_state()
    two = insert_exits.run(
        program, QUICK, context(tmp_path / "b", program, Digits(), Classification())
    )
    assert torch.equal(state, torch.random.get_rng_state())
    assert one.did == two.did
    assert same(one.program.body, two.program.body)


@pytest.mark.parametrize("mode", ["frozen", "joint"])
def test_a_killed_run_resumes_to_the_same_bits(mode: str, tmp_path: Path) -> None:
    config = replace(QUICK, train=mode, steps=12, checkpoint_every=4, lr=1e-4)
    work = f"insert_exits-{mode}"
    _, whole = on_digits(tmp_path / "whole", config)
    seen = 0

    def cut(event: Event) -> None:
        nonlocal seen
        if isinstance(event, Advanced) and event.work == work:
            seen += 1
            if seen == 7:
                raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        on_digits(tmp_path / "cut", config, emit=cut)
    _, again = on_digits(tmp_path / "cut", config)
    assert again.did == whole.did
    assert same(again.program.body, whole.program.body)


def test_ctrl_c_keeps_what_is_trained(tmp_path: Path) -> None:
    seen = 0

    def press(event: Event) -> None:
        nonlocal seen
        if isinstance(event, Advanced) and event.work == "insert_exits-frozen":
            seen += 1
            if seen == 7:
                raise KeyboardInterrupt

    config = replace(QUICK, steps=30, checkpoint_every=3)
    _, result = on_digits(tmp_path, config, emit=press)
    assert result.ended_early == "interrupt"
    assert any(n.what == "frozen steps=6" for n in result.did)
    assert len(result.program.outputs) >= 2


def test_joint_training_that_harms_the_final_answer_is_not_kept(tmp_path: Path) -> None:
    config = replace(QUICK, train="joint", lr=1.0, steps=8, warmup=0.0)
    before, result = on_digits(tmp_path, config)
    assert any("kept=frozen" in n.what for n in result.did)
    assert any("kept as fitted" in n.what for n in result.did)
    assert len(result.program.outputs) >= 2
    assert np.array_equal(answers(before)["scores"], answers(result.program)["scores"])


def test_recover_teaches_every_exit(quick: tuple[Program, PassResult], tmp_path: Path) -> None:
    before, result = quick
    start = replace(result.program, body=copy.deepcopy(result.program.body))
    for head in start.body.exits:
        nn.init.zeros_(head.linear.weight)
    ctx = context(tmp_path / "recover", before, Digits(), Classification())
    config = recover.Config(steps=40, batch=32, lr=0.05, augment="none")
    after = recover.run(start, config, ctx).program.body
    assert all(float(head.linear.weight.detach().abs().max()) > 0 for head in after.exits)


class Shared(nn.Module):
    """One ReLU called three times, and a place that no module but the next one's input holds."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(6, 6) for _ in range(3))
        self.relu = nn.ReLU()
        self.last = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.a(x))
        x = 2 * self.relu(self.b(x))
        y: Tensor = self.last(self.relu(self.c(x)))
        return y


def test_taps_count_calls_and_see_inputs_and_hooks_do_not_stay() -> None:
    torch.manual_seed(0)
    body = Shared().eval()
    found = survey(program_of(body, TensorSpec("x", (1, 6))))
    assert not isinstance(found, str)
    taps = [p.tap for p in found.places]
    assert taps == [Tap("relu", "out"), Tap("c", "in"), Tap("relu", "out", 2)]
    network = ExitNetwork(body, ["x"], "y", taps[:2], [nn.Identity(), nn.Identity()])
    x = torch.randn(3, 6)
    first, second, final = network(x)
    assert torch.equal(first, F.relu(body.a(x)))
    assert torch.equal(second, 2 * F.relu(body.b(first)))
    assert torch.equal(final, body(x))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in body.modules())


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 90), st.integers(0, 9), st.floats(0, 1)), max_size=6),
    st.integers(1, 3),
)
def test_the_choice_has_the_largest_area(raw: list[tuple[int, int, float]], most: int) -> None:
    design, tap = Design("average", 0), Tap("m", "out")
    head: Any = None
    found = [
        Candidate(Place(tap, (1,), "vector", macs), design, head, extra, quality)
        for macs, extra, quality in raw
    ]

    def area(chain: tuple[Candidate, ...]) -> float:
        end, total = 200.0, 0.0
        paid, points = 0.0, []
        for c in chain:
            paid += c.head_macs
            points.append((c.place.macs + paid, c.quality))
        points.append((100 + paid, 0.9))
        stops = [cost for cost, _ in points[1:]] + [end]
        for (cost, quality), stop in zip(points, stops, strict=True):
            total += quality * (stop - cost)
        return total - 0.9 * 0.005 * 100 * len(chain)

    chains = [
        tuple(sorted(chain, key=lambda c: c.place.macs))
        for n in range(most + 1)
        for chain in itertools.combinations(found, n)
        if len({c.place.macs for c in chain}) == n
    ]
    chosen = best_exits(found, macs=100, quality=0.9, floor=0.0, most=most)
    assert area(chosen) == pytest.approx(max(area(c) for c in chains), abs=1e-6)


@pytest.mark.parametrize(
    "config",
    [
        Config(train="both"),
        Config(exits=0),
        Config(optimizer="lion"),
        Config(schedule="rexx"),
        Config(weights=(1.0,)),
        Config(steps=-1),
    ],
)
def test_settings_without_meaning_are_refused(config: Config, tmp_path: Path) -> None:
    program = digits_program()
    with pytest.raises(UsageError, match="EB15"):
        insert_exits.run(program, config, context(tmp_path, program, Digits(), Classification()))
