"""What the captured graph says about exits: where it narrows to one tensor, and how it ends."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Node

from edgebudget.count_torch import count_exported
from edgebudget.count_torch_rules import MACS
from edgebudget.export import capture

if TYPE_CHECKING:
    from edgebudget.program import Program

Layout = Literal["map", "map-last", "tokens", "vector"]
TailOp = tuple[str, tuple[float, ...]]

_CHANNELS_SECOND = frozenset(
    {"conv1d", "conv2d", "conv3d", "convolution", "batch_norm", "group_norm", "instance_norm"}
    | {"_native_batch_norm_legit_no_training", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d"}
    | {"max_pool1d", "avg_pool1d", "adaptive_avg_pool1d", "adaptive_max_pool2d", "prelu"}
)
_CHANNELS_LAST = frozenset({"linear", "layer_norm", "native_layer_norm", "rms_norm", "addmm"})
_MOVES = frozenset(
    {"view", "reshape", "_unsafe_view", "flatten", "squeeze", "unsqueeze", "alias", "clone"}
    | {
        "contiguous",
        "detach",
        "dropout",
        "select",
        "slice",
        "permute",
        "transpose",
        "t",
        "_to_copy",
    }
    | {"to", "expand"}
)
_PLAIN = frozenset(
    {"sigmoid", "tanh", "relu", "relu6", "hardsigmoid", "hardtanh", "softplus", "exp", "neg"}
    | {"clamp"}
)
_SCALAR = frozenset({"mul", "div", "add", "sub"})
_SOFT = frozenset({"softmax", "log_softmax", "_softmax", "_log_softmax"})
_ENDS = frozenset(
    {"mean", "sum", "adaptive_avg_pool2d", "adaptive_avg_pool1d", "avg_pool2d", "avg_pool1d"}
    | {"amax", "max_pool2d", "adaptive_max_pool2d", "batch_norm", "add", "sub"}
)


@dataclass(frozen=True, slots=True)
class Narrow:
    """A node that everything after it depends on alone, and the MACs up to it, its own included."""

    node: Node
    macs: int


class Traced:
    """A captured program with the MACs of its nodes."""

    def __init__(self, program: Program) -> None:
        """Capture and count.

        Raises:
            UnsupportedError: EB220, EB222 it cannot be captured, EB211 to EB214 or counted.
        """
        captured = capture(program)
        self.macs = {x.name: x.macs for x in count_exported(captured).layers}
        if not self.macs.keys() <= {n.name for n in captured.graph.nodes}:
            captured = captured.run_decompositions({})  # as the count has done for itself
            self.macs = {x.name: x.macs for x in count_exported(captured).layers}
        self.outputs = _outputs(captured)
        nodes = captured.graph.nodes
        self.nodes: list[Node] = list(nodes)
        specs = zip(captured.graph_signature.input_specs, nodes, strict=False)
        given = [n for s, n in specs if s.kind == InputKind.USER_INPUT]
        self._varies = _after(self.nodes, given)
        # Masks and the like are made of the raw inputs without any weights; whoever needs them
        # can make them again, so they do not tie a part of the graph to another.
        working = [n for n in self._varies if n.name in self.macs and self._is_work(n)]
        self.works = _after(self.nodes, working)

    def _is_work(self, node: Node) -> bool:
        stored = (s for s in node.all_input_nodes if s not in self._varies)
        large = any(s.op == "placeholder" and _weights(s) > 1 for s in stored)
        return large or self.macs[node.name] > 0

    def ancestors(self, ends: Iterable[Node]) -> set[Node]:
        """These nodes and all that they are computed from."""
        found = set(ends)
        pending = list(found)
        while pending:
            for source in pending.pop().all_input_nodes:
                if source not in found:
                    found.add(source)
                    pending.append(source)
        return found

    def cost(self, ends: Iterable[Node]) -> int:
        """MACs of all that these nodes are computed from."""
        return sum(self.macs.get(n.name, 0) for n in self.ancestors(ends))

    def narrows(self, answer: Node) -> list[Narrow]:
        """Tensors between inputs and answer that alone decide what comes after, in order.

        Every node comes before or after such a tensor in any order of execution, so looking at
        one order is enough.
        """
        alive = self.ancestors([answer])
        order = [n for n in self.nodes if n in alive and n in self.works]
        place = {n: i for i, n in enumerate(order)}
        last = {
            n: max((place[u] for u in n.users if u in place), default=i) for n, i in place.items()
        }
        found, macs, reach = [], self.cost([answer]), 0
        macs -= sum(self.macs.get(n.name, 0) for n in order)
        for i, node in enumerate(order[:-1]):
            macs += self.macs.get(node.name, 0)
            if reach <= i and isinstance(node.meta.get("val"), torch.Tensor):
                found.append(Narrow(node, macs))
            reach = max(reach, last[node])
        return found

    def varies(self, node: Node) -> bool:
        """Whether a node depends on the program's inputs."""
        return node in self._varies


def exit_macs(program: Program) -> tuple[int, ...]:
    """MACs of answering at each output of a program with exits, the exits before it included.

    Raises:
        UnsupportedError: EB220, EB222, EB211 to EB214.
    """
    traced = Traced(program)
    return tuple(traced.cost(traced.outputs[: k + 1]) for k in range(len(traced.outputs)))


def layout(node: Node) -> Layout:
    """What the dimensions of a tensor [N, ...] mean, by the first layer that reads it."""
    rank = len(shape(node))
    if rank == 2:
        return "vector"
    second = rank >= 4
    pending, seen = deque(node.users), set(node.users)
    while pending:
        user = pending.popleft()
        name = op(user)
        if name in _CHANNELS_SECOND or name in _CHANNELS_LAST:
            second = name in _CHANNELS_SECOND
            break
        for further in user.users:
            if further not in seen:
                seen.add(further)
                pending.append(further)
    if second:
        return "map"
    return "tokens" if rank == 3 else "map-last"


def token(traced: Traced, answer: Node, length: int) -> int | None:
    """The position of a sequence [N, length, C] that the answer is read from, if there is one."""
    alive = traced.ancestors([answer])
    found = None
    for node in traced.nodes:
        if node not in alive or node not in traced.works or op(node) != "select":
            continue
        source, dim, index = node.args[0], node.args[1], node.args[2]
        assert isinstance(source, Node)
        of = shape(source)
        if len(of) == 3 and of[1] == length and dim == 1 and isinstance(index, int):
            found = index
    return found


def tail(traced: Traced, answer: Node) -> tuple[TailOp, ...] | str:
    """What is applied to each number after the last layer, in order; or why it cannot be told."""
    found: list[TailOp] = []
    node = answer
    while True:
        name = op(node).rstrip("_")
        if name in MACS:
            return tuple(reversed(found))
        sources = [s for s in node.all_input_nodes if traced.varies(s)]
        step = _step(node, name) if len(sources) == 1 else None
        if step is None and not (name in _MOVES and len(sources) == 1):
            if name in _ENDS or (name in _SCALAR and len(sources) == 1):
                return tuple(reversed(found))
            return f"it ends in {name or node.op}, which a head of its own cannot imitate"
        if step is not None:
            found.append(step)
        node = sources[0]


def _step(node: Node, name: str) -> TailOp | None:
    """One element-wise operator with numbers for arguments, or None."""
    rest = node.args[1:]
    if name in _PLAIN and all(isinstance(a, (int, float)) for a in rest):
        return name, tuple(float(a) for a in rest if isinstance(a, (int, float)))
    if name in _SCALAR and len(rest) == 1 and isinstance(rest[0], (int, float)):
        return name, (float(rest[0]),)
    if name in _SOFT and len(shape(node)) == 2 and rest[0] in (1, -1):
        return name.lstrip("_"), ()
    return None


def op(node: Node) -> str:
    """The ATen operator's name without its overload; "" for other nodes."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target.overloadpacket.__name__)
    return ""


def shape(node: Node) -> tuple[int, ...]:
    """The shape of a node's tensor."""
    value = node.meta["val"]
    assert isinstance(value, torch.Tensor)
    return tuple(int(d) for d in value.shape)


def _weights(node: Node) -> int:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return 0
    return value.numel()


def _after(nodes: Sequence[Node], starts: Iterable[Node]) -> set[Node]:
    """These nodes and all that depend on them."""
    found = set(starts)
    for node in nodes:  # in execution order
        if node.op != "output" and any(s in found for s in node.all_input_nodes):
            found.add(node)
    return found


def _outputs(captured: ExportedProgram) -> tuple[Node, ...]:
    values = captured.graph.output_node().args[0]
    assert isinstance(values, (tuple, list))
    specs = captured.graph_signature.output_specs
    pairs: Mapping[int, Node] = {
        i: v
        for i, (s, v) in enumerate(zip(specs, values, strict=True))
        if s.kind == OutputKind.USER_OUTPUT and isinstance(v, Node)
    }
    return tuple(pairs.values())
