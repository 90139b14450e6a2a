from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgebudget import checkpoints, target_registry
from edgebudget.distill import Distillation
from edgebudget.events import Advanced, Event, Said, ignore
from edgebudget.program import Context, Program, TensorSpec
from edgebudget.tasks import Classification, Regression
from edgebudget.workload import Data, Sample, Task
from edgebudget_passes import recover
from edgebudget_passes.recover import Config
from edgebudget_runtime.budget import Budget
from edgebudget_runtime.errors import ArtifactError, PassError, UsageError

TARGET = target_registry.get("cpu").spec


@dataclass(frozen=True)
class Bars:
    """Pictures whose class is the row that is bright; `size` may differ from the model's."""

    count: int
    size: int = 8
    poison: int = -1  # this sample is not finite
    labelled: bool = True
    name: str = "bars"

    def __len__(self) -> int:
        return self.count

    def sample(self, index: int) -> Sample:
        draw = np.random.default_rng(index)
        picture = 0.3 * draw.standard_normal((1, self.size, self.size)).astype(np.float32)
        label = index % 4
        picture[0, label * self.size // 4 : (label + 1) * self.size // 4] += 1.0
        if index == self.poison:
            picture[0, 0, 0] = np.nan
        return Sample({"x": picture}, np.asarray(label) if self.labelled else None)

    def digest(self) -> str:
        return repr(self)


def _net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d((4, 1)),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(32, 4),
    ).eval()


def _program(body: nn.Module) -> Program:
    return Program("module", body, (TensorSpec("x", (1, 1, 8, 8)),), ("y",))


def _context(folder: Path, data: Data, task: Task | None = None, **more: Any) -> Context:
    base = Context(
        Budget(),
        TARGET,
        task or Classification(),
        data,
        _program(_net(0)),
        7,
        np.random.default_rng(7),
        folder,
        ignore,
    )
    return replace(base, **more)


def _same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


@pytest.mark.parametrize(("optimizer", "lr"), [("sgd", 0.02), ("adamw", 0.01)])
@pytest.mark.parametrize("augment", ["none", "flip"])
def test_it_learns_and_a_run_cut_at_any_checkpoint_ends_with_the_same_bits(
    optimizer: str, lr: float, augment: str, tmp_path: Path
) -> None:
    config = Config(
        steps=30, batch=16, optimizer=optimizer, lr=lr, augment=augment, checkpoint_every=7
    )
    start, data = _program(_net(1)), Data(train=Bars(96))
    whole = recover.run(start, config, _context(tmp_path / "whole", data))
    assert whole.did[-1].what.endswith("kept=end")
    assert not _same(whole.program.body, start.body)
    seen = 0

    def cut(event: Event) -> None:
        nonlocal seen
        if isinstance(event, Advanced) and event.work == "recover":
            seen += 1
            if seen == 17:
                raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        recover.run(start, config, _context(tmp_path / "cut", data, emit=cut))
    again = recover.run(start, config, _context(tmp_path / "cut", data))
    assert _same(again.program.body, whole.program.body)


def test_kill_nine_leaves_a_checkpoint_that_resumes_to_the_same_bits(tmp_path: Path) -> None:
    script = f"""
import sys, importlib.util
from pathlib import Path
spec = importlib.util.spec_from_file_location("case", {str(Path(__file__))!r})
case = importlib.util.module_from_spec(spec); sys.modules["case"] = case
spec.loader.exec_module(case)
case.endless(Path({str(tmp_path / "killed")!r}))
"""
    child = subprocess.Popen([sys.executable, "-c", script])
    file = tmp_path / "killed" / "recover.safetensors"
    for _ in range(600):
        if file.exists() or child.poll() is not None:
            break
        time.sleep(0.1)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert file.exists()
    found = checkpoints.read(file)
    assert found is not None
    assert 0 < found.facts["step"] < 60
    resumed = endless(tmp_path / "killed", wait_s=0.0)
    whole = endless(tmp_path / "whole", wait_s=0.0)
    assert _same(resumed, whole)


def endless(folder: Path, wait_s: float = 0.2) -> nn.Module:
    """A run slow enough to be killed in the middle."""

    def slow(event: Event) -> None:
        if isinstance(event, Advanced) and event.work == "recover":
            time.sleep(wait_s)

    config = Config(steps=60, batch=8, checkpoint_every=2)
    ctx = _context(folder, Data(train=Bars(64)), emit=slow)
    body: nn.Module = recover.run(_program(_net(1)), config, ctx).program.body
    return body


def test_a_damaged_checkpoint_is_reported_and_ignored(tmp_path: Path) -> None:
    said: list[str] = []

    def listen(event: Event) -> None:
        if isinstance(event, Said):
            said.append(event.text)

    (tmp_path / "recover.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0 not a header")
    config, data = Config(steps=4, batch=8), Data(train=Bars(32))
    recover.run(_program(_net(1)), config, _context(tmp_path, data, emit=listen))
    assert any("unreadable checkpoint" in t for t in said)


def test_a_result_that_is_worse_than_the_start_is_not_kept(tmp_path: Path) -> None:
    start = _program(_net(0))  # the teacher itself
    config = Config(steps=20, batch=8, lr=0.5, alpha=1.0, warmup=0.0)
    result = recover.run(start, config, _context(tmp_path, Data(train=Bars(64, labelled=False))))
    assert result.program is start
    assert "kept=start" in result.declined[0].what


def test_ctrl_c_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    seen = 0

    def press(event: Event) -> None:
        nonlocal seen
        if isinstance(event, Advanced) and event.work == "recover":
            seen += 1
            if seen == 12:
                raise KeyboardInterrupt

    config, data = Config(steps=40, batch=16, checkpoint_every=5), Data(train=Bars(96))
    result = recover.run(_program(_net(1)), config, _context(tmp_path, data, emit=press))
    assert result.ended_early == "interrupt"
    assert any("steps=10 " in n.what for n in (*result.did, *result.declined))


def test_a_deadline_that_has_passed_ends_the_run_and_says_so(tmp_path: Path) -> None:
    ctx = _context(tmp_path, Data(train=Bars(64)), deadline=time.monotonic())
    result = recover.run(_program(_net(1)), Config(steps=50, batch=8), ctx)
    assert result.ended_early == "deadline"
    assert any("time limit" in n.why for n in result.did)


class Explosive(nn.Module):
    """Finite in evaluation at the start, infinite once trained a little."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = _net(1)
        self.scale = nn.Parameter(torch.tensor(80.0))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return y * torch.exp(self.scale + 9)


def test_a_loss_that_stays_infinite_is_an_error_after_one_retry(tmp_path: Path) -> None:
    said: list[str] = []

    def listen(event: Event) -> None:
        if isinstance(event, Said):
            said.append(event.text)

    ctx = _context(tmp_path, Data(train=Bars(32)), emit=listen)
    with pytest.raises(PassError, match="EB341"):
        recover.run(_program(Explosive().eval()), Config(steps=5, batch=8), ctx)
    assert sum("lower learning rate" in t for t in said) == 1


def test_data_of_another_size_calibration_only_and_none(tmp_path: Path) -> None:
    config = Config(steps=4, batch=8)
    ctx = _context(tmp_path / "a", Data(train=Bars(32, size=16)))
    assert recover.run(_program(_net(1)), config, ctx).did
    ctx = _context(tmp_path / "b", Data(calibration=Bars(32)))
    result = recover.run(_program(_net(1)), config, ctx)
    assert any("calibration" in n.what for n in result.did)
    result = recover.run(_program(_net(1)), config, _context(tmp_path / "c", Data()))
    assert result.declined[0].why == "no training and no calibration data"


def test_samples_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    ctx = _context(tmp_path, Data(train=Bars(32, poison=5)))
    with pytest.raises(ArtifactError, match=r"EB560.*sample 5 of bars.*not finite"):
        recover.run(_program(_net(1)), Config(epochs=2, batch=8), ctx)


@pytest.mark.parametrize(
    "config",
    [
        Config(optimizer="adamm"),
        Config(augment="rotate"),
        Config(batch=0),
        Config(steps=-1),
        Config(schedule="rexx"),
    ],
)
def test_settings_without_meaning_are_refused(config: Config, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="EB15"):
        recover.run(_program(_net(1)), config, _context(tmp_path, Data(train=Bars(32))))


def test_losses_vanish_at_the_teacher_and_grow_away_from_it() -> None:
    y = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    for kind in ("classification", "regression", "detection", "custom"):
        loss = Distillation(kind, alpha=1.0)
        here = float(loss.loss((y,), (y,), None))
        away = float(loss.loss((y.roll(1, 0),), (y,), None))
        assert here == pytest.approx(0.0, abs=1e-6)
        assert away > 0.01


def test_rank_term_prefers_the_labels_order() -> None:
    labels = torch.tensor([0.1, 0.5, 0.9])
    same = Distillation("regression", alpha=0.0, rank=1.0)
    good = same.loss((labels[:, None],), (labels[:, None],), labels)
    bad = same.loss((labels.flip(0)[:, None],), (labels[:, None],), labels)
    assert bool(bad > good)


def test_regression_learns_from_numbers(tmp_path: Path) -> None:
    ctx = _context(tmp_path, Data(train=Bars(64)), task=Regression())
    wide = _program(nn.Sequential(_net(1), nn.Linear(4, 1)).eval())
    ctx = replace(ctx, original=_program(nn.Sequential(_net(0), nn.Linear(4, 1)).eval()))
    result = recover.run(wide, Config(steps=40, batch=16), ctx)
    assert result.did[-1].what.endswith("kept=end")


def test_pictures_are_mirrored_only_where_the_original_does_not_mind(tmp_path: Path) -> None:
    class Side(nn.Module):
        """Says which half is brighter, or how bright the whole is."""

        def __init__(self, asks_side: bool) -> None:
            super().__init__()
            self.asks_side, self.gain = asks_side, nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            left, right = x[..., :4].mean((1, 2, 3)), x[..., 4:].mean((1, 2, 3))
            first, second = (left, right) if self.asks_side else (left + right, 0 * left + 0.25)
            return self.gain * torch.stack([first, second], 1)

    for asks_side, expected in ((True, "augment=none"), (False, "augment=flip")):
        ctx = _context(tmp_path / expected, Data(train=Bars(64, labelled=False)))
        body = Side(asks_side).eval()
        ctx = replace(ctx, original=_program(body))
        result = recover.run(_program(body), Config(steps=2, batch=8), ctx)
        assert any(n.what == expected for n in result.did)
