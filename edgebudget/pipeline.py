"""Run a plan over a program, holding every pass to its contract.

Graph-stage steps are cached one by one; module-stage steps are cached together, as the graph
they lead to, since a module's code cannot be stored honestly. A killed compile therefore
resumes at the first step that had not finished, and `recover` inside it at its checkpoint.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgebudget import registry
from edgebudget.events import Emit, Finished, Said, Started
from edgebudget.plan import Step, config_to_dict
from edgebudget.program import Context, Note, Pass, PassRecord, Program
from edgebudget_runtime.cost import Cost, Figure
from edgebudget_runtime.errors import EdgeBudgetError, PassError

if TYPE_CHECKING:
    from edgebudget.cache import Cache
    from edgebudget.target import TargetSpec
    from edgebudget.workload import Workload
    from edgebudget_runtime.budget import Budget

_RECENT = 8  # modules kept in memory
Facts = Mapping[str, Callable[[Program], str | None]]  # returns why the fact does not hold


@dataclass(frozen=True, slots=True)
class Setting:
    """What stays the same while a plan runs."""

    workload: Workload
    target: TargetSpec
    budget: Budget
    facts: Facts
    cost: Callable[[Program], Cost]
    seed: int
    cache: Cache
    emit: Emit
    key: str  # fingerprint of all of the above that matters
    deadline: float | None = None
    recent: dict[str, Built] = field(default_factory=dict)  # module-stage results by key

    @property
    def late(self) -> bool:
        """Whether the time limit has passed: what is begun is finished, nothing more is tried."""
        return self.deadline is not None and time.monotonic() > self.deadline


@dataclass(frozen=True, slots=True)
class Built:
    """A program after some steps, what each did, and the fingerprint of how it came to be."""

    program: Program
    records: tuple[PassRecord, ...]
    key: str
    cost: Cost | None = None  # of the program, once somebody counted
    cut: bool = False  # a step ended early: this is not what the plan says, and is not kept
    interrupted: bool = False  # by Ctrl-C


def run_steps(setting: Setting, start: Built, steps: Sequence[Step]) -> Built:
    """Apply every step in order; a module that leaves its stage is exported in between.

    Raises:
        PassError: EB301 a precondition, EB302 a postcondition, EB303 a crash.
    """
    module = [s for s in steps if registry.get(s.name).stage == "module"]
    graph = [s for s in steps if registry.get(s.name).stage == "graph"]
    built = start
    if built.program.stage == "module":
        built = _module_section(setting, built, module)
    for step in graph:
        built = _graph_step(setting, built, step)
    return built


def run_module_steps(setting: Setting, start: Built, steps: Sequence[Step]) -> Built:
    """Apply module-stage steps and stay at the module stage (for probing candidates).

    What a probe has built is not built again for the plan that begins with it.
    """
    built = start
    for step in steps:
        key = step_key(setting, built.key, step)
        if (found := setting.recent.get(key)) is not None:
            records = (*built.records, found.records[-1])
            built = replace(_copied(found), records=records)
            continue
        built = _apply(setting, built, step, key, setting.cache.workdir(key))
        if not built.cut and built.key == key:
            while len(setting.recent) >= _RECENT:
                setting.recent.pop(next(iter(setting.recent)))
            setting.recent[key] = _copied(built)
    return built


def _copied(built: Built) -> Built:
    """With a module of its own: a pass may change the one it is given."""
    return replace(built, program=replace(built.program, body=copy.deepcopy(built.program.body)))


def derived(key: str, content: Mapping[str, Any]) -> str:
    """Fingerprint of something cut out of what `key` stands for."""
    return _digest({"before": key, "part": dict(content)})


def step_key(setting: Setting, before: str, step: Step) -> str:
    """Fingerprint of a step's result."""
    p = registry.get(step.name)
    content = {"before": before, "pass": p.name, "version": p.version}
    return _digest({**content, "config": config_to_dict(step.config), "setting": setting.key})


def _module_section(setting: Setting, start: Built, steps: Sequence[Step]) -> Built:
    from edgebudget.export import to_graph

    keys = [start.key]
    for step in steps:
        keys.append(step_key(setting, keys[-1], step))
    key = _digest({"before": keys[-1], "pass": "export", "setting": setting.key})
    if hit := _read(setting, key, start.program):
        return replace(hit, records=start.records + hit.records)
    built = run_module_steps(setting, start, steps)
    setting.emit(Started("export"))
    graph = to_graph(built.program)
    setting.emit(Finished("export"))
    if built.cut:
        return replace(built, program=graph, cost=None)
    done = Built(graph, built.records, key)
    _write(setting, done, since=len(start.records))
    for finished in keys[1:]:
        setting.cache.done(finished)
    return done


def _graph_step(setting: Setting, before: Built, step: Step) -> Built:
    key = step_key(setting, before.key, step)
    if hit := _read(setting, key, before.program):
        return replace(hit, records=before.records + hit.records)
    built = _apply(setting, before, step, key, setting.cache.workdir(key))
    if not built.cut:
        _write(setting, built, since=len(before.records))
        setting.cache.done(key)
    return built


def _apply(setting: Setting, before: Built, step: Step, key: str, workdir: Path) -> Built:
    p, program = registry.get(step.name), before.program
    _check(p, p.requires, program, setting.facts, "EB301", "requires")
    same = (p.name, config_to_dict(step.config))
    occurrence = sum((r.name, r.config) == same for r in before.records)
    seed = _seed(setting.seed, step, occurrence)
    w = setting.workload
    ctx = Context(
        budget=setting.budget,
        target=setting.target,
        task=w.task,
        data=replace(w.data, evaluation=None),
        original=w.program,
        seed=seed,
        rng=np.random.default_rng(seed),
        workdir=workdir,
        emit=setting.emit,
        deadline=setting.deadline,
    )
    cost_before, began = before.cost or setting.cost(program), time.monotonic()
    setting.emit(Started(p.name))
    try:
        result = p.run(program, step.config, ctx)
    except (EdgeBudgetError, KeyboardInterrupt):
        raise
    except Exception as e:
        done = " -> ".join(r.name for r in before.records) or "nothing"
        kind = type(e).__name__
        raise PassError(
            "EB303",
            f"{p.name} crashed after {done}: {kind}: {e}",
            hint="run with --debug for the traceback; take the step out of the plan to go on",
        ) from e
    setting.emit(Finished(p.name, f"{len(result.did)} done, {len(result.declined)} declined"))
    if result.ended_early == "interrupt":
        said = f"interrupted: finishing what {p.name} has reached; Ctrl-C again stops at once"
        setting.emit(Said("warning", said))
    held = (program.facts - p.destroys) | (p.ensures if result.did else frozenset())
    after = replace(result.program, facts=held)
    _check(p, held, after, setting.facts, "EB302", "must leave true")
    record = PassRecord(
        name=p.name,
        config=config_to_dict(step.config),
        seed=seed,
        before=cost_before,
        after=setting.cost(after),
        did=result.did,
        declined=result.declined,
        seconds=time.monotonic() - began,
    )
    # Passes look at the deadline, so whatever ends after it may be less than was asked for.
    cut = before.cut or bool(result.ended_early) or setting.late
    interrupted = before.interrupted or result.ended_early == "interrupt"
    if cut:  # what follows must not be taken for what follows the whole step
        key = _digest({"cut": key})
    return Built(after, (*before.records, record), key, record.after, cut, interrupted)


def _check(
    p: Pass, names: frozenset[str], program: Program, facts: Facts, code: str, verb: str
) -> None:
    for name in sorted(names):
        if name not in facts:
            raise PassError("EB304", f"{p.name} names a fact nobody checks: {name!r}")
        if why := facts[name](program):
            raise PassError(code, f"{p.name} {verb} {name!r}, but {why}")


def _seed(seed: int, step: Step, occurrence: int) -> int:
    """Seed from the step's content, so that inserting a step leaves the others' draws alone."""
    content = {"seed": seed, "pass": step.name, "config": config_to_dict(step.config)}
    return int(_digest({**content, "occurrence": occurrence})[:15], 16)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# Cache entries: model.onnx, and record.json with what the pipeline observed.


def _write(setting: Setting, built: Built, since: int) -> None:
    records = [dataclasses.asdict(r) for r in built.records[since:]]
    content = {"records": records, "facts": sorted(built.program.facts)}

    def fill(folder: Path) -> None:
        (folder / "model.onnx").write_bytes(built.program.body.SerializeToString(True))
        (folder / "record.json").write_text(json.dumps(content, sort_keys=True))

    setting.cache.put(built.key, fill)


def _read(setting: Setting, key: str, like: Program) -> Built | None:
    folder = setting.cache.get(key)
    if folder is None:
        return None
    import onnx

    try:
        content = json.loads((folder / "record.json").read_text())
        body = onnx.load_model(str(folder / "model.onnx"))
        records = tuple(record_from_dict(r) for r in content["records"])
        facts = frozenset(content["facts"])
    except Exception as e:  # whatever is wrong with an entry, the step can be done again
        setting.emit(Said("warning", f"cache entry {key[:12]} is unreadable ({e}); done again"))
        return None
    for r in records:
        setting.emit(Said("info", f"{r.name}: taken from the cache"))
    cost = records[-1].after if records and records[-1].after.size_bytes.value else None
    return Built(replace(like, stage="graph", body=body, facts=facts), records, key, cost)


def record_from_dict(raw: Mapping[str, Any]) -> PassRecord:
    """Rebuild a record stored as plain data."""
    notes = {k: tuple(Note(**n) for n in raw[k]) for k in ("did", "declined")}
    costs = {
        k: Cost(**{name: Figure(**figure) for name, figure in raw[k].items()})
        for k in ("before", "after")
    }
    return PassRecord(**{**raw, **notes, **costs})
