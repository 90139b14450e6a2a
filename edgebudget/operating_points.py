"""From the answers of a chain's exits to the operating points of its manifest.

Temperatures, the signal and the thresholds come from held-back samples answered by the exported
files; every figure that is reported comes from the evaluation set, which decided nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np

from edgebudget import tasks
from edgebudget.certificate import certify, split
from edgebudget.evaluate import Predictions
from edgebudget.exit_signals import Choice, choose_signal
from edgebudget.metrics import hits_at
from edgebudget.temperature import Fitted, fit_temperature
from edgebudget.thresholds import GRID, Ladder, budget_grid, solve
from edgebudget.workload import Array, Task
from edgebudget_runtime.confidence import signal
from edgebudget_runtime.cost import RESOURCES, UNKNOWN, Cost, Evidence, Figure
from edgebudget_runtime.elastic import Certificate, Exit, OperatingPoint
from edgebudget_runtime.quality import Quality

_FAMILY = 32  # settings that a certificate may choose from
_CERTIFY = 0.5  # part of the held-back samples that a certificate keeps for itself
_MEANS = ("macs", "latency_ms", "energy_mj")  # the rest of a cost is that of the worst case


@dataclass(frozen=True, slots=True)
class Answers:
    """What a chain of segments answers, each with an exit that gives `output`.

    `costs[k]` is what leaving at exit k costs; `held_back[k]` and `evaluation[k]` are its
    predictions. Without evaluation data the figures come from the held-back samples, and say so.
    """

    path: tuple[str, ...]
    output: str
    costs: tuple[Cost, ...]
    held_back: tuple[Predictions, ...]
    evaluation: tuple[Predictions, ...] | None
    through: str = "the exported files"


@dataclass(frozen=True, slots=True)
class Promise:
    """A certificate that is wanted: at most `max_drop` lost, at this confidence.

    `reference` says which held-back answers were right before [N]; None: the whole chain's.
    """

    max_drop: float
    confidence: float
    reference: Array | None = None
    against: str = "the whole chain"


@dataclass(frozen=True, slots=True)
class Points:
    """Exits and operating points for a manifest, or why there are none."""

    exits: tuple[Exit, ...] = ()
    points: tuple[OperatingPoint, ...] = ()  # by rising mean cost
    asked: tuple[OperatingPoint, ...] = ()  # one for each budget, rising; some may be equal
    certified: OperatingPoint | None = None  # one of `points`, where it was asked for
    declined: str = ""
    fitted: tuple[Fitted, ...] = ()  # temperatures of every exit, the last included
    signal: Choice | None = None


@dataclass(frozen=True, slots=True)
class _Read:
    """A ladder and where its thresholds belong."""

    answers: Answers
    task: Task
    exits: tuple[Exit, ...]
    shown: Ladder  # of the samples that figures are taken from


def solve_points(
    answers: Answers,
    task: Task,
    *,
    budgets: Sequence[float] | None = None,
    promise: Promise | None = None,
    seed: int = 0,
) -> Points:
    """Solve thresholds for mean MACs.

    Args:
        answers: Of a chain with at least one exit before the last.
        task: Thresholds need one that says of each sample whether it is right.
        budgets: Mean MACs; None is a grid between the first exit and the whole.
        promise: A certificate to find thresholds for. Half of the held-back samples are then
            kept from everything else.
        seed: Of how the held-back samples are divided for it.

    Raises:
        InfeasibleError: EB401, EB402 as `thresholds.solve` and `certificate.certify`.
        UsageError: EB194, EB195 as `certificate.certify`.
    """
    correct = _correct(answers.held_back, answers.output, task)
    if isinstance(correct, str) or len(answers.path) < 2:
        why = correct if isinstance(correct, str) else "there is no exit before the last"
        return Points(declined=why)
    count = correct.shape[1]
    used, kept = split(count, _CERTIFY if promise else 0.0, seed)
    scores = [_scores(p, answers.output) for p in answers.held_back]
    labels = _labels(answers.held_back[0])
    fitted = tuple(fit_temperature(s[used], labels[used]) for s in scores)
    temperatures = [f.temperature for f in fitted]
    chosen = choose_signal([s[used] for s in scores], temperatures, correct[:, used])
    exits = tuple(
        Exit(segment, answers.output, chosen.signal, temperature)
        for segment, temperature in zip(answers.path[:-1], temperatures[:-1], strict=True)
    )
    held = _ladder(answers, answers.held_back, exits, correct)
    read = _Read(answers, task, exits, _shown(answers, exits, task, held))
    part = held.part(used)
    wanted = budget_grid(held.costs, GRID) if budgets is None else tuple(sorted(budgets))
    solved = [(s.budget, s.thresholds) for s in solve(part, wanted)]
    points = [_point(read, f"mean-{100 * b / held.costs[-1]:.3g}", t) for b, t in solved]
    certified = None if promise is None else _certified(read, held, used, kept, promise)
    found = _distinct(points, certified)
    return Points(exits, found, tuple(points), certified, "", fitted, chosen)


def _certified(
    read: _Read, held: Ladder, used: Array, kept: Array, promise: Promise
) -> OperatingPoint:
    part, test = held.part(used), held.part(kept)
    family = [s.thresholds for s in solve(part, budget_grid(held.costs, _FAMILY))]
    family.sort(key=lambda t: -part.outcome(t)[0])  # by what was solved on alone
    rows = np.arange(len(kept))
    early = [test.correct[test.leaves(t), rows] for t in family]
    whole = test.correct[-1]
    reference = whole if promise.reference is None else promise.reference[kept]
    found = certify(
        early, reference,
        max_drop=promise.max_drop, confidence=promise.confidence, against=promise.against,
    )  # fmt: skip
    name = f"drop-{100 * promise.max_drop:.4g}-at-{100 * promise.confidence:.4g}"
    return _point(read, name, family[found.index], found.certificate)


def _point(
    read: _Read, id: str, thresholds: Array, certificate: Certificate | None = None
) -> OperatingPoint:
    """One setting with its figures. Where all leave, the chain ends: no threshold is needed."""
    answers, ladder = read.answers, read.shown
    all_leave = np.flatnonzero(np.isneginf(thresholds))
    last = int(all_leave[0]) if len(all_leave) else len(thresholds)
    path = answers.path[: last + 1]
    ends = ladder.leaves(thresholds)
    shares = np.bincount(ends, minlength=len(answers.path))[: last + 1] / len(ends)
    shown = answers.held_back if answers.evaluation is None else answers.evaluation
    return OperatingPoint(
        id=id,
        path=path,
        thresholds={
            segment: float(t)
            for segment, t in zip(path[:-1], thresholds[:last], strict=True)
            if np.isfinite(t)
        },
        shares={segment: float(s) for segment, s in zip(path, shares, strict=True)},
        mean_cost=mean_cost(answers.costs[: last + 1], ends, _where(answers)),
        quality=_quality(read, shown, ends),
        certificate=certificate,
    )


def mean_cost(costs: Sequence[Cost], ends: Array, where: str) -> Cost:
    """Mean MACs, latency and energy when sample i ends at exit `ends[i]`.

    Parameters, bytes, memory and fallback are those of the last exit: all of it must be there.
    """
    count = len(ends)
    found: dict[str, Figure] = {r: costs[-1].get(r) for r in RESOURCES}
    for resource in RESOURCES:
        each = [c.get(resource) for c in costs]
        values = [f.value for f in each if f.value is not None]
        if resource not in _MEANS:
            continue
        if len(values) < len(each):
            found[resource] = UNKNOWN
            continue
        spent = np.asarray(values)[ends]
        low, high = np.percentile(spent, [25, 75])
        found[resource] = Figure(
            value=float(spent.mean()),
            evidence=_weakest([f.evidence for f in each]),
            how=f"mean over the exits that {count} samples took, {where}; each exit: {each[0].how}",
            device=each[-1].device,
            count=count,
            spread=float(high - low) / 2,
        )
    return Cost(**found)


def _weakest(evidence: Sequence[Evidence]) -> Evidence:
    order = get_args(Evidence)
    return max(evidence, key=order.index)


def _quality(read: _Read, shown: Sequence[Predictions], ends: Array) -> Quality:
    output = read.answers.output
    stacked = np.stack([p.outputs[output] for p in shown])
    mixed = {output: stacked[ends, np.arange(len(ends))]}
    q = read.task.quality(mixed, _labels(shown[0]))
    how = f"thresholds on {read.answers.through}, {_where(read.answers)}"
    return Quality(q.metric, q.value, q.low, q.high, q.count, dict(q.others), how)


def _where(answers: Answers) -> str:
    if answers.evaluation is None:
        return "on the samples that the thresholds were solved on"
    return "on the evaluation set"


def _distinct(
    points: Sequence[OperatingPoint], certified: OperatingPoint | None
) -> tuple[OperatingPoint, ...]:
    """Without settings that are a single sub-network or equal to an earlier one."""
    found: dict[tuple[object, ...], OperatingPoint] = {}
    names: set[str] = set()
    for point in points:
        key = (point.path, *sorted(point.thresholds.items()))
        if point.thresholds and key not in found and point.id not in names:
            found[key] = point
            names.add(point.id)
    kept = [*found.values(), *([certified] if certified else [])]
    return tuple(sorted(kept, key=lambda p: (p.mean_cost.macs.value or 0.0, p.id)))


def _shown(answers: Answers, exits: Sequence[Exit], task: Task, held: Ladder) -> Ladder:
    if answers.evaluation is None:
        return held
    correct = _correct(answers.evaluation, answers.output, task)
    if isinstance(correct, str):  # no labels here: shares and costs are known all the same
        correct = np.zeros((len(answers.path), len(answers.evaluation[0].outputs[answers.output])))
    return _ladder(answers, answers.evaluation, exits, correct)


def _ladder(
    answers: Answers, predictions: Sequence[Predictions], exits: Sequence[Exit], correct: Array
) -> Ladder:
    sure = [
        signal(_scores(p, answers.output), e.signal, e.temperature)
        for p, e in zip(predictions, exits, strict=False)  # the last one has no exit
    ]
    macs = [c.macs.value for c in answers.costs]
    costs = np.array([np.nan if m is None else m for m in macs])
    assert np.isfinite(costs).all(), "MACs are always counted"
    return Ladder(correct, np.stack(sure), costs)


def _correct(predictions: Sequence[Predictions], output: str, task: Task) -> Array | str:
    """Whether each exit is right on each sample, float64 [K, N]; or why nobody can say."""
    if task.kind != "classification":
        return (
            f"{task.metric} does not say of a single sample whether it is right: exits are "
            "depths to choose from, without thresholds"
        )
    if predictions[0].labels is None:
        return "the held-back data has no labels"
    labels = _labels(predictions[0])
    hits = [hits_at(_scores(p, output), labels, 1) for p in predictions]
    return np.stack(hits).astype(np.float64)


def _scores(predictions: Predictions, output: str) -> Array:
    return tasks.class_scores({output: predictions.outputs[output]})


def _labels(predictions: Predictions) -> Array:
    assert predictions.labels is not None, "checked before"
    return predictions.labels.reshape(-1).astype(np.int64)
