from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgebudget.events import Advanced, Event
from edgebudget.nested import Nested
from edgebudget.program import Context, PassResult, Program
from edgebudget.workload import Data, Sample
from edgebudget_models import digits
from edgebudget_passes import slim_width, train_nested
from edgebudget_passes.train_nested import Config
from edgebudget_runtime.errors import UsageError
from tests.passes.nested_nets import Chain, Digits, context, nested, program


@dataclass(frozen=True)
class Bars:
    """Pictures whose class is the row that is bright."""

    count: int
    labelled: bool = True
    name: str = "bars"

    def __len__(self) -> int:
        return self.count

    def sample(self, index: int) -> Sample:
        draw = np.random.default_rng(index)
        picture = 0.3 * draw.standard_normal((1, 8, 8)).astype(np.float32)
        label = index % 8
        picture[0, label] += 1.0
        return Sample({"image": picture}, np.asarray(label) if self.labelled else None)

    def digest(self) -> str:
        return repr(self)


def _slim(base: Program, folder: Path, shares: tuple[float, ...] = (0.6, 0.3)) -> Program:
    config = slim_width.Config(shares=shares, multiple=4)
    return slim_width.run(base, config, context(base, folder)).program


@cache
def _start() -> tuple[Program, Program]:
    """A small network as the original, and itself with two widths."""
    torch.manual_seed(0)
    original = program(Chain(), (1, 1, 8, 8))
    return original, _slim(original, Path())


def _run(folder: Path, config: Config, **more: Any) -> PassResult:
    original, start = _start()
    data = Data(train=Bars(96))
    ctx: Context = context(original, folder, **{"data": data, **more})
    return train_nested.run(start, config, ctx)


def _same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


_SHORT = Config(steps=24, batch=16, lr=0.02, augment="none", checkpoint_every=7, tolerance=9.0)


def test_small_variants_of_the_digits_learn_and_the_whole_stays_as_good(tmp_path: Path) -> None:
    original = program(digits.load(), (1, 1, 8, 8))
    train = Digits(digits.DigitsData("train"))
    start = slim_width.run(
        original,
        slim_width.Config(shares=(0.5, 0.25), candidates=2, samples=128),
        context(original, tmp_path, Digits(digits.DigitsData("calibration"))),
    ).program
    config = Config(steps=80, batch=64)
    result = train_nested.run(start, config, context(original, tmp_path, data=Data(train=train)))
    assert result.did[-1].what.endswith("kept=end")
    evaluation = Digits(digits.DigitsData("evaluation"))
    samples = [evaluation.sample(i) for i in range(len(evaluation))]
    x = torch.from_numpy(np.stack([s.inputs["image"] for s in samples]))
    y = torch.tensor([int(s.target) for s in samples if s.target is not None])

    def right(body: Nested) -> list[float]:
        with torch.no_grad():
            return [float((body.cut(v)(x).argmax(1) == y).float().mean()) for v in body.variants]

    before, after = right(nested(start)), right(nested(result.program))
    assert after[0] >= before[0] - 0.01
    assert after[1] > before[1]
    assert after[2] > before[2] + 0.1
    notes = [n for n in result.did if n.what.startswith("macs=")]
    assert [n.where for n in notes] == [v.name for v in nested(start).variants]


def test_a_run_cut_at_any_checkpoint_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole = _run(tmp_path / "whole", _SHORT)
    assert whole.did[-1].what.endswith("kept=end")
    assert not _same(nested(whole.program), nested(_start()[1]))
    seen = 0

    def cut(event: Event) -> None:
        nonlocal seen
        if isinstance(event, Advanced) and event.work == "train_nested":
            seen += 1
            if seen == 17:
                raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        _run(tmp_path / "cut", _SHORT, emit=cut)
    again = _run(tmp_path / "cut", _SHORT)
    assert _same(nested(again.program), nested(whole.program))


def test_every_variant_ends_with_its_own_statistics(tmp_path: Path) -> None:
    result = _run(tmp_path, _SHORT)
    body = nested(result.program)
    assert any("re-estimated on" in n.what for n in result.did)
    narrow = body.variants[-1]
    rows = body.link(narrow).sources["norm.weight"].kept[0]
    assert rows is not None
    mean = body.cut(narrow).get_buffer("norm.running_mean")
    assert not torch.allclose(mean, body.base.get_buffer("norm.running_mean")[rows])


def test_ctrl_c_and_the_deadline_leave_the_best_so_far(tmp_path: Path) -> None:
    seen = 0

    def interrupt(event: Event) -> None:
        nonlocal seen
        if isinstance(event, Advanced) and event.work == "train_nested":
            seen += 1
            if seen == 10:
                raise KeyboardInterrupt

    cut = _run(tmp_path / "interrupted", _SHORT, emit=interrupt)
    assert cut.ended_early == "interrupt"
    assert any("steps=7 " in n.what for n in (*cut.did, *cut.declined))
    late = _run(tmp_path / "late", _SHORT, deadline=time.monotonic())
    assert late.ended_early == "deadline"
    assert any("steps=1 " in n.what for n in (*late.did, *late.declined))


def test_the_start_is_kept_where_the_whole_would_suffer(tmp_path: Path) -> None:
    config = replace(_SHORT, lr=3.0, tolerance=0.0, alpha=1.0)
    result = _run(tmp_path, config, data=Data(train=Bars(96, labelled=False)))
    assert result.program is _start()[1]
    assert "kept=start" in result.declined[-1].what
    assert "rose by" in result.declined[-1].why


class Exits(nn.Module):
    """Two answers: after one convolution, and after two."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.early = Chain(), nn.Linear(16, 10)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """[N, 1, H, W] -> [N, 10] twice."""
        x = torch.relu(self.body.norm(self.body.first(image)))
        scores = self.body.linear(torch.relu(self.body.second(x)).mean((2, 3)))
        return self.early(x.mean((2, 3))), scores


def test_every_exit_of_every_variant_learns_the_originals_answer(tmp_path: Path) -> None:
    torch.manual_seed(3)
    body = Exits()
    body.body.load_state_dict(_start()[0].body.state_dict())
    exits = replace(program(body, (1, 1, 8, 8)), outputs=("scores.exit1", "scores"))
    original = _start()[0]
    data = Data(train=Bars(96, labelled=False))
    ctx = context(original, tmp_path, data=data)
    start = slim_width.run(exits, slim_width.Config(shares=(0.5,), multiple=4), ctx).program
    config = replace(_SHORT, steps=40, batch=32)
    result = train_nested.run(start, config, ctx)
    assert result.did[-1].what.endswith("kept=end")
    x = torch.from_numpy(np.stack([Bars(64).sample(i).inputs["image"] for i in range(64)]))
    with torch.no_grad():
        wanted = original.body(x).softmax(1)
        for old, new in zip(nested(start).variants, nested(result.program).variants, strict=True):
            was, now = nested(start).cut(old)(x), nested(result.program).cut(new)(x)
            gap = [float((y[0].softmax(1) - wanted).abs().mean()) for y in (was, now)]
            assert gap[1] < gap[0]


def test_without_variants_or_data_it_declines(tmp_path: Path) -> None:
    original, start = _start()
    plain = train_nested.run(original, Config(), context(original, tmp_path))
    assert "no variants" in plain.declined[0].why
    bare = train_nested.run(start, Config(), context(original, tmp_path))
    assert bare.declined[0].why == "no training and no calibration data"


@pytest.mark.parametrize(
    "config", [Config(together=1), Config(batch=0), Config(augment="rotate"), Config(schedule="x")]
)
def test_settings_without_meaning_are_refused(config: Config, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="EB15"):
        _run(tmp_path, config)
