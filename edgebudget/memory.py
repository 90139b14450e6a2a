"""How much memory one inference needs: stored weights, and activations alive at the same time.

The plan follows the file's own node order at the exported batch. A tensor lives from the node that
writes it to the last that reads it; inputs live from the start, outputs to the end. Views
(Reshape, Flatten, Identity, ...) share their source's storage. Between QuantizeLinear and
DequantizeLinear a tensor is stored once, as integers, when every operator that reads it hands its
result to a QuantizeLinear again (an integer kernel runs there); a DequantizeLinear in front of a
float operator writes real floats. Scratch memory inside kernels is the engine's and is not here.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import accumulate

from onnx import GraphProto, ModelProto, NodeProto

from edgebudget.count_onnx import inner_graphs
from edgebudget.onnx_shapes import (
    Tensors,
    constants,
    infer,
    inlined,
    label,
    subgraphs,
    used,
    within,
)

_VIEWS = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Dropout"})
_ACTIVATIONS = frozenset(
    {"Relu", "Clip", "LeakyRelu", "PRelu", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Elu"}
)  # what integer kernels absorb between the operator and its QuantizeLinear


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Memory of one inference, in bytes."""

    weight_bytes: int
    peak_activation_bytes: int
    peak_at: str  # the node that runs when most is alive
    tensors: tuple[tuple[str, int], ...]  # what is alive then, largest first
    live: tuple[tuple[str, int], ...]  # activation bytes alive while each node runs

    @property
    def total_bytes(self) -> int:
        """Weights resident and activations at their peak."""
        return self.weight_bytes + self.peak_activation_bytes


def plan_memory(model: ModelProto) -> MemoryPlan:
    """Plan the memory of an ONNX model with static shapes.

    Raises:
        UnsupportedError: EB211 a dynamic dimension, EB212 an unknown shape, EB215 storage without
            a size.
    """
    model = inlined(model)
    return _plan(model.graph, infer(model), frozenset())


def stored_activations(model: ModelProto) -> int:
    """Bytes of all activations that are stored at some time, each once; inputs are among them.

    Raises:
        UnsupportedError: as `plan_memory`.
    """
    model = inlined(model)
    return sum(_Stores(model.graph, infer(model), frozenset()).size.values())


def _plan(graph: GraphProto, known: Tensors, borrowed: frozenset[str]) -> MemoryPlan:
    """Plan one graph; `borrowed` inputs are stored by the graph around it."""
    stores = _Stores(graph, known, borrowed)
    weights = sum(info.nbytes for _, info in constants(graph))
    levels = stores.levels(len(graph.node))
    live: list[tuple[str, int]] = []
    peak, best = -1, -1
    inner_at_best: tuple[tuple[str, int], ...] = ()
    for index, node in enumerate(graph.node):
        name = label(node, index)
        inner = [
            _plan(body, within(body, known, given), frozenset(given))
            for body, given in (inner_graphs(node, known) if subgraphs(node) else [])
        ]
        weights += sum(p.weight_bytes for p in inner)
        dearest = max(inner, key=lambda p: p.peak_activation_bytes, default=None)
        alive = levels[index]
        if dearest is not None:
            alive += dearest.peak_activation_bytes
        live.append((name, alive))
        if alive > peak:
            peak, best = alive, index
            inner_at_best = dearest.tensors if dearest is not None else ()
    held = [
        (s, stores.size[s]) for s in (stores.alive(best) if best >= 0 else []) if stores.size[s]
    ]
    return MemoryPlan(
        weight_bytes=weights,
        peak_activation_bytes=max(peak, 0),
        peak_at=live[best][0] if best >= 0 else "",
        tensors=tuple(sorted([*held, *inner_at_best], key=lambda t: (-t[1], t[0]))),
        live=tuple(live),
    )


class _Stores:
    """Which tensors share a storage, how large it is, and when it is alive."""

    def __init__(self, graph: GraphProto, known: Tensors, borrowed: frozenset[str]) -> None:
        self.size: dict[str, int] = {}
        self._store: dict[str, str] = {}  # tensor -> the tensor its storage is named after
        self._known = known
        fixed = {name for name, _ in constants(graph)}
        self._resident = set(fixed)  # constants and views of them: no activation
        inputs = [i.name for i in graph.input if i.name not in fixed | borrowed]
        born: dict[str, int] = {}
        dies: dict[str, int] = {}
        for name in inputs:
            info = known.need(name, NodeProto(op_type="input", name=name))
            self._store[name], self.size[name] = name, info.nbytes
            born[name] = dies[name] = -1
        integer = _IntegerRegions(graph)
        for index, node in enumerate(graph.node):
            if node.op_type != "Constant":
                self._write(node, integer)
            # Weights are dequantized when they are needed, wherever the file puts the node.
            late = node.op_type == "DequantizeLinear" and node.input[0] in self._resident
            for name in (*used([node]), *([] if late else node.output)):
                store = self._store.get(name)
                if store is not None:
                    born.setdefault(store, index)
                    dies[store] = index
        for value in graph.output:
            store = self._store.get(value.name)
            if store is not None:
                dies[store] = len(graph.node)
        self._span = {s: (born[s], dies[s]) for s in self.size if s in born}

    def _write(self, node: NodeProto, integer: _IntegerRegions) -> None:
        for position, name in enumerate(n for n in node.output if n):
            source = node.input[0] if node.input else ""
            shares = position == 0 and (
                node.op_type in _VIEWS
                or name in integer.read_in_place
                or integer.never_stored.get(source) == name
                or (node.op_type in _ACTIVATIONS and name in integer.never_stored)
            )
            if shares and source in self._resident:
                self._resident.add(name)
                continue
            if shares and source in self._store:
                self._store[name] = self._store[source]
                continue
            quantized = integer.never_stored.get(name, name)
            self._store[name] = name
            self.size[name] = self._known.need(quantized, node).nbytes

    def levels(self, nodes: int) -> list[int]:
        """Bytes in use while each of the `nodes` runs."""
        change = [0] * (nodes + 2)
        for store, (born, dies) in self._span.items():
            change[max(born, 0)] += self.size[store]
            change[dies + 1] -= self.size[store]
        return list(accumulate(change))

    def alive(self, index: int) -> list[str]:
        """Storages in use while node `index` runs, in order of birth."""
        return [s for s, (born, dies) in self._span.items() if born <= index <= dies]


class _IntegerRegions:
    """Float tensors of a QDQ graph that an integer kernel never writes out.

    `never_stored` maps a float result to the quantized tensor stored in its place;
    `read_in_place` holds DequantizeLinear results that are read as integers.
    """

    def __init__(self, graph: GraphProto) -> None:
        self.never_stored: dict[str, str] = {}
        self.read_in_place: set[str] = set()
        self._outputs = {o.name for o in graph.output}
        self._readers: defaultdict[str, list[NodeProto]] = defaultdict(list)
        for node in graph.node:
            for name in dict.fromkeys(used([node])):
                self._readers[name].append(node)
        fixed = {name for name, _ in constants(graph)}
        dequantized: set[str] = set()
        integer: list[NodeProto] = []
        for node in graph.node:
            if node.op_type == "DequantizeLinear":
                dequantized.add(node.output[0])
            elif self._is_integer(node, fixed, dequantized):
                integer.append(node)
                for name in node.output:
                    self.never_stored[name] = self._quantized(name)
        kernels = {id(n) for n in integer}
        self.read_in_place = {
            name
            for name in dequantized
            if name not in self._outputs and all(id(n) in kernels for n in self._readers[name])
        }

    def _is_integer(self, node: NodeProto, fixed: set[str], dequantized: set[str]) -> bool:
        if node.op_type in ("QuantizeLinear", "Constant") or subgraphs(node):
            return False
        operands = [i for i in node.input if i and i not in fixed]
        return (
            bool(operands)
            and all(i in dequantized or i in self.never_stored for i in operands)
            and all(self._quantized(o) for o in node.output)
        )

    def _quantized(self, name: str) -> str:
        """The quantized tensor that replaces a float one, or "" where the float is needed."""
        readers = self._readers[name]
        if name in self._outputs or not readers:
            return ""
        if all(r.op_type == "QuantizeLinear" and r.input[0] == name for r in readers):
            return str(readers[0].output[0])
        if len(readers) == 1 and readers[0].op_type in _ACTIVATIONS:
            return self._quantized(readers[0].output[0])
        return ""
