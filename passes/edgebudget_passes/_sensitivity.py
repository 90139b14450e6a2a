"""Mixed precision: which layers must stay finer than 8 bits so that the outputs stay close.

The error that each group of layers alone adds is measured, and an integer programme picks the
cheapest set to keep finer. Errors of groups add up almost independently, which the result is
then checked for: "HAWQ-V3: Dyadic Neural Network Quantization", Yao et al., 2021 (the programme);
the sensitivities here are measured on outputs instead of derived from second derivatives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgebudget.events import Advanced, Finished, Started
from edgebudget_passes._assign import Assignment

if TYPE_CHECKING:
    from edgebudget.events import Emit
    from edgebudget.quant_graph import Graph
    from edgebudget_passes._held_back import Judge
    from edgebudget_passes._recipes import Bench, Recipe

_WORK = 1e12  # multiply-accumulates spent on measuring sensitivities
_SAMPLES = 16
TAIL = "after the last layer"


@dataclass(frozen=True, slots=True)
class Group:
    """Nodes that change precision together, their multiply-accumulates and the error they add."""

    nodes: frozenset[str]
    macs: int
    noise: float = 0.0


def groups(graph: Graph, assignment: Assignment, most: int) -> dict[str, Group]:
    """One group for each layer with weights and what follows it, merged down to `most`.

    Nodes that no later layer reads form a group of their own, `TAIL`.
    """
    weighted = [n for n in graph.nodes if n.name in assignment.dtypes and graph.has_weight(n)]
    feeding: set[str] = set()
    for node in reversed(graph.nodes):
        readers = [r for o in (*node.output, graph.result(node)) for r in graph.readers[o]]
        if any(graph.has_weight(r) or r.name in feeding for r in readers):
            feeding.add(node.name)
    merged = max(1, -(-len(weighted) // most))
    owner = {n.name: weighted[i - i % merged].name for i, n in enumerate(weighted)}
    made: dict[str, str] = {}
    for node in graph.nodes:
        if node.name not in assignment.dtypes:
            continue
        if node.name not in owner:
            before = [made[n] for _, n in graph.data_inputs(node) if n in made]
            first = before[-1] if before else weighted[0].name
            owner[node.name] = first if node.name in feeding else TAIL
        made.update(dict.fromkeys((*node.output, graph.result(node)), owner[node.name]))
    found: dict[str, set[str]] = {}
    for name, head in owner.items():
        found.setdefault(head, set()).add(name)
    macs = {n.name: graph.macs(n) for n in weighted}
    return {
        head: Group(frozenset(names), sum(macs.get(n, 0) for n in names))
        for head, names in found.items()
    }


def measure(
    bench: Bench, judge: Judge, assignment: Assignment, recipe: Recipe, emit: Emit
) -> dict[str, Group]:
    """Groups with the output noise that each adds when it alone is in 8 bits."""
    total = sum(bench.graph.macs(n) for n in bench.graph.nodes)
    few = judge.fewer(_SAMPLES)
    most = max(4, int(_WORK / max(1, total * few.samples)))
    found = groups(bench.graph, assignment, most)
    emit(Started("sensitivity", len(found)))
    measured = {}
    for head, group in found.items():
        alone = Assignment(
            {n: assignment.dtypes[n] for n in group.nodes}, assignment.open & group.nodes, {}
        )
        noise = few.error(bench.build(alone, recipe))
        measured[head] = Group(group.nodes, group.macs, noise)
        emit(Advanced("sensitivity", note=head))
    emit(Finished("sensitivity"))
    return measured


def choose(found: Mapping[str, Group], allowed: float) -> list[str]:
    """The groups to keep finer: least multiply-accumulates such that the others' noise fits."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    names: Sequence[str] = list(found)
    noise = np.array([found[n].noise for n in names])
    # A group without multiplications costs something too: equal plans prefer fewer of them.
    cost = np.array([found[n].macs for n in names], float) + 1.0
    if not np.isfinite(noise).all():
        noise = np.where(np.isfinite(noise), noise, 1e30)
    scale = max(float(noise.max()), 1e-30)
    kept_noise = LinearConstraint(-noise[None] / scale, ub=(allowed - noise.sum()) / scale)
    answer = milp(
        cost / cost.max(),
        constraints=kept_noise,
        integrality=np.ones(len(names), np.int64),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 1e-3},
    )
    if answer.x is None:  # only when nothing may stay in 8 bits
        return list(names)
    return [n for n, x in zip(names, answer.x, strict=True) if x > 0.5]
