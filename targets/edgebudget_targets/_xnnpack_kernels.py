"""What ExecuTorch runs for a graph, operator by operator, as XNNPACK fuses it.

The engine tells neither its kernels nor their times (its event log is not built into the package),
so that the split is ours: an activation that clips is fused into what feeds it, rounding is no
kernel but where integers begin or end, pads that differ between a picture's edges are written out
before an integer convolution (a float one does them itself), and what enters and leaves the graph
is copied. Imports onnx.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from edgebudget.kernels import Kernel
from edgebudget_targets._graph_kernels import FREE, GraphKernels, NodeKernel

if TYPE_CHECKING:
    import onnx

_ROUNDING = frozenset({"QuantizeLinear", "DequantizeLinear"})


def kernels(model: onnx.ModelProto, portable: Collection[str]) -> list[NodeKernel]:
    """Every kernel of one run, in order. `portable` names nodes that XNNPACK does not take.

    Raises:
        UnsupportedError: EB2xx, a shape or an operator is not known.
    """
    return _Split(model, portable).kernels()


class _Split(GraphKernels):
    clips = frozenset({"Relu", "Clip"})
    clipped = frozenset({"Conv", "Gemm", "MatMul", "Add", "Sub", "Mul", "ConvTranspose"})

    def __init__(self, model: onnx.ModelProto, portable: Collection[str]) -> None:
        super().__init__(model)
        self._portable = portable

    def kernels(self) -> list[NodeKernel]:
        found = self.ends()
        for name, node in self.nodes:
            if node.op_type in _ROUNDING:
                if self._at_edge(node):
                    found.append((name, self.kernel(node, node.op_type, 0.0)))
                continue
            if node.op_type in FREE or self.fused(node):
                continue
            portable = name in self._portable
            kind = "portable." if portable else "Q" if self._integer(node) else ""
            macs = self.macs.get(name, 0.0)
            if node.op_type == "Conv" and (pad := self._pad(node)) is not None:
                found.append((name, pad))
            found.append((name, self.kernel(node, kind + node.op_type, macs, floats=portable)))
        return found

    def _pad(self, node: onnx.NodeProto) -> Kernel | None:
        """What writes out the pads of a convolution, where near and far edges have other ones."""
        from edgebudget.graph import attributes

        pads, shape = attributes(node).get("pads", []), self.shape(node.input[0])
        half = len(pads) // 2
        if pads[:half] == pads[half:] or len(shape) != 4 or not self._integer(node):
            return None
        read = self.bytes(node.input[0])
        high, wide = (n + b + a for n, b, a in zip(shape[2:], pads[:2], pads[2:], strict=True))
        written = read * high * wide / (shape[2] * shape[3])
        return Kernel("QPad", 0.0, read, 0.0, written, high * wide, wide, shape[1], shape[1])

    def _integer(self, node: onnx.NodeProto) -> bool:
        makers = [self.maker.get(i) for i in node.input if i and i not in self.fixed]
        return bool(makers) and all(
            m is not None and m.op_type == "DequantizeLinear" for m in makers
        )

    def _at_edge(self, node: onnx.NodeProto) -> bool:
        """Whether values change between float and integer here, inside or at the graph's ends."""
        if node.op_type == "QuantizeLinear":
            maker = self.maker.get(node.input[0])
            return maker is None or not (self._integer(maker) or maker.op_type in _ROUNDING)
        readers = self.readers.get(node.output[0], [])
        if not readers:
            return True
        rounded = [
            all(u.op_type == "QuantizeLinear" for o in r.output for u in self.readers.get(o, []))
            for r in readers
            if r.op_type != "QuantizeLinear"
        ]
        return not all(rounded)
