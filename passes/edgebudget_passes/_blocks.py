"""Residual blocks of a network, found in its exported graph and traced back to its modules.

A block is an addition of two tensors that come from one tensor: what lies between that tensor and
the addition, on the dearer side, can be left out, and the other side remains.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from edgebudget.count_torch import count_exported
from edgebudget.export import capture
from edgebudget.program import Program
from edgebudget_passes._nested_edits import Skip
from edgebudget_passes._nested_nodes import readers
from edgebudget_passes._nested_variants import shapes_of

_ADDS = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)
# What a lone zero may pass through and still be a zero to the addition.
_TRANSPARENT = frozenset({"dropout", "mul", "div", "clone", "alias", "contiguous", "_to_copy"})
_MOST_ADDS = 3  # in one layer of a transformer
_PREFIX = "body."  # what the exporter puts before the names of modules


@dataclass(frozen=True, slots=True)
class Block:
    """A module whose work can be left out; `macs` is what that alone saves.

    `family` is equal for blocks of one class that keep one shape: a stack of layers.
    """

    skip: Skip
    macs: int
    family: str

    @property
    def name(self) -> str:
        """The module."""
        return self.skip.module


@dataclass(frozen=True, slots=True)
class Blocks:
    """All blocks in the order of execution, and why other additions are none (module, reason)."""

    found: tuple[Block, ...]
    declined: tuple[tuple[str, str], ...]
    whole: int
    graph: _Graph

    def macs(self, left_out: Iterable[Block]) -> int:
        """What remains without these blocks, counted on the graph."""
        return self.graph.macs_without([self.graph.cuts[b.name] for b in left_out])


def find_blocks(program: Program) -> Blocks:
    """The residual blocks of a module-stage program.

    Raises:
        UnsupportedError: EB210 to EB222, it cannot be exported or counted.
    """
    captured = capture(program)
    graph = _Graph(captured, {c.name: c.macs for c in count_exported(captured).layers})
    arities = _arities(program)
    declined: list[tuple[str, str]] = []
    adds = {add: branch for add in graph.nodes if (branch := graph.branch(add)) is not None}
    around = {add: graph.enclosing(add) for add in adds}
    candidates = {m for m in around.values() if m is not None and m in arities}
    skips: dict[str, Skip] = {}
    for name in sorted(candidates):  # what is around comes before what is in it
        outer = any(n.startswith(f"{name}.") for n in candidates)
        layer = sum(name in graph.paths(add) for add in adds) <= _MOST_ADDS
        # A stage is no block where the blocks in it are; half a layer is none where the layer is.
        if (layer or not outer) and not any(name.startswith(f"{n}.") for n in skips):
            skips[name] = Skip(name, True, arities[name])
    for add, branch in adds.items():
        if any(path in skips for path in graph.paths(add)):
            continue
        end = graph.last_module(add, branch)
        if isinstance(end, str):
            declined.append((graph.path(add), end))
        elif end[0] not in arities:
            declined.append((end[0], "it answers with more than one tensor, or runs twice"))
        else:
            skips[end[0]] = Skip(end[0], False, arities[end[0]])
            graph.cuts[end[0]] = (end[1], None)
    whole = graph.macs_without([])
    found = []
    for name in sorted(skips, key=lambda n: graph.order[graph.cuts[n][0]]):
        saved = whole - graph.macs_without([graph.cuts[name]])
        shape = tuple(graph.cuts[name][0].meta["val"].shape)
        kind = type(program.body.get_submodule(name)).__name__
        family = f"{kind} {shape}" if skips[name].keeps_input else ""
        found.append(Block(skips[name], saved, family))
    return Blocks(tuple(found), tuple(declined), whole, graph)


def _arities(program: Program) -> dict[str, int]:
    """Modules that run once and answer with one tensor: 0, or the length of the tuple it leads."""
    runs: dict[str, int] = {}
    arities: dict[str, int] = {}

    def note(name: str, value: Any) -> None:
        runs[name] = runs.get(name, 0) + 1
        if isinstance(value, Tensor):
            arities[name] = 0
        elif type(value) is tuple and isinstance(value[0], Tensor):
            if all(v is None for v in value[1:]):
                arities[name] = len(value)

    hooks = [
        m.register_forward_hook(lambda m, args, value, n=n: note(n, value))
        for n, m in program.body.named_modules(remove_duplicate=False)
        if n
    ]
    try:
        shapes_of(program, runs.clear)
    finally:
        for hook in hooks:
            hook.remove()
    return {n: a for n, a in arities.items() if runs[n] == 1}


class _Graph:
    """An exported graph with what depends on the inputs, and what each node multiplies."""

    def __init__(self, captured: torch.export.ExportedProgram, macs: Mapping[str, int]) -> None:
        self.all: list[Node] = list(captured.graph.nodes)
        self.order = {n: i for i, n in enumerate(self.all)}
        self.macs = macs
        given = set(captured.graph_signature.user_inputs)
        self._before: dict[Node, int] = {}  # bit i: node i is it or an ancestor, of the data only
        for node in self.all:
            before = 0
            for source in node.all_input_nodes:
                before |= self._before[source]
            fed = before or (node.op == "placeholder" and node.name in given)
            self._before[node] = before | (1 << self.order[node]) if fed else 0
        self.nodes = [n for n in self.all if n.op == "call_function"]
        self._inside: dict[str, list[Node]] = {}
        for node in self.nodes:
            for path in self.paths(node):
                self._inside.setdefault(path, []).append(node)
        # What stands for a module that is left out: its last node, and the node instead of it.
        self.cuts: dict[str, tuple[Node, Node | None]] = {}

    def branch(self, add: Node) -> Node | None:
        """The dearer of two tensors of one origin and shape that meet here."""
        sides = [a for a in add.args[:2] if isinstance(a, Node)]
        if add.target not in _ADDS or len(sides) != 2:
            return None
        shapes = {tuple(n.meta["val"].shape) for n in (*sides, add)}
        common = self._before[sides[0]] & self._before[sides[1]]
        if len(shapes) != 1 or not common:
            return None
        fork = self.all[common.bit_length() - 1]
        work = [self._work(self._before[s] & ~self._before[fork]) for s in sides]
        if max(work) == 0:
            return None
        return sides[0] if work[0] > work[1] else sides[1]

    def enclosing(self, add: Node) -> str | None:
        """The smallest module around an addition that turns one tensor into one of its shape."""
        for path in reversed(self.paths(add)):
            inside = set(self._inside[path])
            given = {
                s for n in inside for s in n.all_input_nodes if s not in inside and self._before[s]
            }
            made = [n for n in inside if any(u not in inside for u in readers(n))]
            if len(made) != 1:
                continue
            after = made[0].meta["val"]
            alike = [s for s in given if _alike(s.meta["val"], after)]
            # What else goes in (a mask) must not be made of it: then it is half a block.
            if len(alike) == 1 and not any(
                self._before[s] >> self.order[alike[0]] & 1 for s in given if s is not alike[0]
            ):
                self.cuts[path] = (made[0], alike[0])
                return path
        return None

    def last_module(self, add: Node, branch: Node) -> tuple[str, Node] | str:
        """The outermost module that ends the branch and its answer, or why there is none."""
        around = set(self.paths(add))
        node = branch
        while True:
            if len(readers(node)) != 1:
                return "its branch is used elsewhere too"
            own = [p for p in self.paths(node) if p not in around]
            if own:
                inside = set(self._inside[own[0]])
                made = [n for n in inside if any(u not in inside for u in readers(n))]
                gives_more = f"{own[0]} answers with more than the branch, or runs twice"
                return (own[0], node) if made == [node] else gives_more
            sources = [s for s in node.all_input_nodes if self._before[s]]
            if _operator(node) not in _TRANSPARENT or len(sources) != 1:
                return "its branch does not end in a module"
            node = sources[0]

    def path(self, node: Node) -> str:
        """The innermost module."""
        return next(reversed(self.paths(node)), "model")

    def macs_without(self, cuts: Sequence[tuple[Node, Node | None]]) -> int:
        """What the graph multiplies where each node has been replaced by another, or a zero."""
        instead = dict(cuts)
        seen: set[Node] = set()
        pending = [self.all[-1]]
        while pending:
            node = pending.pop()
            while node in instead:
                following = instead[node]
                if following is None:
                    break
                node = following
            if node in instead or node in seen:
                continue
            seen.add(node)
            pending.extend(node.all_input_nodes)
        return sum(self.macs.get(n.name, 0) for n in seen)

    def _work(self, bits: int) -> int:
        total = 0
        for node in self.nodes:
            if bits >> self.order[node] & 1:
                total += self.macs.get(node.name, 0)
        return total

    @staticmethod
    def paths(node: Node) -> list[str]:
        """Names of the modules around a node, outermost first, the root left out."""
        stack = (node.meta.get("nn_module_stack") or {}).values()
        names = [str(path) for path, _ in stack]
        return [n.removeprefix(_PREFIX) for n in names if n.startswith(_PREFIX)]


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype


def _operator(node: Node) -> str:
    target = node.target
    return target.overloadpacket.__name__ if isinstance(target, torch._ops.OpOverload) else ""
