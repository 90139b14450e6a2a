"""Prove a budget on the exported file, through the engine that will run it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from edgebudget.energy_estimate import energy_of
from edgebudget.evaluate import Predictions, predict, relative_drop, score
from edgebudget.events import Emit, Said
from edgebudget.latency_statistic import wanted
from edgebudget.static_cost import static_cost
from edgebudget_runtime.cost import Cost, Evidence, counted
from edgebudget_runtime.errors import TargetError

if TYPE_CHECKING:
    from pathlib import Path

    from edgebudget.program import Program
    from edgebudget.target import Lowered, Placement, Target, TargetSpec
    from edgebudget.workload import Dataset, Quality, Workload
    from edgebudget_runtime.budget import Budget, Limit

Depth = Literal["sample", "full"]
_SAMPLE = 4  # pictures that always go through the target's own engine
_REPEATS = 50
UNCHECKED = "EB617"  # of a file that no engine here runs as the target would
_ASTRAY, _ASTRAY_STEPS = 0.1, 4.0  # of an output's range: beyond both, it is no rounding


@dataclass(frozen=True, slots=True)
class Agreement:
    """How the target's own engine compares with the engine used for the whole set."""

    count: int
    worst_steps: float  # largest output difference, in steps
    step: float  # one step, in output units
    unit: str = "quantization steps"
    evidence: Evidence = "simulated"

    def words(self, engine: str) -> str:
        """What was seen, as a sentence; `engine` is what ran the whole set."""
        return (
            f"outputs within {self.worst_steps:.3f} {self.unit} ({self.step:.6g} each) of "
            f"{engine} ({self.evidence})"
        )


@dataclass(frozen=True, slots=True)
class Proof:
    """What was found on the exported file."""

    cost: Cost
    placement: Placement
    quality: Quality | None
    original: Quality | None
    drop: float | None  # relative loss of quality against the original
    agreement: Agreement | None
    notes: tuple[str, ...]

    def broken(self, budget: Budget) -> tuple[str, ...]:
        """Every limit that is not proven, in words."""
        found = [_words(v.limit, v.actual) for v in budget.violations(self.cost)]
        if budget.max_drop is not None and (self.drop is None or self.drop > budget.max_drop):
            lost = "unknown" if self.drop is None else f"{self.drop:.2%}"
            found.append(f"quality drop {lost}, limit {budget.max_drop:.2%}")
        low = budget.min_quality
        if low is not None and (self.quality is None or self.quality.value < low):
            value = "unknown" if self.quality is None else f"{self.quality.value:.4f}"
            found.append(f"quality {value}, limit {low:.4f}")
        return tuple(found)


def look(lowered: Lowered, program: Program, target: Target) -> Proof:
    """Recount and place the exported file without running it: quality and latency unknown.

    Raises:
        ArtifactError: EB510, the file cannot be loaded.
        TargetError: EB6xx the engine failed.
    """
    cost = file_cost(lowered, program)
    placement = target.placement(lowered.file)
    how = f"{len(placement.nodes)} nodes placed by {target.spec.engine}"
    cost = replace(cost, fallback_nodes=counted(len(placement.fallback), how))
    note = "interrupted before the exported file was evaluated: quality is unknown"
    return Proof(cost, placement, None, None, None, None, (*lowered.notes, note))


def prove(
    seen: Proof,
    lowered: Lowered,
    target: Target,
    workload: Workload,
    budget: Budget,
    reference: Predictions | None,
    *,
    depth: Depth = "sample",
    emit: Emit,
) -> Proof:
    """Evaluate and time the exported file, on top of what `look` has seen.

    `reference` holds the original's answers on the evaluation set (None without such data).

    Raises:
        ArtifactError: EB510 the file cannot be loaded, EB550 an output is not finite.
        TargetError: EB6xx the engine failed.
    """
    cost, placement = seen.cost, seen.placement
    dataset = workload.data.evaluation
    cost = dear_cost(cost, target, lowered.file, workload, budget, _REPEATS)
    if dataset is None or reference is None:
        note = "no evaluation data: quality is unknown"
        emit(Said("warning", note))
        return replace(seen, cost=cost, notes=(*lowered.notes, note))
    run = target.open(lowered.file).run
    answers = predict(run, dataset, work="evaluate the exported file", emit=emit)
    agreement, notes = None, lowered.notes
    if target.spec.family != "cpu" and target.spec.runs_here:
        indices = sample_indices(len(dataset), None if depth == "full" else _SAMPLE)
        try:
            exact = _exact(target, lowered.file, dataset, indices, emit)
        except TargetError as e:
            if e.code != UNCHECKED:
                raise
            notes = (*notes, f"not checked on the target's own engine: {e.what}")
        else:
            agreement = agreement_on(lowered.file, exact, answers, indices, target.spec)
            if depth == "full":  # the whole set went through the target's own engine: score that
                answers = exact
    quality = score(workload.task, answers, reference)
    original = score(workload.task, reference, reference)
    drop = relative_drop(quality, original)
    return Proof(cost, placement, quality, original, drop, agreement, notes)


def file_cost(lowered: Lowered, program: Program) -> Cost:
    """Count the exported file as it lies on disk; bytes are of what a device needs."""
    from edgebudget.segment_graph import counted_where, read_graph

    body = read_graph(lowered.file)
    cost = static_cost(
        replace(program, stage="graph", body=body), counted_where(lowered.file), lowered.max_batch
    )
    needed = lowered.file.stat().st_size
    if lowered.memory is not None:
        cost = replace(cost, memory_bytes=lowered.memory)
    return replace(cost, size_bytes=counted(needed, f"size of {lowered.file.name}"))


def dear_cost(
    cost: Cost, target: Target, file: Path, workload: Workload, budget: Budget, repeats: int
) -> Cost:
    """`cost` with the latency and the energy that `budget` limits, as the target tells them.

    Latency is at the statistic of the limit. What the target cannot tell stays unknown.
    """
    source = workload.data.evaluation or workload.data.calibration
    if source is None:
        return cost
    inputs = {k: v[None] for k, v in source.sample(0).inputs.items()}
    statistic = wanted(budget.limits)
    if statistic is not None:
        found = target.latency(file, inputs, repeats, statistic=statistic)
        cost = replace(cost, latency_ms=found)
    if budget.limit("energy_mj") is not None:
        known = cost.latency_ms if statistic == "p50" else None
        cost = replace(cost, energy_mj=energy_of(target, file, inputs, known))
    return cost


def _exact(
    target: Target, file: Path, dataset: Dataset, indices: Sequence[int], emit: Emit
) -> Predictions:
    run = target.open(file, exact=True).run
    work = f"check {len(indices)} samples on the target's own engine"
    # One call for all: the engine's process starts once, and its workers share the samples.
    return predict(run, dataset, indices=indices, work=work, emit=emit, batch=len(indices))


def agree(
    exact: Predictions, answers: Predictions, indices: Sequence[int], steps: Mapping[str, float]
) -> Agreement:
    """Compare two engines' answers to the same samples, in output quantization steps.

    Raises:
        TargetError: EB630 an output is not quantized, EB631 the engines answer otherwise.
    """
    worst, step = 0.0, 0.0
    for name, theirs in exact.outputs.items():
        ours = answers.outputs[name][list(indices)]
        gap = float(np.max(np.abs(ours.astype(np.float64) - theirs.astype(np.float64))))
        if name not in steps:
            raise TargetError(
                "EB630",
                f"output {name!r} is not quantized, which this target needs",
                hint="add quantize_int8 to the plan",
            )
        spread = float(np.ptp(answers.outputs[name].astype(np.float64)))
        if gap > max(_ASTRAY * spread, _ASTRAY_STEPS * steps[name]):
            raise TargetError(
                "EB631",
                f"the target's own engine answers otherwise than the engine for the whole set: "
                f"output {name!r} is {gap:.4g} away, where all samples lie within {spread:.4g}",
                hint="report this network: an operator of it is lowered wrongly",
            )
        if gap / steps[name] >= worst:  # thousandths of a step are float rounding
            worst, step = round(gap / steps[name], 3), steps[name]
    return Agreement(len(indices), worst, step)


def agreement_on(
    file: Path, exact: Predictions, answers: Predictions, indices: Sequence[int], spec: TargetSpec
) -> Agreement:
    """How the target's own answers compare, in steps of its arithmetic.

    A target without integers counts in half precision, which has 11 bits: a step is 2^-10 of
    the output's largest magnitude.

    Raises:
        TargetError: EB630 an output is not quantized where the target needs it, EB631 the
            target's own engine answers otherwise.
    """
    if spec.integers:
        return agree(exact, answers, indices, output_steps(file))
    steps = {k: max(float(np.max(np.abs(v))), 1e-30) * 2**-10 for k, v in exact.outputs.items()}
    here = "latency_ms" in spec.tells and "predictor" not in spec.options
    evidence: Evidence = "measured" if here else "simulated"
    found = agree(exact, answers, indices, steps)
    return replace(found, unit="steps of half precision", evidence=evidence)


def sample_indices(total: int, count: int | None) -> list[int]:
    """`count` indices spread evenly over the set; all of them for None."""
    if count is None or count >= total:
        return list(range(total))
    return [int(i) for i in np.linspace(0, total - 1, count).round()]


def output_steps(file: Path) -> dict[str, float]:
    """One quantization step of every quantized output (name -> scale)."""
    from onnx import numpy_helper

    from edgebudget.segment_graph import read_graph

    graph = read_graph(file).graph
    scales = {t.name: t for t in graph.initializer}
    found: dict[str, float] = {}
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[1] in scales:
            scale = float(np.max(numpy_helper.to_array(scales[node.input[1]])))
            found.update({o: scale for o in node.output})
    names = [o.name for o in graph.output]
    return {n: found[n] for n in names if n in found}


def _words(limit: Limit, actual: float | None) -> str:
    value = "unknown" if actual is None else f"{actual:.6g}"
    return f"{limit.resource} {value}, limit {limit.bound:.6g} ({limit.statistic})"


def nearest(proofs: Sequence[Proof], budget: Budget) -> Proof:
    """The proof that breaks the fewest limits, then the one of best quality."""
    return min(
        proofs,
        key=lambda p: (len(p.broken(budget)), -(p.quality.value if p.quality else -math.inf)),
    )
