"""Untrained drafts of a plan: what it costs on the target before anything dear is spent.

Weights' values do not change a cost. Where a predictor knows the device, it tells which candidates
can keep a latency; drafts of the chosen one are measured, and scale what it says next. What is
tightened is a bound on MACs, or on the time of layers where the target prices them. Of a model
whose widths take long to search, drafts come from a rough search until the bound is found.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebudget import planner
from edgebudget.candidates import Candidate, Reach
from edgebudget.events import Said
from edgebudget.pipeline import run_steps
from edgebudget.plan import Plan
from edgebudget.predictors import find
from edgebudget.target import Predicts, TellsKernels
from edgebudget.verify import dear_cost, file_cost
from edgebudget_runtime.errors import InfeasibleError, TargetError

if TYPE_CHECKING:
    from edgebudget.job import Job
    from edgebudget.plan import Step
    from edgebudget.planner import Proposal
    from edgebudget_runtime.budget import Limit
    from edgebudget_runtime.cost import Cost, Resource

_RUNS = 20
_DRAFTS = 8  # how often the bound is tightened
_ROOM = 0.97  # of a limit on time that a draft may use: the proof measures again
_BELIEVED = 1.1  # times what would do that a prediction may show before it counts
_FLOATS = "not quantized: as drafts were measured, float keeps the limits where 8 bits do not"
_SHARE = 0.97  # of the amount that would just do
_NEARLY = 1.02  # times the smallest reachable amount, which is an estimate
_AGAIN = 2  # drafts between one that fits and one that does not
_USED = 0.85  # of a limit, from which a draft that fits is taken
_WORTH = 1.05  # times a bound, below which another is not worth a draft
_STEEPEST = 0.2  # of a bound that the next one keeps, however little the last step saved
_DEAR_MACS = 1e8  # of a model whose whole search is not worth a draft


@dataclass(slots=True)
class _Known:
    """What drafts have shown: bounds, each with the worst cost over its limit."""

    found: Reach  # by whatever bound
    rough: bool  # whether drafts come from a rough search
    points: list[tuple[float, float]] = field(default_factory=list)  # that break a limit
    scale: float | None = None  # measured statistic over predicted time
    floats: bool = False  # whether a draft in float has cost less than in 8 bits
    again: int = 0  # drafts larger than one that fitted


@dataclass(frozen=True, slots=True)
class _Fit:
    """A plan and the bound it was made for."""

    proposal: Proposal
    cap: float
    over: float  # its draft's worst cost over the limit


def fitted(job: Job, proposal: Proposal, *, share: float = 1.0) -> Proposal:
    """Tighten the bound until an untrained draft keeps bytes, memory, latency and energy too.

    A draft that leaves much of its limit unused is followed by a few between it and the last that
    broke it: the largest that fits is taken. `share` below 1 leaves room under limits on time,
    after a proof has missed one.

    Raises:
        InfeasibleError: EB404, the smallest draft that can be built still breaks a limit.
    """
    budget = job.setting.budget
    if not {x.resource for x in budget.limits} - {"macs", "fallback_nodes"}:
        return proposal
    found = proposal.reach
    cap = min(budget.limit("macs") or math.inf, found.whole or math.inf)
    known = _Known(found, rough=found.macs >= _DEAR_MACS)
    fit = _narrowed(job, proposal, cap, share, known)
    if known.rough and fit.proposal is not proposal and not job.setting.late:
        known.rough, known.again = False, _AGAIN
        fit = _narrowed(job, _propose(job, fit.cap, known), fit.cap, share, known)
    return fit.proposal


def _narrowed(job: Job, proposal: Proposal, cap: float, share: float, known: _Known) -> _Fit:
    """The largest draft that fits, from one under `cap`; the last one where none did in time."""
    fit = None
    for _ in range(_DRAFTS):
        if job.setting.late:
            job.setting.emit(Said("warning", "the time limit has passed: no draft is tried"))
            break
        cost, drafted = _draft_cost(job, proposal.plan, known, share)
        over = _over(job, cost, share)
        if over <= 1.0:
            same = drafted is proposal.plan
            fit = _Fit(proposal if same else replace(proposal, plan=drafted), cap, over)
        else:
            known.points.append((cap, over))
        if fit is None:
            cap, proposal = _smaller(job, cost, share, known)
            continue
        if known.again == _AGAIN or fit.over > _USED:
            break
        known.again += 1
        larger = _larger(job, fit, known)
        if larger is None:
            break
        cap, proposal = larger
    return fit or _Fit(proposal, cap, math.inf)


def _smaller(job: Job, cost: Cost, share: float, known: _Known) -> tuple[float, Proposal]:
    """A smaller bound after one that breaks a limit by `cost`, and candidates that keep it.

    Where nothing keeps the bound that should do, one between may still have candidates.
    """
    found, (drafted, _) = known.found, known.points[-1]
    least = found.smallest * _NEARLY
    if drafted <= least:
        raise _beyond(job, cost, share, drafted, found.unit)
    cap = max(_lower(known.points), least)  # the smallest itself is tried before refusing
    while True:
        job.setting.emit(Said("info", f"a draft breaks a limit: trying {cap:.4g} {found.unit}"))
        try:
            return cap, _propose(job, cap, known)
        except InfeasibleError as e:
            if drafted <= cap * _WORTH:
                raise _beyond(job, cost, share, drafted, found.unit) from e
            cap = math.sqrt(cap * drafted)


def _larger(job: Job, fit: _Fit, known: _Known) -> tuple[float, Proposal] | None:
    """A bound between a draft that leaves room and the least that broke a limit, if that differs.

    On the line between both, or half-way where that lies higher: costs do not fall in a line.
    """
    low, (high, over) = fit.cap, min(known.points, default=(fit.cap, math.inf))
    for _ in range(_DRAFTS):
        if high <= low * _WORTH:
            break
        line = low + (high - low) * (_SHARE - fit.over) / (over - fit.over)
        cap = min(max(line, math.sqrt(low * high)), high / _WORTH)
        job.setting.emit(Said("info", f"a draft leaves room: trying {cap:.4g}"))
        proposal = _propose(job, cap, known)
        if _in_float(proposal.plan).steps != _in_float(fit.proposal.plan).steps:
            return cap, proposal
        low = cap
    return None


def _beyond(job: Job, cost: Cost, share: float, cap: float, unit: str) -> InfeasibleError:
    return InfeasibleError(
        "EB404",
        f"the smallest draft that can be built, under {cap:.4g} {unit}, has "
        f"{_shown(job, cost, share)}",
        hint="raise the limit, or start from a smaller model",
    )


def _propose(job: Job, cap: float, known: _Known) -> Proposal:
    """Candidates under a bound, without those that are predicted to be too slow."""
    wanted: dict[str, Any] = {"cap": cap, "found": known.found, "rough": known.rough}
    refuse = _refusal(job, known)
    if refuse is not None:
        try:
            return planner.propose(job.setting, job.start, refuse=refuse, **wanted)
        except InfeasibleError as e:
            if e.code != "EB402":
                raise
            said = "no candidate is predicted to fit: the nearest is measured"
            job.setting.emit(Said("info", said))
    return planner.propose(job.setting, job.start, **wanted)


def _refusal(job: Job, known: _Known) -> planner.Refuse | None:
    """Why a candidate is too slow, as the predictor sees it; None where nothing can be told."""
    bound = job.setting.budget.limit("latency_ms")
    if bound is None or known.scale is None:
        return None

    def refuse(candidate: Candidate) -> str:
        plan = Plan((*candidate.steps, *planner.graph_steps(job.setting, job.start.program)))
        plans = [plan, _in_float(plan)] if known.floats else [plan]
        with tempfile.TemporaryDirectory(prefix="edgebudget-") as name:
            told = [_predicted(job, _lowered(job, p.steps, Path(name))[1]) for p in plans]
        ms = min((ms for ms in told if ms is not None), default=None)
        if ms is None or known.scale is None or ms * known.scale <= bound * _BELIEVED:
            return ""
        return f"predicted {ms * known.scale:.4g} ms, the limit is {bound:.4g} ms"

    return refuse


def _lower(points: Sequence[tuple[float, float]]) -> float:
    """The bound at which the worst cost would meet its limit.

    In proportion at first; then along the line through the last two points, since a floor of time
    or of bytes makes a cost fall more slowly than the bound does.
    """
    cap, over = points[-1]
    found = cap / over
    if len(points) > 1:
        before, was = points[-2]
        if was > over and before > cap:
            found = cap - (over - 1.0) * (before - cap) / (was - over)
    return max(found, cap * _STEEPEST) * _SHARE


def _over(job: Job, cost: Cost, share: float) -> float:
    """The worst of a draft's costs over its limit; unknown costs cannot be drafted."""
    return max((over for _, _, over in _ratios(job, cost, share)), default=0.0)


def _ratios(job: Job, cost: Cost, share: float) -> Iterator[tuple[Limit, float, float]]:
    """Every limit beyond MACs with a draft's value, and the value over what it may use."""
    for limit in job.setting.budget.limits:
        value = cost.get(limit.resource).value
        if value is None or limit.resource in ("macs", "fallback_nodes"):
            continue
        timed = limit.resource in ("latency_ms", "energy_mj")
        yield limit, value, value / (limit.bound * (_ROOM * share if timed else 1.0))


def _draft_cost(job: Job, plan: Plan, known: _Known, share: float) -> tuple[Cost, Plan]:
    """Cost of the plan's result without its training, in 8 bits or in float, and which that is.

    Narrow layers take less time in float where a processor has no instructions for 8-bit products:
    a draft that breaks a limit in 8 bits is measured in float too, unless a predictor knows better.
    """
    steps = [s for s in plan.steps if s.name != "recover"]
    cost, ms = _timed_draft(job, steps, known, share)
    plain = _in_float(plan)
    if _over(job, cost, share) <= 1.0 or plain == plan or job.setting.target.family != "cpu":
        return cost, plan
    steps = [s for s in plain.steps if s.name != "recover"]
    if ms is not None and not known.floats:
        with tempfile.TemporaryDirectory(prefix="edgebudget-") as name:
            other = _predicted(job, _lowered(job, steps, Path(name))[1])
        if other is not None and other > ms * _BELIEVED:
            return cost, plan
    in_float, _ = _timed_draft(job, steps, known, share)
    if _over(job, in_float, share) >= _over(job, cost, share):
        return cost, plan
    known.floats = True
    job.setting.emit(Said("info", "in float the draft costs less than in 8 bits"))
    return in_float, plain


def _in_float(plan: Plan) -> Plan:
    """The plan without its quantization; itself where there is none."""
    steps = tuple(s for s in plan.steps if s.name != "quantize_int8")
    if len(steps) == len(plan.steps):
        return plan
    return replace(plan, steps=steps, reasons=(*plan.reasons, _FLOATS))


def _timed_draft(
    job: Job, steps: Sequence[Step], known: _Known, share: float
) -> tuple[Cost, float | None]:
    """Cost of a draft, and its milliseconds as they are predicted, where they are.

    A draft that looks too slow is timed once more: other work on the machine only ever adds time,
    and one burst of it is no reason to cut the network.
    """
    with tempfile.TemporaryDirectory(prefix="edgebudget-") as name:
        cost, file = _lowered(job, steps, Path(name))
        budget = job.setting.budget
        cost = dear_cost(cost, job.target, file, job.workload, budget, _RUNS)
        _check_told(job, cost)
        measured = cost.latency_ms.value
        if measured is not None and _over(job, cost, share) > 1.0:
            again = dear_cost(cost, job.target, file, job.workload, budget, _RUNS)
            cost = min(cost, again, key=lambda c: c.latency_ms.value or math.inf)
            measured = cost.latency_ms.value
        ms = None if measured is None else _predicted(job, file)
        if measured is not None and ms:
            known.scale = min(measured / ms, known.scale or math.inf)
    return cost, ms


def _check_told(job: Job, cost: Cost) -> None:
    """Refuse before anything is spent what the target turns out not to tell."""
    dear: tuple[Resource, ...] = ("latency_ms", "energy_mj")
    for resource in dear:
        if job.setting.budget.limit(resource) is not None and cost.get(resource).value is None:
            raise InfeasibleError(
                "EB403",
                f"{resource} on {job.target.spec.name} is unknown here, and an unknown cost never "
                f"satisfies a limit: {cost.get(resource).how}",
                hint="limit --macs, --size or --memory instead, or compile for another target",
            )


def _lowered(job: Job, steps: Sequence[Step], folder: Path) -> tuple[Cost, Path]:
    built = run_steps(job.setting, job.start, steps)
    lowered = job.target.lower(built.program, folder, "draft")
    return file_cost(lowered, built.program), lowered.file


def _predicted(job: Job, file: Path) -> float | None:
    """Milliseconds by the target's cost model, or a predictor of this very device; else None."""
    if isinstance(job.target, Predicts):
        import onnx

        with suppress(TargetError):  # of another engine version: drafts are then all there is
            return job.target.predict(onnx.load_model(str(file))).value
        return None
    if not isinstance(job.target, TellsKernels):
        return None
    found, _ = find(job.target.device())
    return None if found is None else found.milliseconds(job.target.kernels(file))


def _shown(job: Job, cost: Cost, share: float) -> str:
    return ", ".join(
        f"{x.resource} {value:.6g} (limit {x.bound:.6g}, {x.statistic})"
        for x, value, over in _ratios(job, cost, share)
        if over > 1.0
    )
