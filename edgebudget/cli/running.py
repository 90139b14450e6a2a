"""`run` and `eval`."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgebudget.cli import options as o
from edgebudget.cli.output import write, write_json
from edgebudget.cli.progress import listening
from edgebudget.events import Said
from edgebudget_runtime.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

    from edgebudget.events import Emit
    from edgebudget.workload import Dataset, Quality, Workload
    from edgebudget_runtime.runner import Outcome, Runner

    Array = np.ndarray[Any, Any]

_SHOWN = 8  # values of an output printed for people


def register(app: typer.Typer) -> None:
    """Add this file's commands."""
    app.command()(run)
    app.command("eval")(evaluate)


def run(
    artifact: o.Artifact,
    inputs: Annotated[
        list[Path], typer.Argument(metavar="INPUT...", help="Pictures, .npy, or .npz by name.")
    ],
    latency: Annotated[
        str | None, typer.Option("--latency", help="The best answer within 10ms; say if missed.")
    ] = None,
    energy: Annotated[
        str | None, typer.Option("--energy", help="The best answer within 5mJ, where it is known.")
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option("--policy", help="deadline, best, paced, fixed:ID or point:ID (`frontier`)."),
    ] = None,
    threads: Annotated[int | None, typer.Option("--threads", help="CPU threads.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Write all outputs, stacked, to an .npz file.")
    ] = None,
    as_json: o.Json = False,
) -> None:
    """Answer inputs with an artifact. Needs neither torch nor onnx."""
    from edgebudget_runtime.budget import Budget
    from edgebudget_runtime.runner import Runner

    budget = Budget.parse(latency=latency, energy=energy)
    bound, allowance = budget.limit("latency_ms"), budget.limit("energy_mj")
    with listening(), Runner(artifact, threads=threads, policy=policy or "deadline") as runner:
        runner.warm_up()
        manifest = runner.manifest
        answers: list[tuple[Path, Outcome]] = []
        for path in inputs:
            for given in _read(path, runner):
                if bound is not None and not answers and runner.profile_note:
                    runner.calibrate(given)  # a process of one answer cannot learn while it goes
                answers.append((path, runner.run(given, latency_ms=bound, energy_mj=allowance)))
    if out is not None:
        _save(out, [outcome for _, outcome in answers])
    if as_json:
        write_json([_plain(path, outcome) for path, outcome in answers])
        return
    for path, outcome in answers:
        by = f" by {outcome.subnetwork}" if len(manifest.subnetworks) > 1 else ""
        write(f"{path}: {outcome.spent.latency_ms.value:.2f} ms{by} on {outcome.engine}")
        for name, value in outcome.outputs.items():
            write(f"  {name} {list(value.shape)}: {_words(value)}")
        if by and outcome.why:
            write(f"  {outcome.why}")
        for violation in outcome.broke:
            write(f"  broke {violation.limit.resource} {violation.limit.bound:g}")


def _read(path: Path, runner: Runner) -> Iterator[Mapping[str, Array]]:
    """What one file holds, as the model's inputs."""
    import numpy as np

    from edgebudget_runtime.preprocess import read_image

    if not path.is_file():
        raise UsageError("EB109", f"no input file {path}", hint="give a picture, .npy or .npz")
    first = runner.inputs[0]
    if path.suffix not in (".npz", ".npy"):
        yield {first.name: read_image(path, runner.manifest.preprocessing, first)}
        return
    try:
        loaded = np.load(path, allow_pickle=False)
        arrays = dict(loaded) if path.suffix == ".npz" else {first.name: loaded}
    except (OSError, ValueError, EOFError) as e:
        raise UsageError(
            "EB109", f"{path} holds no arrays: {e}", hint="write it with numpy.save or savez"
        ) from e
    yield arrays


def _save(out: Path, outcomes: Sequence[Outcome]) -> None:
    import numpy as np

    stacked = {k: np.concatenate([x.outputs[k] for x in outcomes]) for k in outcomes[0].outputs}
    try:
        with out.open("wb") as f:
            np.savez(f, **stacked)
    except OSError as e:
        raise UsageError(
            "EB108", f"{out} cannot be written: {e.strerror}", hint="name another --out"
        ) from e


def _plain(path: Path, outcome: Outcome) -> dict[str, Any]:
    return {
        "input": str(path),
        "outputs": {k: v.tolist() for k, v in outcome.outputs.items()},
        "latency_ms": outcome.spent.latency_ms.value,
        "ran": list(outcome.ran),
        "subnetwork": outcome.subnetwork,
        "exit": outcome.exit,
        "confidence": outcome.confidence,
        "why": outcome.why,
        "engine": outcome.engine,
        "broke": [
            {"resource": v.limit.resource, "bound": v.limit.bound, "actual": v.actual}
            for v in outcome.broke
        ],
    }


def _words(value: Array) -> str:
    flat = value.reshape(-1)
    text = " ".join(f"{float(v):.5g}" for v in flat[:_SHOWN])
    return text + (f" ... ({flat.size} values)" if flat.size > _SHOWN else "")


def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL|ARTIFACT", help="An artifact folder, or any model.")
    ],
    data: o.Data = None,
    task: o.Task = None,
    original: Annotated[
        str | None,
        typer.Option("--original", help="The model an ARTIFACT was compiled from, if it moved."),
    ] = None,
    weights: o.Weights = None,
    input_shape: o.InputShape = None,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, help="Of how one set is divided; 0.")
    ] = None,
    as_json: o.Json = False,
) -> None:
    """Measure the quality of a model or an artifact on evaluation data.

    What is not given here comes from an artifact's recipe: its pictures are the ones that no
    pass has seen.
    """
    shape = o.parse_shape(input_shape)
    with listening() as emit:
        from edgebudget.workload_loading import load_workload
        from edgebudget_runtime.manifest import FILE, Manifest

        folder = Path(model) if (Path(model) / FILE).is_file() else None
        recipe = {} if folder is None or original else _recipe(folder)
        workload = load_workload(
            original or recipe.get("model", model),
            weights=weights,
            data=data or recipe.get("data"),
            task=task or recipe.get("task"),
            input_shape=shape or (tuple(recipe.get("input_shape") or ()) or None),
            seed=recipe.get("seed", 0) if seed is None else seed,
        )
        if folder is not None and workload.digest != Manifest.load(folder).workload.digest:
            emit(Said("warning", f"{workload.name} is not what the artifact was compiled from"))
        dataset = workload.data.evaluation
        if dataset is None:
            raise UsageError(
                "EB109",
                f"{workload.name} has no evaluation data",
                hint="give --data imagefolder:DIR, npz:FILE or FILE.py:FUNCTION",
            )
        quality = _quality(folder, workload, dataset, emit)
    if as_json:
        write_json({"model": model, "data": dataset.name, **dataclasses.asdict(quality)})
        return
    write(
        f"{quality.metric} {quality.value:.4f} [{quality.low:.4f}, {quality.high:.4f}] "
        f"on {quality.count} samples of {dataset.name}"
    )
    for name, value in quality.others.items():
        write(f"  {name} {value:.4f}")


def _recipe(folder: Path) -> dict[str, Any]:
    """What an artifact was compiled from, as its recipe says."""
    try:
        text = (folder / "recipe.toml").read_text(encoding="utf-8")
        settings: dict[str, Any] = tomllib.loads(text)["settings"]
        settings["model"] = str(settings["model"])
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, KeyError, TypeError) as e:
        raise UsageError(
            "EB109",
            f"{folder / 'recipe.toml'} does not say what to evaluate on: {e}",
            hint="name the model with --original and the data with --data",
        ) from e
    return settings


def _quality(folder: Path | None, workload: Workload, dataset: Dataset, emit: Emit) -> Quality:
    """Quality of the artifact in `folder`, or of the workload's own model."""
    from edgebudget.evaluate import predict, runner_of, score
    from edgebudget_runtime.runner import Runner

    own = None
    if folder is None or workload.task.needs_reference:
        run_own = runner_of(workload.program)
        own = predict(run_own, dataset, work="evaluate the original", emit=emit)
    if folder is None:
        assert own is not None
        return score(workload.task, own, own)
    with Runner(folder) as runner:
        answers = predict(
            lambda given: runner.run(given).outputs, dataset, work="evaluate", emit=emit
        )
    return score(workload.task, answers, own or answers)
