"""What one inference of an ONNX graph does, as far as energy is concerned.

Bytes are those of an engine that keeps nothing on chip between nodes: every weight is read once,
every stored activation written once and read once. Real engines move less; a model fitted to
measured energies takes that up in its coefficient, as long as both count alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import onnx

from edgebudget.count_onnx import count_graph
from edgebudget.energy_model import Work
from edgebudget.memory import stored_activations
from edgebudget.onnx_shapes import Tensors, infer, inlined, label

_LEVEL = "dram"
_INTEGERS = ("QLinear", "QGemm", "ConvInteger", "MatMulInteger")
_SAME = frozenset({"Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Identity"})


def work_of(models: Sequence[onnx.ModelProto], seconds: float) -> Work:
    """The work of segments that run one after the other and together take `seconds`.

    MACs are counted by the type they are computed in: that of the integers where a node's data
    comes from a DequantizeLinear, as engines then run it, else of the tensor.

    Raises:
        UnsupportedError: EB210 to EB215 something in a graph has no known cost.
    """
    macs: Counter[str] = Counter()
    moved = 0
    for given in models:
        model = inlined(given)
        report, known = count_graph(model), infer(model)
        kinds = _kinds(model.graph, known)
        for layer in report.layers:
            if layer.macs:
                macs[kinds.get(layer.name, layer.output_dtype)] += layer.macs
        moved += report.weight_bytes + 2 * stored_activations(model)
    return Work(macs=dict(macs), bytes={_LEVEL: float(moved)}, seconds=seconds)


def _kinds(graph: onnx.GraphProto, known: Tensors) -> dict[str, str]:
    """The type that each node computes in, by the node's label."""
    makers = {o: n for n in graph.node for o in n.output}
    found: dict[str, str] = {}
    for index, node in enumerate(graph.node):
        if not node.input:
            continue
        if node.op_type.startswith(_INTEGERS):
            found[label(node, index)] = "int8"
            continue
        name = node.input[0]
        while (maker := makers.get(name)) is not None and maker.op_type in _SAME:
            name = maker.input[0]
        if maker is not None and maker.op_type == "DequantizeLinear":
            name = maker.input[0]
        info = known.get(name)
        if info is not None:
            found[label(node, index)] = info.dtype.removeprefix("u")
    return found
