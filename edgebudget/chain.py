"""A chain of segments, each with an exit: run through once, every exit's answer is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from onnx import ModelProto, NodeProto, ValueInfoProto

from edgebudget import graph, shared_weights
from edgebudget.count_onnx import count_graph
from edgebudget.evaluate import Predictions, predict
from edgebudget.events import Emit, ignore
from edgebudget.exits import exit_name
from edgebudget.memory import plan_memory
from edgebudget.onnx_shapes import infer
from edgebudget.segment_graph import counted_where
from edgebudget.static_cost import planned_memory
from edgebudget_runtime.cost import Cost, Figure, counted

if TYPE_CHECKING:
    from edgebudget.target import Placement, Target
    from edgebudget.workload import Array, Dataset


@dataclass(frozen=True, slots=True)
class Counted:
    """What can be counted on segments without running them; the rest of the cost is unknown."""

    cost: Cost
    other_ops: int  # work that is no multiply-accumulate, as `counter.DEFINITION` says


class Chain:
    """Segment files in order on one target; each gives its exit's answer as `output`.

    `exact` runs the target's own engine, which may be a slow emulator (see `Target.open`).

    Raises:
        ArtifactError: EB510 the engine refuses a file; EB530, EB531, EB535 as
            `shared_weights.read`.
        TargetError: EB601, the target's engine is missing.
    """

    def __init__(
        self, files: Sequence[Path], target: Target, output: str, *, exact: bool = False
    ) -> None:
        self.files, self.output = tuple(files), output
        early = [exit_name(output, k) for k in range(1, len(self.files))]
        self.exits = (*early, output)
        self._target = target
        self._samples = target.spec.max_batch
        self._models = [shared_weights.read(f) for f in self.files]
        self._executors = [target.open(f, exact=exact) for f in self.files]

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run N samples through every segment: the answer [N, ...] of each exit, by its name."""
        known = dict(inputs)
        answers: dict[str, Array] = {}
        for name, executor in zip(self.exits, self._executors, strict=True):
            made = executor.run(known)
            answers[name] = made.pop(self.output)
            known |= made
        return answers

    def predict(
        self,
        dataset: Dataset,
        *,
        batch: int = 1,
        indices: Sequence[int] | None = None,
        emit: Emit = ignore,
    ) -> tuple[Predictions, ...]:
        """Each exit's predictions on a data set in depth order, under the name `output`.

        Raises:
            ArtifactError: EB550, EB551 as `evaluate.predict`.
        """
        work = f"evaluate {len(self.exits)} exits"
        found = predict(self.run, dataset, batch=batch, indices=indices, work=work, emit=emit)
        return tuple(Predictions({self.output: found.outputs[e]}, found.labels) for e in self.exits)

    def segment_costs(self) -> tuple[Counted, ...]:
        """What each segment costs alone."""
        each = range(len(self.files))
        return tuple(
            _counted(self.files[k : k + 1], self._models[k : k + 1], self._samples) for k in each
        )

    def prefix_costs(self) -> tuple[Counted, ...]:
        """What leaving at each exit costs: all segments up to it, one after the other.

        Weights that several segments read count once. Memory holds all weights, and at the worst
        moment what the running segment needs, what waits for a later one, and the last answer.
        """
        each = range(1, len(self.files) + 1)
        return tuple(_counted(self.files[:k], self._models[:k], self._samples) for k in each)

    @cached_property
    def placements(self) -> tuple[Placement, ...]:
        """Where the engine puts the nodes of each segment; errors are `Target.placement`'s."""
        return tuple(self._target.placement(f) for f in self.files)

    def prefix_fallback(self) -> tuple[Figure, ...]:
        """Nodes outside the target's processor up to each exit."""
        outside = accumulate(len(p.fallback) for p in self.placements)
        nodes = accumulate(len(p.nodes) for p in self.placements)
        engine = self._target.spec.engine
        return tuple(
            counted(n, f"{of} nodes placed by {engine}")
            for n, of in zip(outside, nodes, strict=True)
        )


def _counted(files: Sequence[Path], models: Sequence[ModelProto], samples: int) -> Counted:
    reports = [count_graph(m) for m in models]
    stored = count_graph(_union(models))
    peak, at = max(_peak(models, k) for k in range(len(models)))
    names, where = (" + ".join(of) for of in ([f.name for f in files], map(counted_where, files)))
    weights = {w for f in files for w in shared_weights.files(f)}
    cost = Cost(
        macs=counted(sum(r.macs for r in reports), f"counted on {where}"),
        params=counted(stored.params, f"initializers of {names}"),
        size_bytes=counted(
            sum(f.stat().st_size for f in (*files, *weights)), f"bytes of {names} and their weights"
        ),
        memory_bytes=planned_memory(stored.weight_bytes, peak, f"in {files[at].name}", samples),
    )
    return Counted(cost, sum(r.other_ops for r in reports))


def _union(models: Sequence[ModelProto]) -> ModelProto:
    """One model of all segments' operators and weights, each once, whoever has it."""
    union = ModelProto()
    union.CopyFrom(models[0])
    body = union.graph
    del body.node[:], body.initializer[:], body.input[:], body.output[:], body.value_info[:]
    stored, made, given = set[str](), set[str](), dict[str, ValueInfoProto]()
    for k, model in enumerate(models):
        answer = model.graph.output[0].name
        for node in model.graph.node:
            copy = NodeProto()
            copy.CopyFrom(node)
            copy.output[:] = [f"{o}@{k}" if o == answer else o for o in node.output]
            names = {o for o in copy.output if o}
            if made.isdisjoint(names):
                body.node.append(copy)
            made |= names
        body.initializer.extend(t for t in model.graph.initializer if t.name not in stored)
        stored.update(t.name for t in model.graph.initializer)
        for value in graph.inputs(model):
            given.setdefault(value.name, value)
    body.input.extend(v for n, v in given.items() if n not in made)
    return union


def _peak(models: Sequence[ModelProto], at: int) -> tuple[int, int]:
    """Most activation bytes alive while segment `at` of a prefix runs, and `at`."""
    model = ModelProto()
    model.CopyFrom(models[at])
    known = infer(models[at])
    answer = known.need(model.graph.output[0].name, NodeProto()).nbytes if at else 0
    there = {v.name for v in graph.inputs(model)}
    made = {v.name for v in model.graph.output}
    for later in models[at + 1 :]:
        for value in graph.inputs(later):
            if value.name in made:
                continue
            # Held from before this segment until after it.
            made.add(value.name)
            model.graph.output.append(value)
            if value.name not in there:
                model.graph.input.append(value)
        made.update(v.name for v in later.graph.output)
    return plan_memory(model).peak_activation_bytes + answer, at
