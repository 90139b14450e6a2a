"""A training loop of a fixed number of steps that can be killed at any moment and resumed."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from edgebudget import checkpoints, schedules
from edgebudget.checkpoints import Checkpoint
from edgebudget.distill import Loss
from edgebudget.events import Advanced, Emit, Finished, Said, Started
from edgebudget.program import Note
from edgebudget.train import Caller, TensorData
from edgebudget_passes._train_feed import Feed
from edgebudget_runtime.errors import PassError

_RATES = {"sgd": 0.003, "adamw": 3e-4}  # for 100 steps
_RATE_GROWTH = (0.5, 1.5)  # three times the rate undid what a pruned ResNet-56 had kept
_BACK_OFF = 0.2
_TIMED_STEPS = 20  # before the deadline is compared with the pace


@dataclass(slots=True)
class FineTune:
    """`run` trains `student` in place; dropout stays off, so that a seed decides everything.

    `rates` gives each parameter the multiple of the rate of the first prefix that its name has;
    parameters and normalisation statistics without one are not touched. Without a `teacher` the
    student's last output teaches, which is only of use where that one stands still.
    """

    student: nn.Module
    teacher: nn.Module | None
    forward: Caller
    feed: Feed
    loss: Loss
    settings: Mapping[str, Any]
    steps: int
    folder: Path
    deadline: float | None
    emit: Emit
    work: str = "recover"  # what events, notes and the checkpoint file are called
    rates: tuple[tuple[str, float], ...] = (("", 1.0),)
    notes: list[Note] = field(default_factory=list)
    optimizer: torch.optim.Optimizer = field(init=False)
    _good: Checkpoint = field(init=False)
    rate_scale: float = 1.0
    step: int = 0
    ended_early: Literal["", "deadline", "interrupt"] = ""

    def run(self) -> int:
        """Train, and return the number of steps done.

        Ctrl-C ends it at the last checkpoint; before the first it passes through.

        Raises:
            PassError: EB341, the loss is not finite even at a lower rate.
        """
        wanted = [p.requires_grad for p in self.student.parameters()]
        for name, p in self.student.named_parameters():
            p.requires_grad_(p.is_floating_point() and self._rate(name) > 0)
        self._to(torch.channels_last)
        self.optimizer = self._new_optimizer()
        identity = self._identity()
        self._resume(identity)
        self.emit(Started(self.work, self.steps))
        if self.step:
            self.emit(Advanced(self.work, self.step, "resumed"))
        self._good = self._state(identity)
        try:
            self._loop(identity)
        except KeyboardInterrupt:
            self._load(self._good)  # the step that was cut may have left half an update
            if self.step == 0:
                raise
            self.ended_early = "interrupt"
        self.emit(Finished(self.work))
        self.optimizer.zero_grad(set_to_none=True)
        self._to(torch.contiguous_format)
        for p, flag in zip(self.student.parameters(), wanted, strict=True):
            p.requires_grad_(flag)
        self.student.eval()
        return self.step

    def _loop(self, identity: str) -> None:
        started, first = time.monotonic(), self.step
        while self.step < self.steps:
            value = self._one_step()
            if not math.isfinite(value):
                self._back_off(self._good, value)
                continue
            self.step += 1
            self.emit(Advanced(self.work, 1, f"loss {value:.4f}"))
            if self.step - first == _TIMED_STEPS:
                self._fit_deadline((time.monotonic() - started) / _TIMED_STEPS)
            if self.step % int(self.settings["checkpoint_every"]) == 0:
                self._good = self._state(identity)
                if not self.ended_early:  # a shortened schedule is no start of the whole one
                    checkpoints.write(self._path, self._good)
            if self.deadline is not None and time.monotonic() > self.deadline:
                why = f"the time limit was reached at step {self.step} of {self.steps}"
                self.notes.append(Note(self.work, "stopped early", why))
                self.ended_early = "deadline"
                break

    @property
    def _path(self) -> Path:
        return self.folder / f"{self.work}.safetensors"

    def _to(self, layout: torch.memory_format) -> None:
        # A quarter faster on CPUs for convolutions, the same for everything else.
        for body in (self.student, self.teacher):
            for p in body.parameters() if body is not None else ():
                if p.dim() == 4:
                    p.data = p.data.contiguous(memory_format=layout)

    def _rate(self, name: str) -> float:
        return next((rate for prefix, rate in self.rates if name.startswith(prefix)), 0.0)

    def _new_optimizer(self) -> torch.optim.Optimizer:
        """Biases and normalisation are not decayed."""
        grouped: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, p in self.student.named_parameters():
            if p.requires_grad:
                decay = float(self.settings["weight_decay"]) if p.dim() > 1 else 0.0
                grouped.setdefault((self._rate(name), -decay), []).append(p)
        groups: list[dict[str, Any]] = [
            {"params": grouped[key], "weight_decay": -key[1], "multiple": key[0]}
            for key in sorted(grouped)
        ]
        if self.settings["optimizer"] == "adamw":
            return torch.optim.AdamW(groups, lr=1.0)
        return torch.optim.SGD(groups, lr=1.0, momentum=0.9, nesterov=True)

    def _one_step(self) -> float:
        settings = self.settings
        peak = float(settings["lr"]) or self._usual_rate()
        warmup = round(float(settings["warmup"]) * self.steps)
        share = schedules.factor(str(settings["schedule"]), self.step, self.steps, warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = peak * self.rate_scale * share * group["multiple"]
        frozen = self.step >= self.steps * (1.0 - float(settings["bn_freeze"]))
        self._set_modes(frozen)
        value = self._learn(self.feed.batch(self.step))
        if not math.isfinite(value):
            return value
        if float(settings["clip"]) > 0:
            norm = nn.utils.clip_grad_norm_(self.student.parameters(), float(settings["clip"]))
            if not bool(torch.isfinite(norm)):
                return math.nan
        self.optimizer.step()
        return value

    def _set_modes(self, frozen: bool) -> None:
        self.student.eval()
        for name, m in self.student.named_modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm) and self._rate(name) > 0:
                m.training = not frozen

    def _learn(self, data: TensorData) -> float:
        """Leave the gradients of one batch in the parameters; its loss, finite or not."""
        taught = None
        if self.teacher is not None:
            with torch.no_grad():
                taught = self.forward(self.teacher, data.inputs)
        with torch.enable_grad():
            answers = self.forward(self.student, data.inputs)
            if taught is None:
                taught = (answers[-1].detach(),)
            loss = self.loss.loss(answers, taught, data.labels)
            value = float(loss.detach())
            if math.isfinite(value):
                self.optimizer.zero_grad(set_to_none=True)
                torch.autograd.backward(loss)
        return value

    def _usual_rate(self) -> float:
        low, high = _RATE_GROWTH
        growth = min(high, max(low, math.sqrt(self.steps / 100)))
        return _RATES[str(self.settings["optimizer"])] * growth

    def _back_off(self, good: Checkpoint, value: float) -> None:
        if self.rate_scale < 1.0:
            raise PassError(
                "EB341",
                f"{self.work}: the loss is {value} at step {self.step}, also at a lower rate",
                hint="set a smaller `lr`, or check the training samples",
            )
        failed = self.step
        self._load(good)
        self.rate_scale = _BACK_OFF
        why = f"the loss was {value} at step {failed}; restarted from step {self.step}"
        self.notes.append(Note(self.work, f"lr x {_BACK_OFF}", why))
        self.emit(Said("warning", f"{self.work}: lower learning rate: {why}"))

    def _fit_deadline(self, pace_s: float) -> None:
        """Shorten the schedule to what the time allows: a decayed end beats a cut-off one."""
        if self.deadline is None:
            return
        left = int((self.deadline - time.monotonic()) / pace_s)
        if self.step + left < self.steps:
            why = f"{pace_s:.3f} s a step, time for {left} more"
            self.notes.append(Note(self.work, f"steps {self.steps} -> {self.step + left}", why))
            self.emit(Said("warning", f"{self.work}: fewer steps for the time limit: {why}"))
            self.steps = max(self.step + 1, self.step + left)
            self.ended_early = "deadline"

    def _identity(self) -> str:
        """What a checkpoint must have been made of to be continued here."""
        total = hashlib.sha256()
        for name, value in self.student.state_dict().items():
            total.update(name.encode())
            total.update(value.detach().contiguous().numpy().tobytes())
        facts = {k: v for k, v in self.settings.items() if k != "checkpoint_every"}
        total.update(
            json.dumps([facts, self.rates, self.steps, self.feed.seed], sort_keys=True).encode()
        )
        total.update(self.feed.order.numpy().tobytes())
        total.update(self.feed.dataset.digest().encode())
        return total.hexdigest()

    def _state(self, identity: str) -> Checkpoint:
        tensors = checkpoints.flatten("student", self.student.state_dict())
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= checkpoints.flatten(f"optimizer.{index}", state)
        copied = {k: v.detach().clone() for k, v in tensors.items()}
        facts = {
            "identity": identity,
            "step": self.step,
            "steps": self.steps,
            "rate_scale": self.rate_scale,
            "notes": [[n.where, n.what, n.why] for n in self.notes],
        }
        return Checkpoint(copied, facts)

    def _resume(self, identity: str) -> None:
        found = checkpoints.read(self._path)
        if found is None:
            if self._path.exists():
                said = f"{self.work}: unreadable checkpoint; starting anew"
                self.emit(Said("warning", said))
            return
        if found.facts.get("identity") != identity:
            said = f"{self.work}: the checkpoint is of another run; starting anew"
            self.emit(Said("info", said))
            return
        self._load(found)
        self.notes[:] = [Note(*n) for n in found.facts["notes"]]

    def _load(self, found: Checkpoint) -> None:
        with torch.no_grad():
            for name, value in self.student.state_dict().items():
                value.copy_(found.tensors[f"student.{name}"])
        states: dict[int, dict[str, Tensor]] = {}
        for key, value in found.tensors.items():
            kind, _, rest = key.partition(".")
            if kind == "optimizer":
                index, _, name = rest.partition(".")
                states.setdefault(int(index), {})[name] = value.clone()
        self.optimizer = self._new_optimizer()
        if states:
            whole = self.optimizer.state_dict()
            self.optimizer.load_state_dict({**whole, "state": states})
        self.step = int(found.facts["step"])
        self.steps = int(found.facts["steps"])
        self.rate_scale = float(found.facts["rate_scale"])
