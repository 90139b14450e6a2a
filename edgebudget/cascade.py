"""Join two compiled models into one artifact: the large one answers what the small one doubts.

Nothing is trained. The small model's answer stands where its largest probability or its energy
score reaches a threshold ("E-LANG: Energy-Based Joint Inferencing of Super and Swift Language
Models", 2022); temperature and thresholds are solved on the integer files themselves.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from edgebudget.artifact import writing
from edgebudget.certificate import split
from edgebudget.datasets import Subset
from edgebudget.evaluate import Predictions, predict, score
from edgebudget.events import Emit, Said, ignore
from edgebudget.joining import LARGE, SMALL, Part, both_costs, check_fit, copy_both
from edgebudget.operating_points import Answers, Points, Promise, solve_points
from edgebudget.thresholds import budget_grid
from edgebudget_runtime import manifest as m
from edgebudget_runtime.cost import Cost
from edgebudget_runtime.errors import InfeasibleError, MissedError, TargetError, UsageError

if TYPE_CHECKING:
    from edgebudget.workload import Array, Dataset, Quality, Workload

CONFIDENCE = 0.95
_Z = 1.6449  # 95 % of draws keep a mean that was solved with this many standard errors to spare


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What the cascade has to keep, and what it is solved on.

    `held_back` is the share of the evaluation set that solves thresholds instead of the
    calibration set: never a sample that a figure comes from.
    """

    macs_mean: float | None = None
    max_drop: float | None = None  # relative to the large model
    confidence: float = CONFIDENCE
    held_back: float | None = None


@dataclass(frozen=True, slots=True)
class Cascade:
    """Where the artifact is, what it says, and the operating point that was asked for."""

    out: Path
    manifest: m.Manifest
    chosen: m.OperatingPoint | None


@dataclass(frozen=True, slots=True)
class _Asked:
    """Both models' answers."""

    held_back: tuple[Predictions, ...]
    evaluation: tuple[Predictions, ...]
    qualities: tuple[Quality, ...]  # on the evaluation set
    held: Quality  # of the large model on the held-back samples


def cascade(
    small: Path,
    large: Path,
    *,
    out: Path,
    wish: Wish | None = None,
    original: str | None = None,
    weights: Path | None = None,
    data: str | None = None,
    task: str | None = None,
    seed: int = 0,
    force: bool = False,
    on_event: Emit = ignore,
) -> Cascade:
    """Write an artifact whose chain is (`small`, `large`), both one-path artifacts.

    What is not given comes from the recipe of `large`, as for `eval`.

    Raises:
        UsageError: EB190 the two do not fit together, EB191 one of them is not of one path,
            EB192 the task has no right and wrong, EB193 there is nothing to solve or to evaluate
            on, EB194, EB195 as `certificate.certify`; EB120 to EB122 `out`.
        InfeasibleError: EB401 `macs_mean` is below what the small model costs, EB402 no
            thresholds keep the drop.
        MissedError: EB410, a limit is missed on the evaluation set; see `<out>.missed`.
        TargetError: EB601, the target's engine is missing.
    """
    wish = wish or Wish()
    parts = Part.load(small), Part.load(large)
    check_fit(*parts)
    _check(parts[0], wish)
    with writing(out, force=force) as folder:
        workload, settings = _workload(parts[1], original, weights, data, task, seed)
        if workload.task.kind != "classification":
            raise UsageError(
                "EB192",
                f"a cascade needs answers that are right or wrong, which {workload.task.metric} "
                "does not tell of a single sample",
                hint="give labelled classes and --task classification",
            )
        sets = _sets(workload, wish, seed)
        segments = copy_both(parts, folder)
        asked = _ask(segments, folder, parts[1], sets, workload, on_event)
        points, chosen = _solve(parts, asked, workload, wish, seed)
        digests = {"held-back": sets[0].digest(), "evaluation": sets[1].digest()}
        manifest = _manifest(parts, segments, asked, points, chosen, wish, seed, digests)
        for note in manifest.notes:
            on_event(Said("info", note))
        settings |= {"cascade": [small.name, large.name], "model_sha256": workload.digest}
        _write(folder, manifest, settings)
        if not manifest.holds:
            _save_missed(folder, manifest, out)
    return Cascade(out, manifest, chosen)


def _check(small: Part, wish: Wish) -> None:
    if wish.macs_mean is not None and wish.macs_mean < small.macs:
        raise InfeasibleError(
            "EB401",
            f"a mean of {wish.macs_mean:.6g} MACs is below the small model's {small.macs:.6g}",
            hint=f"ask for at least {small.macs:.6g}, or start from a smaller model",
        )
    for name, share in (("--held-back", wish.held_back), ("--confidence", wish.confidence)):
        if share is not None and not 0.0 < share < 1.0:
            raise UsageError("EB194", f"{name} {share:g} is not between 0 and 1", hint="0.5 or 50%")


def _workload(
    large: Part,
    original: str | None,
    weights: Path | None,
    data: str | None,
    task: str | None,
    seed: int,
) -> tuple[Workload, dict[str, Any]]:
    """Data and task, and the settings that say where they came from."""
    from edgebudget.plan import load_plan
    from edgebudget.workload_loading import load_workload

    recipe = load_plan(large.folder / "recipe.toml").settings
    shape = recipe.get("input_shape")
    settings: dict[str, Any] = {
        "model": original or str(recipe.get("model")),
        "target": large.manifest.target.name,
        "seed": seed,
        "data": data or recipe.get("data"),
        "task": task or recipe.get("task"),
        "input_shape": shape,
    }
    workload = load_workload(
        settings["model"], weights=weights, data=settings["data"], task=settings["task"],
        input_shape=tuple(shape) if shape else None, seed=seed,
    )  # fmt: skip
    return workload, {k: v for k, v in settings.items() if v is not None}


def _sets(workload: Workload, wish: Wish, seed: int) -> tuple[Dataset, Dataset]:
    """What thresholds are solved on, and what figures come from."""
    held, evaluation = workload.data.calibration, workload.data.evaluation
    if evaluation is not None and wish.held_back is not None:
        rest, taken = split(len(evaluation), wish.held_back, seed)
        held = Subset(f"{evaluation.name} (held back)", evaluation, tuple(taken.tolist()))
        evaluation = Subset(f"{evaluation.name} (rest)", evaluation, tuple(rest.tolist()))
    if held is None or evaluation is None or not len(held) or not len(evaluation):
        missing = "evaluation" if evaluation is None or not len(evaluation) else "held-back"
        raise UsageError(
            "EB193",
            f"{workload.name} has no {missing} data",
            hint="give --data with train and test folders, or --held-back 0.5 to divide one set",
        )
    if any(d.sample(0).target is None for d in (held, evaluation)):
        raise UsageError(
            "EB193", "the data has no labels", hint="give labelled data: DIR/test/<class>/*.jpg"
        )
    return held, evaluation


def _ask(
    segments: Sequence[m.Segment],
    folder: Path,
    large: Part,
    sets: tuple[Dataset, Dataset],
    workload: Workload,
    emit: Emit,
) -> _Asked:
    """Run both files over both sets."""
    from edgebudget import target_registry
    from edgebudget.chain import Chain

    target = large.manifest.target.name
    engine = target_registry.get(target)
    state = engine.available()
    if not state.ok:
        raise TargetError("EB601", f"{target}: {state.why}", hint=state.install)
    output = segments[0].outputs[0].name
    chain = Chain([folder / s.file for s in segments], engine, output)
    # The data has the names of the large model's original; the chain has the small one's.
    own = zip(large.segment.inputs, segments[0].inputs, strict=True)
    names = {theirs.name: ours.name for theirs, ours in own}

    def run(inputs: Mapping[str, Array]) -> dict[str, Array]:
        return chain.run({names[k]: v for k, v in inputs.items()})

    def answers(dataset: Dataset) -> tuple[Predictions, ...]:
        found = predict(run, dataset, work=f"evaluate both on {dataset.name}", emit=emit)
        return tuple(Predictions({output: found.outputs[e]}, found.labels) for e in chain.exits)

    held, evaluation = (answers(d) for d in sets)
    qualities = tuple(score(workload.task, p, p) for p in evaluation)
    return _Asked(held, evaluation, qualities, score(workload.task, held[1], held[1]))


def _solve(
    parts: tuple[Part, Part], asked: _Asked, workload: Workload, wish: Wish, seed: int
) -> tuple[Points, m.OperatingPoint | None]:
    """Operating points, and the one that was asked for."""
    small, large = parts
    answers = Answers(
        (SMALL, LARGE),
        small.segment.outputs[0].name,
        (small.cost, both_costs(small.cost, large.cost)),
        asked.held_back,
        asked.evaluation,
        "both files through ONNX Runtime on the CPU",
    )
    costs = np.array([small.macs, small.macs + large.macs])
    if wish.max_drop is not None:  # the cheapest point that is certified is what there is
        promise = Promise(wish.max_drop, wish.confidence, against="the large model alone")
        points = solve_points(answers, workload.task, promise=promise, seed=seed)
        return points, points.certified
    if wish.macs_mean is None:
        return solve_points(answers, workload.task, seed=seed), None
    wanted = _with_room(wish.macs_mean, costs, asked)
    budgets = sorted({*budget_grid(costs), wanted})
    points = solve_points(answers, workload.task, budgets=budgets, seed=seed)
    mean = points.asked[budgets.index(wanted)]
    for point in points.points:
        if (point.path, point.thresholds) == (mean.path, mean.thresholds):
            return points, point
    return replace(points, points=(*points.points, mean)), mean


def _with_room(bound: float, costs: Array, asked: _Asked) -> float:
    """A mean to solve for, so that other samples keep `bound` too, nineteen times in twenty."""
    small, both = (float(c) for c in costs)
    share = min(1.0, max(0.0, (bound - small) / (both - small)))
    sizes = [len(next(iter(p[0].outputs.values()))) for p in (asked.held_back, asked.evaluation)]
    error = (both - small) * math.sqrt(share * (1 - share) * sum(1 / n for n in sizes))
    return max(small, bound - _Z * error)


def _manifest(
    parts: tuple[Part, Part],
    segments: tuple[m.Segment, ...],
    asked: _Asked,
    points: Points,
    chosen: m.OperatingPoint | None,
    wish: Wish,
    seed: int,
    digests: Mapping[str, str],
) -> m.Manifest:
    from edgebudget.manifest_parts import versions

    small, large = (p.manifest for p in parts)
    same = large.provenance.data.get("evaluation") == digests["evaluation"]
    original = large.subnetworks[0].original_quality if same else None
    best, cheap = (_shown(q) for q in reversed(asked.qualities))

    def sub(id: str, path: tuple[str, ...], cost: Cost, quality: m.Quality) -> m.SubNetwork:
        models = {SMALL: small.name, LARGE: large.name}
        says = {"models": ", then ".join(models[s] for s in path)}
        return m.SubNetwork(id, path, cost, quality, original, says)

    whole = both_costs(parts[0].cost, parts[1].cost)
    stored = sum(f.bytes for s in segments for f in s.files())
    return replace(
        large,
        name=f"{small.name}+{large.name}",
        segments=segments,
        subnetworks=(
            sub("cascade", (SMALL, LARGE), whole, best),
            sub(SMALL, (SMALL,), parts[0].cost, cheap),
            sub(LARGE, (LARGE,), parts[1].cost, best),
        ),
        limits=_limits(wish, chosen),
        quality_limits=_quality_limits(wish, chosen, asked),
        placement=_placement(small.placement, large.placement),
        baseline=large.baseline if same else replace(large.baseline, quality=None),
        passes=(),
        candidates=(),
        layers_after=tuple(
            replace(x, name=f"{s}/{x.name}")
            for s, part in ((SMALL, small), (LARGE, large))
            for x in part.layers_after
        ),
        provenance=m.Provenance(versions(), seed, digests),
        notes=_notes(parts, asked, points),
        exits=points.exits,
        operating_points=points.points,
        sharing=m.Sharing(stored, 2 * stored, stored),
    )


def _shown(q: Quality) -> m.Quality:
    how = "evaluated on the file through ONNX Runtime on the CPU"
    return m.Quality(q.metric, q.value, q.low, q.high, q.count, dict(q.others), how)


def _limits(wish: Wish, chosen: m.OperatingPoint | None) -> tuple[m.ProvenLimit, ...]:
    if wish.macs_mean is None or chosen is None:
        return ()
    figure = chosen.mean_cost.macs
    holds = figure.value is not None and figure.value <= wish.macs_mean
    return (m.ProvenLimit("macs", wish.macs_mean, "mean", figure, holds),)


def _quality_limits(
    wish: Wish, chosen: m.OperatingPoint | None, asked: _Asked
) -> tuple[m.ProvenQuality, ...]:
    """Certified on held-back samples, and the loss seen on the evaluation set beside it."""
    if wish.max_drop is None or chosen is None:
        return ()
    assert chosen.quality is not None, "there is evaluation data"
    assert chosen.certificate is not None, "asked for"
    drop = 1.0 - chosen.quality.value / asked.qualities[1].value  # certified: above zero
    how = f"{wish.confidence:.4g} sure: {chosen.certificate.how}"
    return (m.ProvenQuality("max_drop", wish.max_drop, drop, drop <= wish.max_drop, how),)


def _placement(a: m.Placement | None, b: m.Placement | None) -> m.Placement | None:
    if a is None or b is None:
        return None
    names = sorted({*a.counts, *b.counts})
    counts = {n: a.counts.get(n, 0) + b.counts.get(n, 0) for n in names}
    return m.Placement(b.processor, counts, (*a.fallback, *b.fallback))


def _notes(parts: tuple[Part, Part], asked: _Asked, points: Points) -> tuple[str, ...]:
    assert points.signal is not None, "the task has right and wrong"
    areas = ", ".join(f"{k} {v:.4f}" for k, v in sorted(points.signal.areas.items()))
    fitted = points.fitted[0]
    notes = [
        f"{parts[0].manifest.name} answers first, {parts[1].manifest.name} what it doubts",
        f"routed by {points.signal.signal}; mean quality over all shares that stay: {areas}",
        f"temperature {fitted.temperature:.4g} from {fitted.count} held-back samples: "
        f"calibration error {fitted.ece_before:.4f} before, {fitted.ece_after:.4f} after",
    ]
    held, q = asked.held, asked.qualities[1]
    if held.low > q.high or held.high < q.low:
        notes.append(
            f"the large model scores {held.value:.4f} on the held-back samples and {q.value:.4f} "
            "on the evaluation set: they are not alike, so what was solved or certified on one "
            "need not hold on the other; --held-back 0.5 takes both from the evaluation set"
        )
    return tuple(notes)


def _write(folder: Path, manifest: m.Manifest, settings: Mapping[str, Any]) -> None:
    from edgebudget.plan import Plan
    from edgebudget.report import render

    said = "joined by `edgebudget cascade`: run that again to build it again"
    recipe = Plan((), (said,), settings).to_toml()
    (folder / "recipe.toml").write_text(recipe, encoding="utf-8")
    manifest.save(folder)
    (folder / "report.html").write_text(render(manifest), encoding="utf-8")


def _save_missed(folder: Path, manifest: m.Manifest, out: Path) -> NoReturn:
    aside = out.with_name(f"{out.name}.missed")
    with writing(aside, force=True) as kept:
        shutil.copytree(folder, kept, dirs_exist_ok=True)
    broken = [
        f"mean MACs {x.proven.value:.6g}, limit {x.bound:.6g}"
        for x in manifest.limits
        if not x.holds
    ] + [
        f"drop {x.value:.2%}, limit {x.bound:.2%}"
        for x in manifest.quality_limits
        if not x.holds and x.value is not None
    ]
    raise MissedError(
        "EB410",
        f"not proven on the evaluation set: {'; '.join(broken)}",
        hint=f"the best so far is in {aside.name}; --held-back 0.5 solves on data like it",
    )
