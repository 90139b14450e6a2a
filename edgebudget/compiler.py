"""Compile a workload to a budget: plan, build, prove, write; or say why not."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgebudget import planner, registry
from edgebudget.artifact import writing
from edgebudget.assemble import Result, write_artifact
from edgebudget.drafts import fitted
from edgebudget.evaluate import Predictions
from edgebudget.events import Emit, Said, ignore
from edgebudget.exits import exit_outputs
from edgebudget.harm import undo_harm
from edgebudget.job import Job, check_quality_limit, prepare, reference_of
from edgebudget.pipeline import run_steps
from edgebudget.plan import Plan, load_plan
from edgebudget.planner import Proposal
from edgebudget.recovery import recovery_step
from edgebudget.verify import Depth, look, nearest, prove
from edgebudget_runtime.budget import Budget
from edgebudget_runtime.errors import InfeasibleError, MissedError

if TYPE_CHECKING:
    from edgebudget.elastic_compile import Elastic
    from edgebudget.program import PassRecord
    from edgebudget.verify import Proof
    from edgebudget_runtime.manifest import Manifest

_RETRIES = 2  # after a proof that misses a limit on time: what is measured moves from run to run
_RETRY_SHARE = 0.95  # of such a limit that the next draft may use


@dataclass(frozen=True, slots=True)
class CompileResult:
    """Where the artifact is, and what it says about itself."""

    out: Path
    manifest: Manifest


def compile(
    model: str,
    *,
    out: Path | str,
    target: str = "cpu",
    budget: Budget | None = None,
    weights: Path | None = None,
    data: str | None = None,
    task: str | None = None,
    input_shape: tuple[int, ...] | None = None,
    max_batch: int = 1,
    energy_model: str | None = None,
    plan: Path | Plan | None = None,
    seed: int = 0,
    verify: Depth = "sample",
    force: bool = False,
    elastic: Elastic | None = None,
    on_event: Emit = ignore,
) -> CompileResult:
    """Compile `model` for `target` so that every limit of `budget` is proven on the files.

    `model` is a zoo name, `file.py:function`, `.pt2`, `.onnx`, or a Hugging Face folder or id.
    `elastic` makes several sub-networks, for the runtime to choose from; a model that comes with
    early exits keeps them in any case. `max_batch` inputs fit one call of the files, where the
    target's engine can take several; limits and figures are for one. `energy_model` tells the
    energies that nothing measures: a fitted file, or a technology such as `7nm`.

    Raises:
        UsageError: EB1xx, an argument or the plan is wrong.
        InfeasibleError: EB4xx, the smallest reachable point breaks a limit (nothing was spent).
        MissedError: EB410, a limit is not proven; the best so far is at `<out>.missed`.
        ArtifactError: EB5xx, a file is not what it should be, or `out` cannot be written.
        TargetError: EB6xx, the target's engine is missing or failed.
        KeyboardInterrupt: what could be deployed by then is at `<out>.interrupted`.
    """
    out = Path(out)
    with writing(out, force=force) as folder:
        given = load_plan(plan) if isinstance(plan, Path) else plan
        job = prepare(
            model, target, budget or Budget(), weights, data, task, input_shape, seed, on_event,
            max_batch=max_batch, energy_model=energy_model,
        )  # fmt: skip
        with closing(job.setting.cache):
            if elastic is None and len(exit_outputs(job.start.program.outputs)) > 1:
                elastic = _own_exits()
            if elastic is None:
                manifest = _compile(job, given, out, folder, verify)
            else:
                from edgebudget.assemble_elastic import prove_and_write

                steps = given or fitted(job, planner.propose(job.setting, job.start)).plan
                manifest = prove_and_write(job, elastic, steps, out, folder, verify)
    return CompileResult(out, manifest)


def _own_exits() -> Elastic:
    """A model that comes with exits keeps them."""
    from edgebudget.elastic_compile import Elastic

    return Elastic(("exit",))


def propose(
    model: str,
    *,
    target: str = "cpu",
    budget: Budget | None = None,
    weights: Path | None = None,
    data: str | None = None,
    task: str | None = None,
    input_shape: tuple[int, ...] | None = None,
    max_batch: int = 1,
    energy_model: str | None = None,
    seed: int = 0,
    on_event: Emit = ignore,
) -> Proposal:
    """Everything `compile` would decide beforehand: feasibility, candidates, the plan.

    Limits beyond MACs are looked at on untrained drafts, as `compile` does.

    Raises:
        As `compile`, except MissedError.
    """
    job = prepare(
        model, target, budget or Budget(), weights, data, task, input_shape, seed, on_event,
        max_batch=max_batch, energy_model=energy_model,
    )  # fmt: skip
    with closing(job.setting.cache):
        proposal = fitted(job, planner.propose(job.setting, job.start))
    return replace(proposal, plan=planner.with_settings(proposal.plan, **job.settings))


def _compile(job: Job, given: Plan | None, out: Path, folder: Path, depth: Depth) -> Manifest:
    """Fill `folder`; what was missed or interrupted goes beside `out` instead."""
    if given is None:
        proposal = fitted(job, planner.propose(job.setting, job.start))
        chosen = proposal.plan
    else:
        proposal, chosen = None, given
    reference = reference_of(job)
    check_quality_limit(job, reference)
    tried: list[Result] = []
    try:
        for attempt, origin in _attempts(job, chosen, proposal, tried):
            _try(job, attempt, origin, reference, folder / "tried", depth, tried)
        result = _nearest(job, tried)
        broken = result.proof.broken(job.setting.budget)
        if broken:
            _save_aside(job, result, out, "missed")
            raise MissedError(
                "EB410",
                f"not proven: {'; '.join(broken)}",
                hint=f"the best so far is in {out.name}.missed; {_advice(job, result)}",
            )
        manifest = _save(job, result, folder)
        shutil.rmtree(folder / "tried")
        return manifest
    except KeyboardInterrupt:
        if tried:
            saved = _save_aside(job, _nearest(job, tried), out, "interrupted")
            said = f"the best so far, not all of it proven, is in {saved}"
            job.setting.emit(Said("warning", said))
        raise


def _attempts(
    job: Job, plan: Plan, proposal: Proposal | None, tried: Sequence[Result]
) -> Iterator[tuple[Plan, Proposal | None]]:
    """The plan as it is; then, of ours, a smaller one where time misses, and once a stronger one.

    Time that a draft kept and the proof missed is tried again with more room. Where only quality
    misses, the plan is tried once more with recovery.
    """
    yield plan, proposal
    if proposal is None:
        return
    budget, share = job.setting.budget, 1.0
    for _ in range(_RETRIES):
        if not _only_time(tried[-1].proof, budget) or job.setting.late:
            break
        job.setting.emit(Said("info", "time missed its limit: trying a smaller plan"))
        share *= _RETRY_SHARE
        try:
            proposal = fitted(job, planner.propose(job.setting, job.start), share=share)
        except InfeasibleError:
            break  # there is nothing smaller: the miss is what is reported
        plan = proposal.plan
        yield plan, proposal
    proof = tried[-1].proof
    only_quality = proof.broken(budget) and not budget.violations(proof.cost)
    if not only_quality or any(s.name == "recover" for s in plan.steps):
        return
    if job.setting.late:
        job.setting.emit(Said("warning", "the time limit has passed: no stronger plan is tried"))
        return
    chosen = next(c for c in proposal.candidates if c.label == proposal.chosen)
    if (extra := recovery_step(job.setting, chosen)) is not None:
        job.setting.emit(Said("info", "quality missed its limit: trying a stronger plan"))
        at = sum(registry.get(s.name).stage == "module" for s in plan.steps)
        yield replace(plan, steps=(*plan.steps[:at], extra, *plan.steps[at:])), proposal


def _only_time(proof: Proof, budget: Budget) -> bool:
    """Whether measured time or energy is all that breaks, and is known."""
    broken = budget.violations(proof.cost)
    timed = all(v.limit.resource in ("latency_ms", "energy_mj") for v in broken)
    known = all(v.actual is not None for v in broken)
    return bool(broken) and timed and known and len(proof.broken(budget)) == len(broken)


def _try(
    job: Job,
    plan: Plan,
    proposal: Proposal | None,
    reference: Predictions | None,
    scratch: Path,
    depth: Depth,
    tried: list[Result],
) -> None:
    """Build and prove a plan. `tried` gets it once it could be deployed, proven or not."""
    setting, target = job.setting, job.target
    built = run_steps(setting, job.start, plan.steps)
    undone: tuple[PassRecord, ...] = ()
    if proposal is not None:  # a plan that the user wrote is done as written
        built, undone = undo_harm(setting, target, job.start, built, plan.steps)
    segments = scratch / str(len(tried)) / "segments"
    segments.mkdir(parents=True)
    lowered = target.lower(built.program, segments, "main")
    seen = look(lowered, built.program, target)
    taken_back = {r.name for r in undone}
    kept = tuple(s for s in plan.steps if s.name not in taken_back)
    recipe = planner.with_settings(replace(plan, steps=kept), **job.settings)
    result = Result(recipe, proposal, built, job.graph, lowered, seen, undone)
    tried.append(result)
    if built.interrupted:
        raise KeyboardInterrupt
    proof = prove(
        seen, lowered, target, job.workload, setting.budget, reference,
        depth=depth, emit=setting.emit,
    )  # fmt: skip
    tried[-1] = replace(result, proof=proof)


def _nearest(job: Job, tried: Sequence[Result]) -> Result:
    winner = nearest([r.proof for r in tried], job.setting.budget)
    return next(r for r in tried if r.proof is winner)


def _save(job: Job, result: Result, folder: Path) -> Manifest:
    """Fill an artifact's folder with what was built."""
    source, segments = result.lowered.file.parent, folder / "segments"
    shutil.copytree(source, segments)
    lowered = replace(
        result.lowered,
        file=segments / result.lowered.file.name,
        extra=tuple(segments / x.relative_to(source) for x in result.lowered.extra),
    )
    kept = replace(result, lowered=lowered)
    return write_artifact(folder, kept, job.workload, job.target, job.setting)


def _save_aside(job: Job, result: Result, out: Path, why: str) -> Path:
    """Keep what was built beside `out`, under a name that nobody takes for a proven artifact."""
    aside = out.with_name(f"{out.name}.{why}")
    with writing(aside, force=True) as folder:
        _save(job, result, folder)
    return aside


def _advice(job: Job, result: Result) -> str:
    proof = result.proof
    if proof.drop is not None and job.setting.budget.max_drop is not None:
        return f"what would fit: --max-drop {max(proof.drop, 0.0) * 100:.2f}%"
    if proof.placement.fallback:
        node = proof.placement.fallback[0]
        return f"not on the {proof.placement.processor}: {node.op} {node.name!r}: {node.why}"
    return "raise the limit, or give training data"
