"""Train exits: the heads alone, or the whole network where its own answer does not suffer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from edgebudget.distill import EveryExit, Loss
from edgebudget.events import Said
from edgebudget.program import Context, Note
from edgebudget.train import Caller, outputs_over
from edgebudget_passes._exit_choice import Judge, Lesson
from edgebudget_passes._exit_heads import Head
from edgebudget_passes._exit_network import ExitNetwork
from edgebudget_passes._fine_tune import FineTune
from edgebudget_passes._train_feed import Feed

Mode = Literal["frozen", "joint"]
_HEAD_RATE = 10.0  # times the rate of layers that have been trained before
_EARLY_WEIGHT = 0.5  # of the final answer's ("Dynamic Perceiver ...", 2023)
_POINTS, _SHARE = 0.002, 0.005  # of quality that the final answer may lose to joint training


@dataclass(frozen=True, slots=True)
class Logarithms:
    """A loss for models that answer with probabilities where it expects scores."""

    one: Loss

    def loss(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor], labels: Tensor | None
    ) -> Tensor:
        """The loss of the logarithms; those differ from scores by a constant."""
        s, t = ([x.clamp_min(1e-12).log() for x in side] for side in (student, teacher))
        return self.one.loss(s, t, labels)


@dataclass(slots=True)
class Training:
    """Everything but the network. `judge` is for the held-back samples.

    `is_original`: the network answers what the teacher answers as long as it is not trained.
    """

    ctx: Context
    forward: Caller  # of the network with exits
    teacher: nn.Module
    is_original: bool
    loss: Loss
    feed: Callable[[int], Feed]  # by number of steps
    steps: int
    weights: tuple[float, ...]  # of early exits in joint training; none: as usual
    labels: bool
    settings: Mapping[str, Any]
    held: Lesson
    judge: Judge
    notes: list[Note] = field(default_factory=list)
    ended_early: Literal["", "deadline", "interrupt"] = ""

    def run(self, start: ExitNetwork, mode: Mode) -> ExitNetwork:
        """The trained network; the body of a frozen one is a copy of the start's, bit by bit.

        Raises:
            PassError: EB341, the loss is not finite even at a lower rate.
        """
        if mode == "frozen":
            return self._frozen(start)
        was = self.answers(start)[-1]
        student = self._tuned(start, "joint", self.steps)
        now = self.answers(student)[-1]
        before, after = self.judge.quality(was), self.judge.quality(now)
        if before - after <= max(_allowed(self.judge, before), self.judge.noise(was, now)):
            what = f"joint final_before={before:.4f} final_after={after:.4f} kept=joint"
            self.notes.append(Note("training", what))
            return student
        what = f"joint final_before={before:.4f} final_after={after:.4f} kept=frozen"
        self.notes.append(Note("training", what, "joint training made the final answer worse"))
        self.ctx.emit(Said("warning", "insert_exits: the final answer suffered; heads alone learn"))
        return start if self.ended_early else self._frozen(start)

    def fit(self, start: ExitNetwork, steps: int) -> tuple[list[Head], Sequence[Tensor]]:
        """Heads after a few steps on the still network, and their held-back answers."""
        student = self._tuned(start, "fit", steps)
        heads = [head for head in student.exits if isinstance(head, Head)]
        return heads, self.answers(student)[:-1]

    def answers(self, network: nn.Module) -> tuple[Tensor, ...]:
        """All exits' answers to the held-back samples."""
        return outputs_over(self.forward, network, self.held.data, int(self.settings["batch"]))

    def _frozen(self, start: ExitNetwork) -> ExitNetwork:
        """Each head as trained, or as it was where that answered held-back samples better."""
        student = self._tuned(start, "frozen", self.steps)
        before, after = (self._losses(self.answers(n)) for n in (start, student))
        better = [b < a for a, b in zip(before, after, strict=True)]
        if not all(better):
            which = ", ".join(str(k + 1) for k, good in enumerate(better) if not good)
            why = "training made the held-back loss worse"
            self.notes.append(Note("training", f"heads kept as fitted: {which}", why))
        pairs = zip(student.exits, start.exits, better, strict=True)
        return start.with_heads([new if good else old for new, old, good in pairs], start.taps)

    def _losses(self, answers: Sequence[Tensor]) -> list[float]:
        """The held-back loss of each early exit."""
        taught, labels = self.held.answers, self.held.data.labels if self.labels else None
        return [float(self.loss.loss((a,), (taught,), labels)) for a in answers[:-1]]

    def _tuned(
        self, start: ExitNetwork, mode: Literal["fit", "frozen", "joint"], steps: int
    ) -> ExitNetwork:
        rates = (("exits.", _HEAD_RATE), ("network.", 1.0 if mode == "joint" else 0.0))
        early = self.weights[: len(start.taps)] if mode == "joint" else ()
        early = early or (_EARLY_WEIGHT,) * len(start.taps)
        tuner = FineTune(
            student=copy.deepcopy(start),
            teacher=None if mode != "joint" and self.is_original else self.teacher,
            forward=self.forward,
            feed=self.feed(steps),
            loss=EveryExit(self.loss, (*early, 1.0 if mode == "joint" else 0.0)),
            # Untrained convolutions come nearest to what they can do in few steps with this one.
            settings={**self.settings, "optimizer": "adamw"} if mode == "fit" else self.settings,
            steps=steps,
            folder=self.ctx.workdir,
            deadline=self.ctx.deadline,
            emit=self.ctx.emit,
            work=f"insert_exits-{mode}",
            rates=rates,
        )
        done = tuner.run()
        self.notes += [Note("training", f"{mode} steps={done}"), *tuner.notes]
        self.ended_early = tuner.ended_early or self.ended_early
        trained = tuner.student
        assert isinstance(trained, ExitNetwork)
        return trained


def _allowed(judge: Judge, quality: float) -> float:
    """A drop of quality that counts as none."""
    return _POINTS if judge.task.kind == "classification" else _SHARE * abs(quality)


def undominated(judge: Judge, answers: Sequence[Tensor], floor: float) -> list[tuple[int, str]]:
    """Early exits to drop, with why: not better than a cheaper one by more than noise.

    The first has to beat a constant answer; `answers` are those of all exits, the final one last.
    """
    dropped: list[tuple[int, str]] = []
    best, best_answers, name = floor, answers[-1].mean(0, keepdim=True), "a constant answer"
    best_answers = best_answers.expand_as(answers[-1]).contiguous()
    for k, given in enumerate(answers[:-1]):
        quality, noise = judge.quality(given), judge.noise(given, best_answers)
        if quality - best <= noise:
            why = f"{quality:.4f} is not better than {best:.4f} of {name} by more than {noise:.4f}"
            dropped.append((k, why))
        else:
            best, best_answers, name = quality, given, f"exit {k + 1}"
    return dropped
