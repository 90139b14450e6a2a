"""Cut a graph with early exits into a chain of graphs, one for each exit.

Every operator that multiplies runs in the first segment whose exit needs it, and nowhere else.
Where to cut between two segments is a minimum cut over what is handed over: a tensor costs its
bytes, and cheap operators may move. One that only later segments need may run earlier (so that a
float tensor is rounded before it crosses), one that both sides need may run on both (so that what
crosses is the tensor before it was widened). Dequantizing is free, so that integers cross and not
the wider floats made of them: each side dequantizes for itself, as its integer kernels expect.

The operators and their operands are those of the whole graph. An engine that rounds an operator
the same way in both gives the same bits: integer kernels do; float kernels may be fused otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper

from edgebudget import graph as graphs
from edgebudget.count_onnx_rules import MACS
from edgebudget.min_cut import Network
from edgebudget.onnx_shapes import TensorInfo, infer, inlined, subgraphs, used
from edgebudget.program import TensorSpec
from edgebudget.quant_graph import CLAMP_OPS, MOVE_OPS
from edgebudget_runtime.errors import UnsupportedError

# Operators that may run on another side of a cut, or on both.
_MOVABLE = (
    MOVE_OPS
    | CLAMP_OPS
    | frozenset(
        "Add AveragePool Cast Concat DequantizeLinear GlobalAveragePool HardSigmoid HardSwish "
        "LeakyRelu Mul PRelu QuantizeLinear ReduceMean Sub".split()
    )
)
_FREE = frozenset({"DequantizeLinear"})  # part of the operator that reads it
_OPS_PER_BYTE = 8  # a byte handed over is written, kept and read again outside the engine's caches
_SOURCE, _SINK = -1, -2  # beside nodes, which are numbers from 0, and tensors, which are names


@dataclass(frozen=True, slots=True)
class Cut:
    """One segment: a model that gives exit k as the whole model's output.

    `inputs` are the raw inputs and handed-over tensors it reads; `hidden` is what it hands over
    beside its answer. Hidden tensors have their names in the whole graph.
    """

    model: ModelProto
    inputs: tuple[TensorSpec, ...]
    hidden: tuple[TensorSpec, ...]


def split(model: ModelProto, exits: Sequence[str], output: str) -> tuple[Cut, ...]:
    """Cut a model with static shapes, float or quantized, into one segment for each exit.

    `exits` names all outputs of the model in depth order, the final one last (see
    `exits.exit_outputs`); every segment gives its exit under the name `output`. Nodes that no
    output needs are dropped.

    Raises:
        UnsupportedError: EB235 the exits differ in shape or type, EB236 an exit has nothing to
            compute beyond the ones before it, EB237 the model's outputs are not these exits,
            EB238 a tensor that cannot be handed over lies between two exits; EB211, EB212 or
            EB215 a shape is not known.
    """
    whole = _Whole(inlined(model), tuple(exits))
    whole.check(output)
    handed = [frozenset[str]()]  # what has crossed into segment k
    early = frozenset[int]()
    for k in range(len(exits) - 1):
        early = whole.cut(k, early)
        handed.append(whole.crossing(early))
    cuts: list[Cut] = []
    owed: set[str] = set()  # what later segments read
    for k in reversed(range(len(exits))):
        fixed = handed[k] | whole.inputs
        made = owed - fixed
        nodes, reads = whole.needed({exits[k], *made}, fixed)
        owed = (owed - made) | reads
        cuts.append(whole.segment(nodes, reads, made, exits[k], output))
    return tuple(reversed(cuts))


class _Whole:
    """The graph, and the lookups that cutting it needs. Nodes are numbers in file order."""

    def __init__(self, model: ModelProto, exits: tuple[str, ...]) -> None:
        self.model, self.exits = model, exits
        self.nodes = list(model.graph.node)
        inputs = [v.name for v in graphs.inputs(model)]
        self.inputs = frozenset(inputs)
        self._outputs = [o.name for o in model.graph.output]
        self._known = infer(model)
        self.producer = {o: i for i, n in enumerate(self.nodes) for o in n.output if o}
        self._constant = _constants(model)
        self._reads = [
            tuple(dict.fromkeys(r for r in used([n]) if self._flows(r))) for n in self.nodes
        ]
        self._needs = [self._above(e) for e in exits]
        self._order = {name: i for i, name in enumerate([*inputs, *self.producer])}

    def _flows(self, name: str) -> bool:
        """Whether a name is a tensor of this graph that depends on the inputs."""
        return name not in self._constant and (name in self.producer or name in self.inputs)

    def _above(self, name: str) -> frozenset[int]:
        """Nodes that `name` depends on, those on constants left out."""
        found: set[int] = set()
        waiting = [name]
        while waiting:
            node = self.producer.get(waiting.pop())
            if node is not None and node not in found:
                found.add(node)
                waiting.extend(self._reads[node])
        return frozenset(found)

    def check(self, output: str) -> None:
        """Refuse outputs that are no chain of like answers."""
        given = ", ".join(self._outputs)
        if sorted(self.exits) != sorted(self._outputs) or self.exits[-1:] != (output,):
            raise UnsupportedError(
                "EB237",
                f"the outputs {given} are not the exits {', '.join(self.exits)} of {output!r}",
                hint="early exits are supported for models with one output",
            )
        final = self._info(output)
        before = frozenset[int]()
        for name, nodes in zip(self.exits, self._needs, strict=True):
            found = self._info(name)
            if found != final:
                raise UnsupportedError(
                    "EB235",
                    f"exit {name!r} is {found.dtype} {list(found.shape)}, the final answer is "
                    f"{final.dtype} {list(final.shape)}",
                    hint="give every exit a head with the same outputs",
                )
            if self.producer.get(name, -1) not in nodes - before:
                raise UnsupportedError(
                    "EB236",
                    f"exit {name!r} has nothing to compute beyond the exits before it",
                    hint="name the exits in depth order, each with a head of its own",
                )
            before |= nodes

    def _info(self, name: str) -> TensorInfo:
        at = self.producer.get(name)
        fallback = NodeProto(op_type="input", name=name)
        return self._known.need(name, fallback if at is None else self.nodes[at])

    def cut(self, k: int, before: frozenset[int]) -> frozenset[int]:
        """The nodes that segments 0 to k run for good, `before` among them.

        Nodes outside may also run there, where one of exits 0 to k needs them.
        """
        early = frozenset[int]().union(*self._needs[: k + 1])
        live = frozenset[int]().union(*self._needs)
        price = {t: self._price(t) for i in live for t in (*self._reads[i], *self.nodes[i].output)}
        work = {i: self._work(i) for i in live}
        endless = sum(p for p in price.values() if p) + sum(work.values()) + 1
        net = Network()
        for name in sorted(self.inputs & price.keys(), key=self._order.__getitem__):
            net.add(_SOURCE, name, price[name] or endless)
        for i in sorted(live):
            movable = self.nodes[i].op_type in _MOVABLE and i not in before
            if i in early or i in before:
                net.add(_SOURCE, i, work[i] if movable else endless)
            else:
                net.add(i, _SINK, work[i] if movable else endless)
            for name in self.nodes[i].output:
                if self._flows(name):
                    net.add(i, name, price[name] or endless)
            for name in self._reads[i]:
                net.add(name, i, endless)
                at = self.producer.get(name)
                if at is not None and at not in early | before:
                    net.add(i, at, endless)  # an early node cannot read what is only made late
        for name in self.exits[k + 1 :]:
            net.add(name, _SINK, endless)
        cost, side = net.cut(_SOURCE, _SINK)
        if cost >= endless:
            raise UnsupportedError(
                "EB238",
                f"no tensor between exit {self.exits[k]!r} and the next can be handed over",
                hint="place the exit at another block",
            )
        return frozenset(i for i in live if i in side)

    def _price(self, name: str) -> int:
        """What handing a tensor over costs; 0: it cannot be."""
        found = self._known.get(name)
        if found is None or not found.shape:  # samples are told apart along the first axis
            return 0
        return max(1, found.nbytes) * _OPS_PER_BYTE

    def _work(self, at: int) -> int:
        """What running a movable node once more, or for nothing, costs."""
        node = self.nodes[at]
        if node.op_type in _FREE:
            return 0
        found = [self._known.get(n) for n in (*self._reads[at], *node.output)]
        return max((f.elements for f in found if f is not None), default=1) + 1

    def crossing(self, early: frozenset[int]) -> frozenset[str]:
        """Tensors that `early` nodes make and others read; inputs cross by themselves."""
        live = frozenset[int]().union(*self._needs)
        read = {name for i in live - early for name in self._reads[i]}
        return frozenset(n for n in read if self.producer.get(n, -1) in early)

    def needed(self, wanted: set[str], fixed: frozenset[str]) -> tuple[list[int], set[str]]:
        """Nodes that make `wanted` out of `fixed` tensors and constants, and those they read."""
        nodes: set[int] = set()
        reads: set[str] = set()
        waiting = sorted(wanted)
        while waiting:
            name = waiting.pop()
            if name in fixed:
                reads.add(name)
                continue
            at = self.producer.get(name)
            if at is not None and at not in nodes:
                nodes.add(at)
                waiting.extend(used([self.nodes[at]]))
        return sorted(nodes), reads

    def segment(
        self, nodes: list[int], reads: set[str], made: set[str], exit: str, output: str
    ) -> Cut:
        """The model of one segment."""
        inputs, hidden = (self._specs(names) for names in (reads, made))
        answer = self._specs({exit})[0]
        copies = [_copy(self.nodes[i]) for i in nodes]
        if exit != output:
            copies = _renamed(copies, exit, output, keep=exit in made)
        model = ModelProto()
        model.CopyFrom(self.model)
        body = model.graph
        del body.node[:], body.initializer[:], body.value_info[:]
        del body.input[:], body.output[:]
        body.node.extend(copies)
        read = set(used(copies))
        body.initializer.extend(t for t in self.model.graph.initializer if t.name in read)
        body.input.extend(_value(s) for s in inputs)
        body.output.extend([_value(answer, output), *(_value(s) for s in hidden)])
        inside = {o for n in copies for o in n.output} - made - {exit, output}
        body.value_info.extend(v for v in self.model.graph.value_info if v.name in inside)
        return Cut(model, inputs, hidden)

    def _specs(self, names: Iterable[str]) -> tuple[TensorSpec, ...]:
        """Shapes and types, inputs first and then in the order the graph makes them."""
        found = [(n, self._info(n)) for n in sorted(names, key=self._order.__getitem__)]
        return tuple(TensorSpec(n, i.shape, i.dtype) for n, i in found)


def _constants(model: ModelProto) -> set[str]:
    """Stored tensors and what is merely prepared from them: every segment prepares its own."""
    found = {t.name for t in model.graph.initializer}
    for node in model.graph.node:
        again = node.op_type in MACS or node.op_type.startswith("Random") or subgraphs(node)
        if not again and all(i in found for i in node.input if i):
            found.update(node.output)
    return found


def _copy(node: NodeProto) -> NodeProto:
    copy = NodeProto()
    copy.CopyFrom(node)
    return copy


def _renamed(nodes: list[NodeProto], exit: str, output: str, *, keep: bool) -> list[NodeProto]:
    """Nodes that give `exit` as `output`; under its own name too where something reads it."""
    if keep or exit in used(nodes):
        return [*nodes, helper.make_node("Identity", [exit], [output], name=f"{exit}/Identity")]
    for node in nodes:
        node.output[:] = [output if o == exit else o for o in node.output]
    return nodes


def _value(spec: TensorSpec, name: str = "") -> onnx.ValueInfoProto:
    names = {"float32": TensorProto.FLOAT, "float64": TensorProto.DOUBLE}
    kind = names.get(spec.dtype) or TensorProto.DataType.Value(spec.dtype.upper())
    return helper.make_tensor_value_info(name or spec.name, kind, spec.shape)
