"""Propose a plan for a budget: feasibility first, then candidates, then one plan with reasons.

Nothing dear is spent before the smallest reachable point is known to fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from edgebudget import registry
from edgebudget.candidates import (
    NEAR,
    Candidate,
    Reach,
    best,
    enumerate_points,
    probe,
    probe_indices,
    reach,
)
from edgebudget.evaluate import Predictions, predict, relative_drop, runner_of
from edgebudget.events import Said
from edgebudget.pipeline import Built, Setting, run_steps
from edgebudget.plan import Plan, Step
from edgebudget.recovery import recovery_step, settled
from edgebudget_runtime.cost import Cost, Resource
from edgebudget_runtime.errors import InfeasibleError, UsageError

if TYPE_CHECKING:
    from edgebudget.program import Program

GOAL_DROP = 0.01  # relative quality loss aimed at when the user states none


Refuse = Callable[[Candidate], str]


@dataclass(frozen=True, slots=True)
class Proposal:
    """A plan and everything it was chosen from."""

    plan: Plan
    baseline: Cost
    reach: Reach
    candidates: tuple[Candidate, ...]
    chosen: str
    notes: tuple[str, ...] = field(default_factory=tuple)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {
            "plan": self.plan.as_dict(),
            "baseline": {k: f.value for k, f in self.baseline.items()},
            "smallest_reachable_macs": self.reach.smallest,
            "not_applicable": list(self.reach.reasons),
            "chosen": self.chosen,
            "candidates": [
                {
                    "label": c.label,
                    "macs": None if math.isnan(c.macs) else c.macs,
                    "params": None if math.isnan(c.params) else c.params,
                    "distance": c.distance,
                    "quality": None if c.quality is None else c.quality.value,
                    "distance_after_short_training": c.tried,
                    "refused": c.refused,
                }
                for c in self.candidates
            ],
            "notes": list(self.notes),
        }


def propose(
    setting: Setting,
    start: Built,
    *,
    cap: float | None = None,
    refuse: Refuse | None = None,
    found: Reach | None = None,
    rough: bool = False,
) -> Proposal:
    """Choose structural steps that keep the MACs bound (or `cap`) and the steps that follow.

    `cap` is in the unit of what can be reached: MACs, or microseconds of layer time. `refuse`
    says why a candidate breaks another limit; "" where it does not. `found` is what an earlier
    proposal for the same model found reachable. A `rough` proposal costs about what the final one
    will, and is no plan to build.

    Raises:
        InfeasibleError: EB401, even the smallest reachable point breaks a limit.
        UsageError: EB130, a pass needs calibration data and there is none.
    """
    program = start.program
    baseline = setting.cost(program)
    macs = baseline.macs.value or 0.0
    found = found or reach(setting, start, macs)
    bound = setting.budget.limit("macs")
    check_feasible(setting, found, baseline)
    cap = min(x for x in (cap, bound, math.inf) if x is not None)
    if cap < found.smallest:
        raise _infeasible(found.unit, cap, found.smallest, found)
    if setting.workload.data.calibration is None:
        raise UsageError(
            "EB130",
            f"no calibration data for {setting.workload.name}: quantization would be a guess",
            hint="give --data imagefolder:DIR, npz:FILE or file.py:function",
        )
    candidates, reference = _look(setting, start, found, cap, rough)
    if refuse is not None:
        candidates = [c if c.refused else replace(c, refused=refuse(c)) for c in candidates]
    if reference is not None and not rough:
        candidates = settled(setting, start, candidates, cap, reference)
    chosen = best(candidates, cap)
    if chosen is None:
        unit = found.unit
        refused = "; ".join(
            f"{c.label}: {c.refused or f'{c.amount:.4g} {unit}'}" for c in candidates
        )
        raise InfeasibleError(
            "EB402",
            f"no candidate keeps {cap:.4g} {unit} ({refused})",
            hint=f"the smallest reachable point is about {found.smallest:.4g} {unit}",
        )
    steps = (*chosen.steps, *_recovery(setting, chosen), *graph_steps(setting, program))
    notes = tuple(f"not applicable: {r}" for r in found.reasons)
    return Proposal(
        Plan(steps, reasons=_reasons(candidates, chosen, cap, found.unit)),
        baseline,
        found,
        tuple(candidates),
        chosen.label,
        notes,
    )


def check_feasible(setting: Setting, found: Reach, baseline: Cost) -> None:
    """Refuse a budget that nothing we can build could meet.

    Raises:
        InfeasibleError: EB401 with the smallest reachable point and the limit that binds.
    """
    budget = setting.budget
    if (bound := budget.limit("macs")) is not None and bound < found.smallest:
        raise _infeasible("MACs", bound, found.smallest, found)
    params = baseline.params.value or 0.0
    floor = params * (found.pruned / found.whole if found.whole else 1.0)
    if (bound := budget.limit("params")) is not None and bound < floor * 0.5:
        raise _infeasible("parameters", bound, floor, found)
    if (bound := budget.limit("size_bytes")) is not None and bound < floor * 0.5:
        raise _infeasible("bytes (one per parameter)", bound, floor, found)
    dear: tuple[Resource, ...] = ("energy_mj", "latency_ms")
    for resource in dear:
        if budget.limit(resource) is not None and resource not in setting.target.tells:
            known = ", ".join(setting.target.tells) or "neither latency nor energy"
            model = "give --energy-model, " if resource == "energy_mj" else ""
            raise InfeasibleError(
                "EB403",
                f"{resource} on {setting.target.name} is unknown here, and an unknown cost "
                "never satisfies a limit",
                hint=f"this target tells {known}: limit --macs, --size or --memory instead, "
                f"{model}or compile for one that measures it (`edgebudget targets`)",
            )


def graph_steps(setting: Setting, program: Program) -> tuple[Step, ...]:
    """Clean-up, then rewrites, equalization and quantization where the target has integers."""
    whys = {
        "clean_graph": "batch norms folded, constants, dead code, weights-as-inputs; each checked",
        "rewrite_for_target": f"forms that {setting.target.device} runs as integers",
        "equalize": "even channel ranges lose less to 8 bits",
        "quantize_int8": f"{setting.target.name} computes fastest with 8-bit integers",
    }
    if not setting.target.integers:
        whys = {"clean_graph": whys["clean_graph"]}
    return tuple(
        Step(n, registry.get(n).config(), why) for n, why in whys.items() if n in registry.names()
    )


def _look(
    setting: Setting, start: Built, found: Reach, cap: float, rough: bool
) -> tuple[list[Candidate], Predictions | None]:
    """Untrained candidates, and the original's answers if they were asked for."""
    points = enumerate_points(found, cap, rough=rough)
    if len(points) == 1 and not points[0][1]:
        params = setting.cost(start.program).params.value or 0.0
        only = Candidate(points[0][0], (), found.macs, params, distance=0.0, us=found.us)
        return [only], None
    reference = original_answers(setting, start, found.macs)
    seen: list[Candidate] = []
    for label, steps in points:
        names = [s.name for s in steps]
        if any(c.amount <= cap and [s.name for s in c.steps] == names for c in seen):
            continue  # the same passes at a milder setting already fit
        near = best(seen, cap)
        if near is not None and near.distance is not None and near.distance <= NEAR:
            why = f"not looked at: {near.label} is already near the original"
            seen.append(Candidate(label, steps, math.nan, math.nan, refused=why))
            continue
        if setting.late and best(seen, cap) is not None:
            setting.emit(Said("warning", f"the time limit has passed: {label} is not looked at"))
            continue
        seen.append(probe(setting, start, label, steps, reference))
    return seen, reference


def original_answers(setting: Setting, start: Built, macs: float) -> Predictions:
    """The original's answers on the samples that probes look at."""
    dataset = setting.workload.data.calibration
    assert dataset is not None
    indices = probe_indices(dataset, macs * 0.1)
    run = runner_of(run_steps(setting, start, ()).program)  # exported: faster than the module
    return predict(run, dataset, indices=indices, work="probe the original", emit=setting.emit)


def _recovery(setting: Setting, chosen: Candidate) -> tuple[Step, ...]:
    """A fixed-step fine-tune where the probe says that quality was lost and data is there."""
    if not chosen.steps:
        return ()
    goal = setting.budget.max_drop if setting.budget.max_drop is not None else GOAL_DROP
    pruned = any(s.name == "prune_channels" for s in chosen.steps)
    if not pruned and _lost(chosen) <= goal:
        return ()
    step = recovery_step(setting, chosen)
    if step is None:
        setting.emit(Said("warning", "no training data: quality lost to pruning stays lost"))
    return () if step is None else (step,)


def _lost(chosen: Candidate) -> float:
    """Quality lost on the probe or the output error, whichever is worse: the probe is small."""
    lost = chosen.distance if chosen.distance is not None else math.inf
    if chosen.quality is not None and chosen.original is not None:
        lost = max(lost, relative_drop(chosen.quality, chosen.original))
    return lost


def _reasons(
    candidates: list[Candidate], chosen: Candidate, cap: float, unit: str
) -> tuple[str, ...]:
    if not chosen.steps:
        return (f"the original already keeps the bound ({chosen.macs:.4g} MACs): no structure cut",)
    lines = []
    for c in candidates:
        text = f"{c.label}: {c.macs:.4g} MACs"
        if c.us is not None:
            text += f", {c.us:.4g} {unit}"
        if c.refused:
            text = f"{c.label}: {c.refused}"
        elif c.distance is not None:
            text += f", output error {c.distance:.4f} of the original's variance"
        if c.quality is not None:
            text += f", {c.quality.metric} {c.quality.value:.4f} untrained"
        if c.tried is not None:
            text += f", output error {c.tried:.4f} after a short training"
        lines.append(text + (" <- chosen" if c.label == chosen.label else ""))
    bound = f"bound {cap:.4g} {unit}" if math.isfinite(cap) else f"no bound on {unit}"
    return (f"{bound}; nearest to the original on calibration data wins", *lines)


def _infeasible(what: str, bound: float, floor: float, found: Reach) -> InfeasibleError:
    from edgebudget.report_markup import si

    blocked = f" ({'; '.join(found.reasons)})" if found.reasons else ""
    return InfeasibleError(
        "EB401",
        f"{si(bound, what)} cannot be reached: the smallest reachable point is "
        f"{si(floor, what)}, the original has {si(found.macs, 'MACs')}{blocked}",
        hint=f"raise the limit to at least {_rounded_up(floor)}",
    )


def _rounded_up(value: float) -> str:
    """Four digits as a user types them, never below `value`."""
    from edgebudget.report_markup import si

    step = 10.0 ** (math.floor(math.log10(value)) - 3) if value >= 1000 else 1.0
    return si(math.ceil(value / step) * step).replace("k", "K").replace(" ", "")


def with_settings(plan: Plan, **settings: Any) -> Plan:
    """The plan with what else a replay needs."""
    return replace(plan, settings={k: v for k, v in settings.items() if v is not None})
