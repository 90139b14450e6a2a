"""What every node of an artifact's files computes and moves, and how long it takes where known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from edgebudget_runtime.cost import Evidence, Figure
from edgebudget_runtime.errors import EdgeBudgetError

if TYPE_CHECKING:
    import onnx

    from edgebudget.onnx_shapes import Tensors
    from edgebudget.target import Target
    from edgebudget_runtime.manifest import Manifest

_ROUNDING = frozenset({"QuantizeLinear", "DequantizeLinear"})


@dataclass(frozen=True, slots=True)
class Load:
    """One node. Rounding steps are no nodes of their own: integer kernels absorb them."""

    segment: str
    name: str
    op: str
    macs: float
    bytes: float  # read and written, weights included, each tensor as it is stored
    ms: float | None = None


@dataclass(frozen=True, slots=True)
class Roof:
    """What a processor does at best."""

    macs_per_s: Figure
    bytes_per_s: Figure


@dataclass(frozen=True, slots=True)
class Anatomy:
    """All nodes in order. `evidence` and `how` are those of the times, unknown without any."""

    loads: tuple[Load, ...]
    roof: Roof | None = None
    evidence: Evidence = "unknown"
    how: str = ""


@dataclass(frozen=True, slots=True)
class NodeTimes:
    """What the nodes of one file take, with its evidence, and the processor's roof if known."""

    ms: Mapping[str, float]  # node name -> ms
    evidence: Evidence
    how: str  # where the times come from, with their error
    roof: Roof | None = None


@runtime_checkable
class TellsNodes(Protocol):
    """A target whose compiler or cost model says what each node takes, without a run."""

    def node_times(self, file: Path, model: onnx.ModelProto) -> NodeTimes:
        """Of a lowered file, and of the graph that it was made of.

        Raises:
            EdgeBudgetError: nothing can be said about this file.
        """
        ...


def anatomy(
    folder: Path,
    manifest: Manifest,
    target: Target | None = None,
    times: Mapping[tuple[str, str], float] | None = None,
    how: str = "",
    roof: Roof | None = None,
) -> Anatomy:
    """Nodes of the largest sub-network's files.

    `times` (segment and node -> ms) were measured; without them a target's compiler or cost model
    serves. No nodes for files whose graph is not there. Nothing here is timed: equal files, equal
    answers.
    """
    from edgebudget.segment_graph import read_segment_graph

    found: list[Load] = []
    modelled = target if times is None and isinstance(target, TellsNodes) else None
    said: Evidence = "unknown" if times is None else "measured"
    for id in manifest.subnetworks[0].path:
        try:
            segment = manifest.segment(id)
            model = read_segment_graph(folder, segment)
            loads = graph_loads(model, id)
        except Exception:  # another engine's file, or an operator that we do not count
            return Anatomy(())
        if modelled is not None:
            told = NodeTimes({}, "unknown", "")
            try:
                told = modelled.node_times(folder / segment.file, model)
                said, roof = told.evidence, told.roof
                how = f"{told.how}; what the graph itself takes is left out"
            except EdgeBudgetError:  # the model is of another version, or knows not every kernel
                modelled = None
            found += [_timed(x, told.ms.get(x.name)) for x in loads]
        else:
            found += [_timed(x, (times or {}).get((id, x.name))) for x in loads]
    if not any(x.ms is not None for x in found):
        said, how = "unknown", ""
    return Anatomy(tuple(found), roof, said, how)


def _timed(load: Load, ms: float | None) -> Load:
    return Load(load.segment, load.name, load.op, load.macs, load.bytes, ms)


def graph_loads(model: onnx.ModelProto, segment: str) -> list[Load]:
    """Every node of a graph that does something at run time.

    Raises:
        UnsupportedError: EB2xx, a shape or an operator is not known.
    """
    from edgebudget.count_onnx import count_graph
    from edgebudget.onnx_shapes import constants, infer, inlined, label

    model = inlined(model)
    macs = {x.name: float(x.macs) for x in count_graph(model).layers}
    known, fixed = infer(model), set(dict(constants(model.graph)))
    graph = model.graph
    stored = stored_bytes(model, known)
    found = []
    for index, node in enumerate(graph.node):
        if all(i in fixed for i in node.input if i):
            fixed.update(node.output)
            continue
        if node.op_type in _ROUNDING or node.op_type == "Constant":
            continue
        name = label(node, index)
        moved = sum(stored(v) for v in (*node.input, *node.output) if v)
        found.append(Load(segment, name, node.op_type, macs.get(name, 0.0), moved))
    return found


def stored_bytes(model: onnx.ModelProto, known: Tensors) -> Callable[[str], float]:
    """Bytes of a value as memory holds it: rounded ones as integers."""
    makers = {o: n for n in model.graph.node for o in n.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)

    def held(name: str) -> float:
        maker, users = makers.get(name), readers.get(name, [])
        if maker is not None and maker.op_type == "DequantizeLinear":
            name = maker.input[0]
        elif users and all(u.op_type == "QuantizeLinear" for u in users):
            name = users[0].output[0]
        info = known.get(name)
        return float(info.nbytes) if info is not None else 0.0

    return held
