"""Named checks on a program. A pass names those it needs, makes true, or breaks.

Each returns why the fact does not hold, or None. Nothing heavy is loaded until one is asked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from edgebudget.program import Program
    from edgebudget.workload import Array


def _valid_graph(program: Program) -> str | None:
    """The ONNX checker accepts the graph, and no weight is listed as an input."""
    if program.stage == "module":
        return "it is still a module"
    import onnx

    from edgebudget import graph

    try:
        onnx.checker.check_model(program.body)
    except Exception as e:  # ValidationError, and others out of its C++ part
        return f"the graph is not valid ONNX: {(str(e).strip().splitlines() or ['?'])[0]}"
    fed = [v.name for v in graph.inputs(program.body)]
    extra = len(program.body.graph.input) - len(fed)
    if extra:
        return f"{extra} weights are listed as inputs"
    if fed != [s.name for s in program.inputs]:
        return f"its inputs are {fed}, not {[s.name for s in program.inputs]}"
    made = tuple(o.name for o in program.body.graph.output)
    return None if made == program.outputs else f"its outputs are {made}, not {program.outputs}"


def _static_shapes(program: Program) -> str | None:
    """Every value of the graph has a shape made of numbers (a module is given fixed inputs)."""
    if program.stage == "module":
        return None
    from edgebudget import graph

    known = graph.shapes(program.body)
    for node in program.body.graph.node:
        for name in node.output:
            if name and name not in known:
                return f"the shape of {name!r} ({node.op_type} {node.name!r}) is not known"
    return None


def _finite_weights(program: Program) -> str | None:
    """No weight is NaN; none is infinite, scalars aside (masks use them)."""
    import numpy as np

    for name, value in _weights(program):
        if value.dtype.kind == "f" and value.ndim > 0 and not np.isfinite(value).all():
            return f"weight {name!r} holds NaN or infinity"
    return None


def _batchnorm_folded(program: Program) -> str | None:
    """No batch normalisation directly follows a convolution or linear layer it could join."""
    if program.stage == "module":
        from edgebudget.fold import foldable

        pairs, _ = foldable(program)
        return f"{pairs[0].norm!r} can still be folded into {pairs[0].layer!r}" if pairs else None
    maker = {o: n for n in program.body.graph.node for o in n.output}
    uses = [i for n in program.body.graph.node for i in n.input]
    for node in program.body.graph.node:
        if node.op_type != "BatchNormalization" or node.input[0] not in maker:
            continue
        before = maker[node.input[0]]
        if before.op_type in ("Conv", "ConvTranspose") and uses.count(node.input[0]) == 1:
            return f"{node.name!r} still follows {before.name!r}"
    return None


def _quantized(program: Program) -> str | None:
    """Some convolution or matrix product reads integers (mixed precision leaves others float)."""
    if program.stage == "module":
        return "it is still a module"
    maker = {o: n.op_type for n in program.body.graph.node for o in n.output}
    for node in program.body.graph.node:
        if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            if maker.get(node.input[0]) == "DequantizeLinear":
                return None
    return "no layer computes in integers"


def _weights(program: Program) -> Iterator[tuple[str, Array]]:
    if program.stage == "module":
        for name, tensor in program.body.state_dict().items():
            if tensor.is_floating_point():
                yield name, tensor.detach().float().cpu().numpy()
        return
    from onnx import numpy_helper

    from edgebudget import graph

    for tensor in graph.tensors(program.body.graph):
        yield tensor.name, numpy_helper.to_array(tensor)


FACTS: dict[str, Callable[[Program], str | None]] = {
    "batchnorm_folded": _batchnorm_folded,
    "finite_weights": _finite_weights,
    "quantized": _quantized,
    "static_shapes": _static_shapes,
    "valid_graph": _valid_graph,
}
