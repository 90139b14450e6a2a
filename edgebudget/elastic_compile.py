"""Build an artifact of several sub-networks, and prove what was asked on its exported files.

The structural steps of an ordinary plan come first, then the elastic ones. What they leave is one
network or several variants that share its weights; each is exported, quantized with its own
ranges, cut at its exits and written, and every exit of every variant is evaluated on the files.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from edgebudget import registry, shared_weights
from edgebudget.chain import Chain
from edgebudget.channels_last import hand_over_channels_last
from edgebudget.elastic_choice import chosen
from edgebudget.elastic_times import keeping, timed
from edgebudget.evaluate import Predictions, relative_drop, score
from edgebudget.events import Said
from edgebudget.exits import exit_outputs
from edgebudget.operating_points import Answers, Points, Promise, solve_points
from edgebudget.pipeline import Built, Setting, derived, run_module_steps, run_steps
from edgebudget.plan import Plan, Step
from edgebudget.split_exits import Cut, split
from edgebudget.verify import UNCHECKED, Agreement, agreement_on, sample_indices
from edgebudget_runtime.cost import Cost
from edgebudget_runtime.errors import TargetError, UnsupportedError, UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from edgebudget.program import Program
    from edgebudget.target import Lowered, Target
    from edgebudget.verify import Depth
    from edgebudget.workload import Dataset, Quality

# In the order in which the passes must run: exits are cut out of every variant alike.
_PASSES = {
    "exit": "insert_exits",
    "depth": "skip_layers",
    "width": "slim_width",
    "resolution": "nest_resolution",
}
DIMENSIONS = tuple(_PASSES)
AUTO = ("exit", "depth")  # prefixes of one chain share every byte; widths and sizes share few
_HELD_BACK = 4096  # samples that thresholds are solved on, at most
_SAMPLE = 4


@dataclass(frozen=True, slots=True)
class Elastic:
    """What may differ between sub-networks, how many to keep, and how sure thresholds must be.

    `confidence` asks for thresholds whose drop is certified at that level.
    """

    dimensions: tuple[str, ...] = AUTO
    subnetworks: int = 6
    confidence: float | None = None

    def __post_init__(self) -> None:
        for name in self.dimensions:
            if name not in _PASSES:
                raise UsageError(
                    "EB156",
                    f"no dimension is called {name!r}",
                    hint=f"some of {', '.join(DIMENSIONS)}, separated by commas, or auto",
                )
        if self.subnetworks < 1:
            raise UsageError("EB156", f"{self.subnetworks} sub-networks", hint="ask for 1 or more")
        if self.confidence is not None and not 0.5 <= self.confidence < 1.0:
            raise UsageError(
                "EB156",
                f"a confidence of {self.confidence:g}",
                hint="between 50% and 99.9%, such as --confidence 95%",
            )

    @staticmethod
    def parse(text: str, subnetworks: int = 6, confidence: float | None = None) -> Elastic:
        """From `--elastic exit,depth`, or `auto`.

        Raises:
            UsageError: EB156, no such dimension, or a number out of range.
        """
        names = tuple(dict.fromkeys(n.strip() for n in text.split(",") if n.strip()))
        return Elastic(AUTO if names in ((), ("auto",)) else names, subnetworks, confidence)

    def steps(self, built: Built) -> tuple[Step, ...]:
        """The passes that make a program elastic."""
        whys = {
            "exit": "easy inputs need not run to the end; exits share every weight",
            "depth": "blocks whose absence costs little can be left out",
            "width": "narrower networks cut out of the same weights",
            "resolution": "smaller inputs cost less with the same weights",
        }
        names = [d for d in DIMENSIONS if d in self.dimensions]
        if len(exit_outputs(built.program.outputs)) > 1:
            names = [n for n in names if n != "exit"]  # it came with exits of its own
        steps = [Step(_PASSES[n], registry.get(_PASSES[n]).config(), whys[n]) for n in names]
        if any(n != "exit" for n in names):
            why = "all sub-networks learn from the whole one in every step"
            steps.append(Step("train_nested", registry.get("train_nested").config(), why))
        return tuple(steps)


@dataclass(frozen=True, slots=True)
class Branch:
    """One variant on disk: a chain of segments, with what each of its exits costs and answers."""

    choices: Mapping[str, str]
    built: Built
    ids: tuple[str, ...]
    lowered: tuple[Lowered, ...]
    cuts: tuple[Cut, ...]
    costs: tuple[Cost, ...]  # of leaving at each exit
    evaluation: tuple[Predictions, ...] | None
    held_back: tuple[Predictions, ...]
    agreement: Agreement | None

    def name(self, exit: int) -> str:
        """What the sub-network that ends at `exit` is called."""
        parts = [f"{k}-{v}" for k, v in self.choices.items()]
        if len(self.ids) > 1:
            parts.append("full" if exit == len(self.ids) - 1 else f"exit{exit + 1}")
        return "-".join(parts) or "full"

    def described(self, exit: int) -> dict[str, str]:
        """The choices behind the sub-network that ends at `exit`."""
        if len(self.ids) == 1:
            return dict(self.choices)
        return {**self.choices, "exit": f"{exit + 1} of {len(self.ids)}"}


@dataclass(frozen=True, slots=True)
class Found:
    """Everything that was built, which sub-networks are kept, and their operating points."""

    plan: Plan
    module: Built  # after the last module-stage step
    branches: tuple[Branch, ...]
    kept: tuple[tuple[int, int], ...]  # (branch, exit), the best first
    qualities: Mapping[tuple[int, int], Quality]
    original: Quality | None
    points: Points
    points_of: int  # the branch that the operating points run along
    notes: tuple[str, ...] = field(default_factory=tuple)


def build(
    elastic: Elastic,
    setting: Setting,
    start: Built,
    target: Target,
    plan: Plan,
    reference: Predictions | None,
    folder: Path,
    *,
    depth: Depth = "sample",
) -> Found:
    """Build every variant into `folder` and choose what to keep.

    Raises:
        UnsupportedError: EB245, nothing about this model can be made elastic.
        PassError, ArtifactError, TargetError: as the passes, `verify` and the target raise.
    """
    module, whole_plan = _module(elastic, setting, start, plan)
    graph_steps = [s for s in plan.steps if registry.get(s.name).stage == "graph"]
    branches = tuple(
        _branch(setting, target, begun, choices, number, graph_steps, reference, folder, depth)
        for number, (choices, begun) in enumerate(_variants(module))
    )
    if sum(len(b.ids) for b in branches) < 2:
        declined = [d for r in module.records for d in r.declined]
        why = "; ".join(f"{d.where}: {d.why}" for d in declined) or "no pass found a place"
        raise UnsupportedError(
            "EB245",
            f"{setting.workload.name} cannot be made elastic: {why}",
            hint="compile it without --elastic, or try other dimensions",
        )
    task = setting.workload.task
    original = None if reference is None else score(task, reference, reference)
    qualities = _qualities(branches, task, reference)
    kept, notes = chosen(branches, qualities, elastic.subnetworks, setting.budget)
    along = max(range(len(branches)), key=lambda i: (len(branches[i].ids) > 1, -i))
    points = _points(setting, branches[along], elastic, reference)
    if points.declined:
        notes.append(f"no thresholds: {points.declined}")
    return Found(
        whole_plan, module, branches, kept, qualities, original, points, along, tuple(notes)
    )


def _module(elastic: Elastic, setting: Setting, start: Built, plan: Plan) -> tuple[Built, Plan]:
    """Run the module-stage steps; a graph file has none, and only exits of its own."""
    if start.program.stage == "graph":
        if len(exit_outputs(start.program.outputs)) < 2:
            raise UnsupportedError(
                "EB245",
                f"{setting.workload.name} is a graph file without exits of its own",
                hint="give the module (file.py:function, .pt2, zoo): graphs cannot be retrained",
            )
        return start, plan
    structural = [s for s in plan.steps if registry.get(s.name).stage == "module"]
    given = any(s.name in {*_PASSES.values(), "train_nested"} for s in structural)
    extra = () if given else elastic.steps(start)
    later = [s for s in plan.steps if s not in structural]
    whole = replace(plan, steps=(*structural, *extra, *later))
    return run_module_steps(setting, start, [*structural, *extra]), whole


def _variants(module: Built) -> list[tuple[Mapping[str, str], Built]]:
    """Every variant as a program of its own; one where the network is not nested."""
    program = module.program
    if program.stage == "graph":
        return [({}, module)]
    from edgebudget.nested import Nested

    if not isinstance(program.body, Nested):
        return [({}, module)]
    found: list[tuple[Mapping[str, str], Built]] = []
    for variant in program.body.variants:
        body = program.body.cut(variant)
        key = derived(module.key, dict(variant.choices))
        cut = replace(module, program=replace(program, body=body), key=key, cost=None)
        found.append((variant.choices if variant.edits else {}, cut))
    return found


def _branch(
    setting: Setting,
    target: Target,
    begun: Built,
    choices: Mapping[str, str],
    number: int,
    steps: Sequence[Step],
    reference: Predictions | None,
    folder: Path,
    depth: Depth,
) -> Branch:
    built = run_steps(setting, begun, steps)
    program = built.program
    names = exit_outputs(program.outputs)
    output = setting.workload.program.outputs[-1]
    cuts = split(program.body, names, output)
    if setting.target.options.get("handed_over") == "channels last":
        cuts = hand_over_channels_last(cuts)
    lowered, ids = [], []
    for k, cut in enumerate(cuts):
        id = f"v{number}s{k}"
        made = target.lower(piece(program, cut, output), folder, id)
        extra = shared_weights.share(made.file)
        lowered.append(replace(made, extra=(*made.extra, *extra)))
        ids.append(id)
    files = [x.file for x in lowered]
    chain = Chain(files, target, output)
    costs = tuple(
        replace(c.cost, fallback_nodes=f)
        for c, f in zip(chain.prefix_costs(), chain.prefix_fallback(), strict=True)
    )
    costs = timed(costs, files, target, setting.budget)
    data = setting.workload.data
    evaluated = None
    if data.evaluation is not None and reference is not None:
        evaluated = chain.predict(data.evaluation, emit=setting.emit)
    held = data.calibration
    assert held is not None, "refused before"
    answers = chain.predict(held, indices=sample_indices(len(held), _HELD_BACK), emit=setting.emit)
    agreement = None
    checked = target.spec.family != "cpu" and target.spec.runs_here
    if checked and evaluated is not None and data.evaluation is not None:
        agreement = _agreement(files, target, output, evaluated, data.evaluation, depth, setting)
    return Branch(
        choices, built, tuple(ids), tuple(lowered), cuts, costs, evaluated, answers, agreement
    )


def piece(program: Program, cut: Cut, output: str) -> Program:
    """One segment of a program, as a program."""
    outputs = (output, *(h.name for h in cut.hidden))
    return replace(program, body=cut.model, inputs=cut.inputs, outputs=outputs)


def _agreement(
    files: Sequence[Path],
    target: Target,
    output: str,
    answers: Sequence[Predictions],
    dataset: Dataset,
    depth: Depth,
    setting: Setting,
) -> Agreement | None:
    """The worst exit's difference between the target's own engine and the fast one.

    None where the target's own engine is on the device alone.
    """
    try:
        exact = Chain(files, target, output, exact=True)
    except TargetError as e:
        if e.code != UNCHECKED:
            raise
        setting.emit(Said("warning", f"not checked on the target's own engine: {e.what}"))
        return None
    indices = sample_indices(len(dataset), None if depth == "full" else _SAMPLE)
    theirs = exact.predict(dataset, indices=indices, batch=len(indices), emit=setting.emit)
    found = [
        agreement_on(f, t, a, indices, target.spec)
        for f, t, a in zip(files, theirs, answers, strict=True)
    ]
    return max(found, key=lambda a: a.worst_steps)


def _qualities(
    branches: Sequence[Branch], task: Any, reference: Predictions | None
) -> dict[tuple[int, int], Quality]:
    if reference is None:
        return {}
    return {
        (b, k): score(task, answers, reference)
        for b, branch in enumerate(branches)
        for k, answers in enumerate(branch.evaluation or ())
    }


def _points(
    setting: Setting, branch: Branch, elastic: Elastic, reference: Predictions | None
) -> Points:
    count = keeping(branch.costs, setting.budget)
    if count < 2:
        return Points(declined="no sub-network ends in another's middle")
    output = setting.workload.program.outputs[-1]
    evaluation = None if branch.evaluation is None else branch.evaluation[:count]
    answers = Answers(
        branch.ids[:count], output, branch.costs[:count], branch.held_back[:count], evaluation
    )
    promise = None
    if elastic.confidence is not None:
        promise = Promise(setting.budget.max_drop or 0.01, elastic.confidence)
    mean = [x.bound for x in setting.budget.limits if (x.resource, x.statistic) == ("macs", "mean")]
    found = solve_points(answers, setting.workload.task, promise=promise, seed=setting.seed)
    if not mean or found.declined:
        return found
    asked = solve_points(answers, setting.workload.task, budgets=mean, seed=setting.seed)
    setting.emit(Said("info", f"thresholds solved for a mean of {mean[0]:.4g} MACs"))
    new = [p for p in asked.points if p.id not in {q.id for q in found.points}]
    points = sorted((*found.points, *new), key=lambda p: (p.mean_cost.macs.value or 0.0, p.id))
    return replace(found, points=tuple(points))


def worst_drop(found: Found) -> float | None:
    """Relative loss of the best sub-network against the original; None where it is unknown."""
    if found.original is None or not found.kept:
        return None
    return relative_drop(found.qualities[found.kept[0]], found.original)


def moved(found: Found, source: Path, to: Path) -> Found:
    """Copy what was built into a folder, and name the files there."""
    shutil.copytree(source, to, dirs_exist_ok=True)

    def there(lowered: Lowered) -> Lowered:
        extra = tuple(to / x.relative_to(source) for x in lowered.extra)
        return replace(lowered, file=to / lowered.file.relative_to(source), extra=extra)

    branches = tuple(replace(b, lowered=tuple(there(x) for x in b.lowered)) for b in found.branches)
    return replace(found, branches=branches)
