"""The kernels of a graph by rules of ours, for engines that tell neither kernels nor their times.

What an engine fuses is its own: a subclass says so. Imports onnx.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgebudget.kernels import Kernel
from edgebudget.layer_loads import stored_bytes

if TYPE_CHECKING:
    import onnx

    from edgebudget.onnx_shapes import Tensors

_POOLS = frozenset({"MaxPool", "AveragePool"})
FREE = frozenset({"Constant", "Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze"})

NodeKernel = tuple[str, Kernel]  # the node's name, "" for what is no node, and its kernel


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of a kernel, as `edgebudget.kernels.Kernel` has them."""

    rows: int = 0
    width: int = 0
    cin: int = 0
    cout: int = 0
    size: int = 0
    stride: int = 0
    parts: int = 0


class GraphKernels:
    """A graph, and the sizes of what its nodes do.

    Raises:
        UnsupportedError: EB2xx, a shape or an operator is not known.
    """

    clips: frozenset[str]  # activations that are part of the kernel before them,
    clipped: frozenset[str]  # where that is one of these

    def __init__(self, model: onnx.ModelProto) -> None:
        from edgebudget.count_onnx import count_graph
        from edgebudget.onnx_shapes import constants, infer, inlined, label

        self.model = inlined(model)
        graph = self.model.graph
        self.known: Tensors = infer(self.model)
        self.macs = {x.name: float(x.macs) for x in count_graph(self.model).layers}
        self.fixed = set(dict(constants(graph)))
        self.nodes: list[tuple[str, onnx.NodeProto]] = []  # that compute, with their labels
        for index, node in enumerate(graph.node):
            if all(i in self.fixed for i in node.input if i):
                self.fixed.update(node.output)
            else:
                self.nodes.append((label(node, index), node))
        self.bytes = stored_bytes(self.model, self.known)
        self.maker = {o: n for n in graph.node for o in n.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def kernel(
        self, node: onnx.NodeProto, kind: str, macs: float, *, floats: bool = False
    ) -> Kernel:
        """One node's kernel. `floats`: it computes in float, whatever is stored around it."""
        size = self._float_bytes if floats else self.bytes
        held = [i for i in node.input if i and i in self.fixed]
        read = sum(size(i) for i in node.input if i and i not in held)
        weights = sum(size(i) for i in held)
        written = sum(size(o) for o in node.output if o)
        kind, sizes = self._sizes(node, kind)
        return Kernel(
            kind, macs, read, weights, written, sizes.rows, sizes.width, sizes.cin, sizes.cout,
            sizes.size, sizes.stride, sizes.parts,
        )  # fmt: skip

    def ends(self) -> list[NodeKernel]:
        """What enters and leaves: both are copied, and pictures turned to channels last."""
        graph, found = self.model.graph, list[NodeKernel]()
        for kind, values in (("Input", graph.input), ("Output", graph.output)):
            for name in (v.name for v in values if v.name not in self.fixed):
                shape, size = self.shape(name), self.bytes(name)
                width, channels = (shape[-1], shape[1]) if len(shape) == 4 else (0, 0)
                rows = math.prod(shape) // max(1, width)
                found.append(("", Kernel(kind, 0.0, size, 0.0, size, rows, width, 0, channels)))
        return found

    def fused(self, node: onnx.NodeProto) -> bool:
        """Whether an activation is part of the kernel before it."""
        maker = self.maker.get(node.input[0]) if node.op_type in self.clips else None
        if maker is None or maker.op_type not in self.clipped:
            return False
        return len(self.readers.get(node.input[0], [])) == 1

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a value; () where it is not known."""
        info = self.known.get(name)
        return info.shape if info is not None else ()

    def _sizes(self, node: onnx.NodeProto, kind: str) -> tuple[str, Sizes]:
        out = self.shape(node.output[0])
        if node.op_type in _POOLS and len(out) == 4:
            from edgebudget.graph import attributes

            found = attributes(node)
            size, stride = max(found["kernel_shape"]), max(found.get("strides", [1]))
            return kind, Sizes(out[2] * out[3], out[3], out[1], out[1], size, stride)
        if node.op_type in ("Conv", "ConvTranspose") and len(out) == 4:
            x, w = self.shape(node.input[0]), self.shape(node.input[1])
            groups = max(1, x[1] // max(1, w[1])) if node.op_type == "Conv" else 1
            size = max(w[2:])
            if groups > 1:
                kind += ".dw" if w[1] == 1 else ".group"
            elif size == 1:
                kind += ".1x1"
            stride = max(1, round(x[2] / max(1, out[2])))
            return kind, Sizes(out[2] * out[3], out[3], x[1], out[1], size, stride, groups)
        if node.op_type in ("Gemm", "MatMul") and out:
            inner = self.shape(node.input[0])[-1]
            batched = node.op_type == "MatMul" and node.input[1] not in self.fixed
            parts = math.prod(out[:-2]) if batched else 1
            rows = math.prod(out) // max(1, out[-1])
            kind += ".batch" if batched else ""
            return kind, Sizes(rows, out[-1], inner, out[-1], 1, 1, max(1, parts))
        width = out[-1] if out else 0
        channels = out[1] if len(out) == 4 else 0
        return kind, Sizes(math.prod(out) // max(1, width), width, 0, channels)

    def _float_bytes(self, name: str) -> int:
        return 4 * math.prod(self.shape(name))
