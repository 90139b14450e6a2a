"""Run a program over a data set and score it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgebudget.events import Advanced, Emit, Finished, Started, ignore
from edgebudget.exits import exit_outputs
from edgebudget.workload import Array, Dataset, Quality, Task, batches
from edgebudget_runtime.errors import ArtifactError

if TYPE_CHECKING:
    from edgebudget.program import Program

Run = Callable[[Mapping[str, Array]], Mapping[str, Array]]


@dataclass(frozen=True, slots=True)
class Predictions:
    """What a model answered: outputs [N, ...] by name, and the labels [N, ...] if there are any."""

    outputs: dict[str, Array]
    labels: Array | None


def predict(
    run: Run,
    dataset: Dataset,
    *,
    batch: int = 1,
    indices: Sequence[int] | None = None,
    work: str = "evaluate",
    emit: Emit = ignore,
) -> Predictions:
    """Run every sample (or those at `indices`) through `run`, `batch` at a time, in order.

    Raises:
        ArtifactError: EB550, an output is not finite; EB551, there is no sample.
    """
    total = len(dataset) if indices is None else len(indices)
    if total == 0:
        raise ArtifactError("EB551", f"{dataset.name}: no sample", hint="give a folder with data")
    emit(Started(work, total))
    parts: dict[str, list[Array]] = {}
    labels: list[Array] = []
    seen = 0
    for inputs, targets in batches(dataset, batch, indices):
        for name, value in run(inputs).items():
            if value.dtype.kind == "f" and not np.isfinite(value).all():
                raise ArtifactError(
                    "EB550",
                    f"output {name!r} is not finite for sample {seen} of {dataset.name}",
                    hint="check the weights and the data for NaN and Inf",
                )
            parts.setdefault(name, []).append(np.asarray(value))
        size = len(next(iter(inputs.values())))
        if targets is not None:
            labels.append(targets)
        seen += size
        emit(Advanced(work, size))
    emit(Finished(work))
    joined = {k: np.concatenate(v) for k, v in parts.items()}
    stacked = np.concatenate(labels) if labels else None
    return Predictions(joined, stacked if stacked is not None and len(stacked) == seen else None)


def score(task: Task, answers: Predictions, reference: Predictions) -> Quality:
    """The task's quality of `answers`; labels come from the data or from the original's answers.

    Raises:
        ArtifactError: EB552, the task needs labels and the data has none.
    """
    if task.needs_reference:
        return task.quality(answers.outputs, reference.outputs)
    if answers.labels is None:
        raise ArtifactError(
            "EB552",
            f"the data has no labels, and {task.metric} needs them",
            hint="give labelled data, or `--task agreement` to compare with the original model",
        )
    return task.quality(answers.outputs, answers.labels)


def distance(answers: Predictions, reference: Predictions) -> float:
    """Mean squared output difference over the original's output variance (0 is identical)."""
    error, power = 0.0, 0.0
    for name, theirs in reference.outputs.items():
        ours = answers.outputs[name].astype(np.float64)
        wide = theirs.astype(np.float64)
        error += float(np.mean((ours - wide) ** 2))
        power += float(np.mean((wide - wide.mean(axis=0, keepdims=True)) ** 2))
    return error / power if power > 0 else float(error > 0)


def relative_drop(quality: Quality, original: Quality) -> float:
    """Share of the original's quality that was lost; negative where quality rose."""
    if original.value <= 0:
        return math.inf if quality.value < original.value else 0.0
    return 1.0 - quality.value / original.value


def runner_of(program: Program, *, threads: int | None = None) -> Run:
    """A function that runs a program on this machine's CPU, whatever its stage.

    Of a program with early exits it gives the last answer alone.
    """
    early = exit_outputs(program.outputs)[:-1]
    if program.stage == "graph":
        from edgebudget.session import CpuSession

        session = CpuSession(program.body.SerializeToString(), threads=threads)
        return _without(session.run, early) if early else session.run
    return _without(_module_runner(program), early)


def _without(run: Run, names: Collection[str]) -> Run:
    return lambda inputs: {k: v for k, v in run(inputs).items() if k not in names}


def _module_runner(program: Program) -> Run:
    import torch

    module: Any = program.body
    names = [spec.name for spec in program.inputs]

    def run(inputs: Mapping[str, Array]) -> dict[str, Array]:
        with torch.inference_mode():
            out = module(*(torch.from_numpy(np.ascontiguousarray(inputs[n])) for n in names))
        values = _tensors(out)
        return {n: v.numpy() for n, v in zip(program.outputs, values, strict=True)}

    return run


def _tensors(out: Any) -> list[Any]:
    """Flatten what a module returns to its tensors, in order."""
    import torch
    from torch.utils._pytree import tree_leaves

    return [v for v in tree_leaves(out) if isinstance(v, torch.Tensor)]
