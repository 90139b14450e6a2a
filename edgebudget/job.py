"""What one compile works with: the workload, the target, the setting, and the original."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebudget import target_registry
from edgebudget.cache import Cache, key
from edgebudget.energy_estimate import offer
from edgebudget.evaluate import Predictions, predict, runner_of, score
from edgebudget.events import Emit
from edgebudget.facts import FACTS
from edgebudget.manifest_parts import versions
from edgebudget.pipeline import Built, Setting, run_steps
from edgebudget.static_cost import static_cost
from edgebudget.target import TakesBatches
from edgebudget.workload_loading import load_workload
from edgebudget_runtime.budget import Budget, Limit
from edgebudget_runtime.errors import InfeasibleError, TargetError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgebudget.program import TensorSpec
    from edgebudget.target import Target
    from edgebudget.workload import Workload


@dataclass(frozen=True, slots=True)
class Job:
    """Everything one compile works with."""

    workload: Workload
    target: Target
    setting: Setting
    start: Built  # the original, as given
    graph: Built  # the original, as a float graph
    settings: dict[str, Any]  # what a replay needs, for recipe.toml


def prepare(
    model: str,
    target: str,
    budget: Budget,
    weights: Path | None,
    data: str | None,
    task: str | None,
    input_shape: tuple[int, ...] | None,
    seed: int,
    emit: Emit,
    *,
    max_batch: int = 1,
    energy_model: str | None = None,
) -> Job:
    began = time.monotonic()
    the_target = _in_batches(target_registry.get(target), max_batch)
    state = the_target.available()
    if not state.ok:
        raise TargetError("EB601", f"{the_target.spec.name}: {state.why}", hint=state.install)
    if energy_model is not None:
        offer(the_target, energy_model)
    spec = the_target.spec
    workload = load_workload(
        model, weights=weights, data=data, task=task, input_shape=input_shape, seed=seed
    )
    if max_batch > 1:
        _check_one_sample(workload.program.inputs)
    if budget.limit("fallback_nodes") is None and spec.max_fallback is not None:
        limit = Limit("fallback_nodes", float(spec.max_fallback))
        budget = replace(budget, limits=(*budget.limits, limit))
    sets = {"calibration": workload.data.calibration, "train": workload.data.train}
    content = {
        "versions": versions(),
        "model": workload.digest,
        "inputs": [[x.name, list(x.shape), x.dtype] for x in workload.program.inputs],
        "data": {k: None if d is None else d.digest() for k, d in sets.items()},
        "task": workload.task.metric,
        "target": dataclasses.asdict(spec),
        "max_drop": budget.max_drop,
        "seed": seed,
    }
    setting = Setting(
        workload=workload,
        target=spec,
        budget=budget,
        facts=FACTS,
        cost=static_cost,
        seed=seed,
        cache=Cache(emit=emit),
        emit=emit,
        key=key(content),
        deadline=None if budget.time_limit_s is None else began + budget.time_limit_s,
    )
    start = Built(workload.program, (), setting.key)
    graph = run_steps(setting, start, ())
    settings = {
        "model": model,
        "target": spec.name,
        "seed": seed,
        "data": data,
        "task": task,
        "input_shape": None if input_shape is None else list(input_shape),
        "max_batch": max_batch,
        "energy_model": energy_model,
        "model_sha256": workload.digest,
        "limits": [f"{x.resource} <= {x.bound:.12g} ({x.statistic})" for x in budget.limits],
    }
    return Job(workload, the_target, setting, start, graph, settings)


def _in_batches(target: Target, most: int) -> Target:
    if most == 1:
        return target
    if most < 1 or not isinstance(target, TakesBatches):
        raise UsageError(
            "EB158",
            f"--max-batch {most} of target {target.spec.name!r}",
            hint="1 or more, for cpu:xnnpack; other targets' files take one input at a time, and "
            "run_batch gives them one after another",
        )
    return target.in_batches(most)


def _check_one_sample(inputs: Sequence[TensorSpec]) -> None:
    for spec in inputs:
        if not spec.shape or spec.shape[0] != 1:
            raise UsageError(
                "EB158",
                f"--max-batch needs inputs of one sample, {spec.name!r} is {list(spec.shape)}",
                hint="give --input-shape with 1 as the first size",
            )


def reference_of(job: Job) -> Predictions | None:
    """The original's answers on the evaluation set, from the cache when they are there."""
    dataset = job.workload.data.evaluation
    if dataset is None:
        return None
    import numpy as np
    from safetensors.numpy import load_file, save_file

    cache = job.setting.cache
    where = key({"model": job.graph.key, "data": dataset.digest(), "versions": versions()})
    if folder := cache.get(where):
        stored = load_file(folder / "answers.safetensors")
        labels = stored.pop("labels", None)
        return Predictions({k.removeprefix("out:"): v for k, v in stored.items()}, labels)
    run = runner_of(job.graph.program)
    found = predict(run, dataset, work="evaluate the original", emit=job.setting.emit)
    arrays = {f"out:{k}": np.ascontiguousarray(v) for k, v in found.outputs.items()}
    if found.labels is not None:
        arrays["labels"] = np.ascontiguousarray(found.labels)
    cache.put(where, lambda f: save_file(arrays, f / "answers.safetensors"))
    return found


def check_quality_limit(job: Job, reference: Predictions | None) -> None:
    """Refuse a quality that even the original does not have, or a metric that does not work.

    Raises:
        InfeasibleError: EB405.
    """
    if reference is None or job.workload.task.needs_reference:
        return
    have, wanted = score(job.workload.task, reference, reference), job.setting.budget.min_quality
    if wanted is not None and have.value < wanted:
        raise InfeasibleError(
            "EB405",
            f"--min-quality {wanted:g}: the original itself reaches {have.metric} {have.value:.4f}",
            hint=f"ask for at most {have.value:.4f}, or start from a better model",
        )
