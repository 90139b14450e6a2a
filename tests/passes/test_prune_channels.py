from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from edgebudget import target_registry
from edgebudget.counter import count
from edgebudget.events import ignore
from edgebudget.program import Context, Program, TensorSpec
from edgebudget.tasks import Classification
from edgebudget.train import Caller
from edgebudget.workload import Data, Sample
from edgebudget_models.cifar_resnet_net import CifarResNet
from edgebudget_passes import prune_channels
from edgebudget_passes._channel_groups import find_groups, removal
from edgebudget_passes._layer_moments import measure, repair
from edgebudget_passes._slicing import remove_channels
from edgebudget_passes.prune_channels import Config
from edgebudget_runtime.budget import Budget
from edgebudget_runtime.errors import InfeasibleError, UsageError

TARGET = target_registry.get("cpu").spec


@dataclass(frozen=True)
class Noise:
    """Smooth random pictures with labels."""

    count: int
    name: str = "noise"

    def __len__(self) -> int:
        return self.count

    def sample(self, index: int) -> Sample:
        draw = np.random.default_rng(index)
        coarse = draw.standard_normal((3, 8, 8)).astype(np.float32)
        picture = coarse.repeat(4, 1).repeat(4, 2)
        return Sample({"image": picture}, np.asarray(index % 10))

    def digest(self) -> str:
        return f"{self.name}/{self.count}"


def _program() -> Program:
    torch.manual_seed(0)
    return Program(
        "module", CifarResNet(1).eval(), (TensorSpec("image", (1, 3, 32, 32)),), ("scores",)
    )


def _context(program: Program, folder: Path, calibration: Noise | None) -> Context:
    rng = np.random.default_rng(0)
    data = Data(calibration=calibration)
    return Context(Budget(), TARGET, Classification(), data, program, 0, rng, folder, ignore)


@pytest.mark.parametrize("share", [0.5, 0.75])
def test_the_bound_holds_on_the_counted_graph_and_is_nearly_used_up(
    share: float, tmp_path: Path
) -> None:
    program = _program()
    bound = int(share * count(program).macs)
    config = Config(macs=bound, candidates=6, samples=48)
    result = prune_channels.run(program, config, _context(program, tmp_path, Noise(64)))
    counted = count(result.program).macs
    assert counted <= bound
    assert counted > 0.9 * bound
    with torch.no_grad():
        assert result.program.body(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    lines = [n.what for n in result.did if n.where == "candidates"]
    rows = [dict(pair.split("=") for pair in line.split()) for line in lines]
    losses = [float(r["loss"]) for r in rows]
    assert losses == sorted(losses)
    assert [r["kept"] for r in rows] == ["1", *("0" for _ in rows[1:])]
    assert all(int(r["macs"]) <= bound for r in rows)
    assert {n.where for n in result.declined} >= {"linear", "conv1"}
    assert any("16 by 4" in n.what for n in result.did)


def test_the_same_seed_gives_the_same_weights(tmp_path: Path) -> None:
    states = []
    for _ in range(2):
        program = _program()
        config = Config(macs=20_000_000 // 4, candidates=8, samples=24)
        ctx = _context(program, tmp_path, Noise(24))
        states.append(prune_channels.run(program, config, ctx).program.body.state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())


def test_without_calibration_data_it_ranks_by_weights_and_says_so(tmp_path: Path) -> None:
    program = _program()
    result = prune_channels.run(program, Config(macs=6_000_000), _context(program, tmp_path, None))
    assert count(result.program).macs <= 6_000_000
    assert any("no calibration data" in n.why for n in result.did)
    assert not any("loss=" in n.what for n in result.did)


def test_an_unreachable_bound_names_the_smallest_reachable(tmp_path: Path) -> None:
    program = _program()
    smallest, largest = map(int, prune_channels.reachable(program, TARGET))
    assert largest == count(program).macs
    with pytest.raises(InfeasibleError, match=f"EB406.*{smallest}"):
        prune_channels.run(program, Config(macs=smallest - 1), _context(program, tmp_path, None))
    exact = prune_channels.run(_program(), Config(macs=smallest), _context(program, tmp_path, None))
    assert count(exact.program).macs == smallest


def test_a_bound_that_holds_already_changes_nothing(tmp_path: Path) -> None:
    program = _program()
    result = prune_channels.run(program, Config(macs=10**9), _context(program, tmp_path, None))
    assert result.program is program
    assert result.declined[0].why == "already in bound"
    with pytest.raises(UsageError, match="EB155"):
        prune_channels.run(program, Config(macs=0), _context(program, tmp_path, None))


@pytest.mark.parametrize("share", [0.6, 0.8])
def test_a_bound_on_time_cuts_whole_blocks_of_channels(share: float, tmp_path: Path) -> None:
    spec = target_registry.get("npu:ethos-u55-128").spec
    program = _program()
    smallest, macs, least_us, us = prune_channels.reachable(program, spec)
    assert smallest < macs == count(program).macs
    assert least_us < share * us < us
    ctx = replace(_context(program, tmp_path, Noise(48)), target=spec)
    config = Config(us=share * us, candidates=4, samples=48)
    result = prune_channels.run(program, config, ctx)
    left = prune_channels.reachable(result.program, spec)[3]
    assert 0.5 * share * us < left <= share * us
    # 16 channels take as long as 4: a layer of 16 is left alone, wider ones lose blocks.
    for name, layer in result.program.body.named_modules():
        if isinstance(layer, torch.nn.Conv2d):
            assert layer.out_channels % 16 == 0, name


def test_a_time_that_no_widths_reach_is_refused(tmp_path: Path) -> None:
    spec = target_registry.get("npu:ethos-u55-128").spec
    ctx = replace(_context(_program(), tmp_path, None), target=spec)
    with pytest.raises(InfeasibleError, match=r"EB406.* ns "):
        prune_channels.run(_program(), Config(us=1.0), ctx)


@pytest.mark.parametrize("config", [Config(macs=10, us=1.0), Config(us=-1.0), Config(us=1.0)])
def test_a_time_needs_a_target_that_prices_layers_and_no_second_bound(
    config: Config, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="EB155"):
        prune_channels.run(_program(), config, _context(_program(), tmp_path, None))


def test_refitting_the_readers_brings_the_output_nearer_to_the_original(tmp_path: Path) -> None:
    from edgebudget.train import load_tensors

    program = _program()
    call = Caller.of(program)
    data = load_tensors(Noise(64), ["image"])
    # Copies of channels are redundant: what is cut can be made up for entirely.
    conv, norm = program.body.layer3[0].conv1, program.body.layer3[0].bn1
    with torch.no_grad():
        conv.weight[32:] = conv.weight[:32]
    assert norm.weight is not None
    groups = tuple(
        g for g in find_groups(program.body, call, data.inputs).groups if g.name == "layer3.0.conv1"
    )
    gone = removal(groups, [list(range(32))])
    cut = remove_channels(program.body, gone)
    moments = measure(program.body, call, data, 32, ["layer3.0.conv2"], seed=0)
    fixed = remove_channels(program.body, gone)
    assert repair(program.body, fixed, gone, moments) == 1
    with torch.no_grad():
        goal = program.body(data.inputs[0])
        error = float((fixed(data.inputs[0]) - goal).norm() / goal.norm())
        unfixed = float((cut(data.inputs[0]) - goal).norm() / goal.norm())
    assert error < 0.1 * unfixed


def test_a_model_whose_output_hides_the_shapes_is_left_alone(tmp_path: Path) -> None:
    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 16, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.conv(x)
            return y

    program = replace(_program(), body=Plain().eval())
    with pytest.raises(InfeasibleError, match="EB406"):
        prune_channels.run(program, Config(macs=1000), _context(program, tmp_path, None))
