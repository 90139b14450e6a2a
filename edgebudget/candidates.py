"""Points of the design space that meet a bound, and how good each looks untrained.

The bound is on MACs; or, for a latency limit on a target that prices layers, on their time.
Each candidate is a short list of module-stage steps. Its MACs are counted exactly; its quality
is probed on calibration data (batch-norm statistics refreshed by the passes, no training).
Source of the selection by refreshed statistics: "Distributed Pruning Towards Tiny Neural
Networks in Federated Learning" (FedTiny, 2022).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from edgebudget import registry
from edgebudget.evaluate import Predictions, distance, predict, runner_of, score
from edgebudget.pipeline import Built, Setting, run_module_steps
from edgebudget.plan import Step
from edgebudget.workload import Dataset, Quality
from edgebudget_runtime.errors import EdgeBudgetError

if TYPE_CHECKING:
    from edgebudget.program import Program

NEAR = 0.05  # output error, in variances, that recovery closes; dearer candidates are not built
_PROBE_MACS = 1e12  # multiply-accumulates spent on looking at one candidate
_LARGE_MACS = 1e10  # of a model that is dear to look at: its widths are searched with less work
_SEARCH_MACS = 1.5e12
_ROUGH_MACS, _ROUGH_CANDIDATES = 3e11, 3  # of a search that only has to find what a bound costs
_CLOSE = 0.9  # of the bound: amounts of other input sizes are estimates


@dataclass(frozen=True, slots=True)
class Candidate:
    """A point that keeps the bound. `distance` is the output error against the original."""

    label: str
    steps: tuple[Step, ...]
    macs: float
    params: float
    distance: float | None = None
    quality: Quality | None = None
    original: Quality | None = None  # of the untouched model, on the same samples
    refused: str = ""  # why it cannot be built, if it cannot
    us: float | None = None  # of its layers, where the bound is on time
    tried: float | None = None  # `distance` after a short training, where that had to decide

    @property
    def amount(self) -> float:
        """What the bound is on: MACs, or microseconds of layers."""
        return self.macs if self.us is None else self.us


@dataclass(frozen=True, slots=True)
class Reach:
    """What module-stage passes can reach for this model, from cheap counts, in `unit`."""

    macs: float  # of the original
    scales: tuple[float, ...]  # input scales that the network can take, 1.0 not included
    pruned: float  # smallest amount by pruning alone
    reasons: tuple[str, ...] = field(default_factory=tuple)  # why a pass does not apply
    us: float | None = None  # of the original's layers, where time is bounded
    scaled: tuple[tuple[float, float], ...] = ()  # by scale: whole, and pruned as far as it goes

    @property
    def whole(self) -> float:
        """The original's amount."""
        return self.macs if self.us is None else self.us

    @property
    def unit(self) -> str:
        """What amounts are of."""
        return "MACs" if self.us is None else "us of layer time"

    @property
    def smallest(self) -> float:
        """Smallest amount by everything at once (pruned network at the smallest scale)."""
        return min((self.pruned, *(self.at(s)[1] for s in self.scales)))

    def at(self, scale: float) -> tuple[float, float]:
        """Amounts at an input scale, whole and pruned: by its square, unless more is known."""
        if self.scaled:
            return self.scaled[self.scales.index(scale)]
        return self.whole * scale * scale, self.pruned * scale * scale


def by_time(setting: Setting) -> bool:
    """Whether candidates are made for a time: a latency is limited, MACs are not."""
    priced = setting.target.layer_time is not None
    limits = {x.resource for x in setting.budget.limits}
    return priced and "latency_ms" in limits and "macs" not in limits


def reach(setting: Setting, start: Built, macs: float) -> Reach:
    """Find what each structural pass could reach at best, without training or data."""
    program = start.program
    if program.stage == "graph":
        why = "the model is a graph file: structural passes need the module (.py, .pt2, zoo, HF)"
        return Reach(macs, (), macs, (why,))
    reasons: list[str] = []
    scales = tuple(s for s in _reach(setting, program, "scale_resolution", reasons) if s < 1.0)
    if not scales:
        reasons.append("scale_resolution: the network takes no smaller input")
    found = _reach(setting, program, "prune_channels", reasons)
    timed = by_time(setting) and len(found) == 4
    pruned, whole = found[2:] if timed else (found[0] if found else macs, macs)
    if pruned >= whole:
        reasons.append("prune_channels: no channel group can shrink")
    if not timed:
        return Reach(macs, scales, pruned, tuple(reasons))
    at = {s: _time_at(setting, start, s) for s in scales}
    able = {s: times for s, times in at.items() if times is not None}
    return Reach(macs, tuple(able), pruned, tuple(reasons), us=whole, scaled=tuple(able.values()))


def _time_at(setting: Setting, start: Built, scale: float) -> tuple[float, float] | None:
    """Layer time on a smaller picture, whole and pruned as far as it goes.

    It does not fall with the square of the scale: weights are read whatever the picture.
    """
    resize = registry.get("scale_resolution")
    try:
        built = run_module_steps(setting, start, (Step(resize.name, resize.config(scale=scale)),))
    except EdgeBudgetError:
        return None
    found = _reach(setting, built.program, "prune_channels", [])
    return (found[3], found[2]) if built.records[-1].did and len(found) == 4 else None


def _reach(setting: Setting, program: Program, name: str, reasons: list[str]) -> tuple[float, ...]:
    look = registry.get(name).reach
    assert look is not None, f"{name} does not say what it can reach"
    try:
        return look(program, setting.target)
    except EdgeBudgetError as e:
        reasons.append(f"{name}: {e.what}")
        return ()


def enumerate_points(
    found: Reach, cap: float, *, rough: bool = False
) -> list[tuple[str, tuple[Step, ...]]]:
    """Labels and steps of points at or under `cap`, in MACs or time: each pass alone, then both.

    `rough` searches widths with little work: what they cost is known well enough for a draft.
    """
    if found.whole <= cap:
        return [("original", ())]
    resize, prune = registry.get("scale_resolution"), registry.get("prune_channels")

    def scaled(s: float) -> Step:
        why = f"work falls with the square of the input scale: {s:.3f}^2 = {s * s:.2f}"
        return Step(resize.name, resize.config(scale=s), why)

    def pruned() -> Step:
        why = f"channel groups shrink to at most {cap:.4g} {found.unit}"
        work: dict[str, float] = {}
        if rough:
            work = {"search_macs": _ROUGH_MACS, "candidates": _ROUGH_CANDIDATES}
        elif found.macs > _LARGE_MACS:
            work = {"search_macs": _SEARCH_MACS}
        bound = {"macs": math.floor(cap)} if found.us is None else {"us": float(f"{cap:.6g}")}
        return Step(prune.name, prune.config(**bound, **work), why)

    points: list[tuple[str, tuple[Step, ...]]] = []
    fits = sorted((s for s in found.scales if found.at(s)[0] <= cap * 1.02), reverse=True)
    points += [(f"scale {s:.3f}", (scaled(s),)) for s in fits[:2]]
    if found.pruned <= cap < found.whole:
        points.append(("prune", (pruned(),)))
    half = math.sqrt(math.sqrt(cap / found.whole))  # each pass takes half of the reduction
    between = [s for s in found.scales if found.at(s)[0] > cap * _CLOSE and found.at(s)[1] <= cap]
    if between and found.pruned < found.whole:
        s = min(between, key=lambda v: abs(v - half))
        points.append((f"scale {s:.3f} + prune", (scaled(s), pruned())))
    if not points:
        s = min(found.scales, default=1.0)
        points.append((f"scale {s:.3f} + prune", (scaled(s), pruned())))
    return points


def probe(
    setting: Setting, start: Built, label: str, steps: tuple[Step, ...], reference: Predictions
) -> Candidate:
    """Build a candidate without training and score it on the calibration samples."""
    try:
        built = run_module_steps(setting, start, steps) if steps else start
    except EdgeBudgetError as e:
        return Candidate(label, steps, math.nan, math.nan, refused=e.what)
    unable = [r.declined[0].why for r in built.records if not r.did and r.declined]
    cost = setting.cost(built.program)
    us = _layers_us(setting, built.program) if by_time(setting) else None
    found = Candidate(label, steps, cost.macs.value or 0.0, cost.params.value or 0.0, us=us)
    if unable:
        return replace(found, refused=unable[0])
    dataset = setting.workload.data.calibration
    if dataset is None:
        return found
    indices = probe_indices(dataset, found.macs)
    answers = predict(
        runner_of(built.program), dataset, indices=indices, work=f"probe {label}", emit=setting.emit
    )
    near = Predictions(
        {k: v[: len(indices)] for k, v in reference.outputs.items()},
        None if reference.labels is None else reference.labels[: len(indices)],
    )
    return replace(
        found,
        distance=distance(answers, near),
        quality=_try_score(setting, answers, near),
        original=_try_score(setting, near, near),
    )


def _layers_us(setting: Setting, program: Program) -> float | None:
    found = _reach(setting, program, "prune_channels", [])
    return found[3] if len(found) == 4 else None


def probe_indices(dataset: Dataset, macs: float) -> list[int]:
    """The calibration samples a probe looks at: fewer for dearer models, at least 8."""
    n = int(max(8, min(256, _PROBE_MACS / max(macs, 1.0))))
    return list(range(min(n, len(dataset))))


def _try_score(setting: Setting, answers: Predictions, reference: Predictions) -> Quality | None:
    task = setting.workload.task
    if not task.needs_reference and answers.labels is None:
        return None
    return score(task, answers, reference)


def best(candidates: list[Candidate], cap: float) -> Candidate | None:
    """The candidate nearest to the original among those that can be built and keep the bound.

    Where some were trained for a little while, these were the ones to choose from.
    """
    able = [c for c in candidates if not c.refused and c.amount <= cap]
    tried = [(c.tried, c.label, c) for c in able if c.tried is not None]
    if tried:
        return min(tried)[2]
    if not able:
        return None
    return min(able, key=lambda c: (c.distance if c.distance is not None else c.amount, c.label))
