"""What ONNX Runtime's WebGPU engine runs for a graph, one kernel for each node that computes.

The engine times no kernels of its own accord, and a split by rules can be had without a GPU. As
its own profile shows, an activation is part of the convolution before it, x * Sigmoid(x) too, and
the bias of a matrix product part of that; what enters and leaves the graph is copied. Kernels in
half precision are kinds of their own. Imports onnx.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgebudget.kernels import Kernel
from edgebudget_targets._graph_kernels import FREE, GraphKernels, NodeKernel

if TYPE_CHECKING:
    import onnx

_HALF = "float16"


def kernels(model: onnx.ModelProto) -> list[NodeKernel]:
    """Every kernel of one run, in order.

    Raises:
        UnsupportedError: EB2xx, a shape or an operator is not known.
    """
    return _Split(model).kernels()


class _Split(GraphKernels):
    clips = frozenset({"Relu", "Clip", "Sigmoid", "HardSigmoid", "LeakyRelu", "Tanh"})
    clipped = frozenset({"Conv"})

    def kernels(self) -> list[NodeKernel]:
        found = self.ends()
        for name, node in self.nodes:
            if node.op_type not in FREE and not self.fused(node):
                kernel = self.kernel(node, node.op_type, self.macs.get(name, 0.0))
                found.append((name, self._typed(node, kernel)))
        return found

    def fused(self, node: onnx.NodeProto) -> bool:
        """Whether a node is part of the kernel before it."""
        if node.op_type == "Add":
            return any(self._is_bias(node, i) for i in (0, 1))
        if node.op_type == "Sigmoid" and self._is_silu(node):
            return True
        if node.op_type == "Mul":
            makers = [self.maker.get(i) for i in node.input]
            return any(m is not None and m.op_type == "Sigmoid" and self._is_silu(m)
                       and node is self.readers[m.output[0]][0] for m in makers)  # fmt: skip
        return super().fused(node)

    def _is_bias(self, node: onnx.NodeProto, side: int) -> bool:
        """Whether an Add adds a stored vector to a matrix product that nothing else reads."""
        maker, vector = self.maker.get(node.input[1 - side]), node.input[side]
        if maker is None or maker.op_type != "MatMul" or vector not in self.fixed:
            return False
        alone = len(self.readers[maker.output[0]]) == 1
        return alone and maker.input[1] in self.fixed and len(self.shape(vector)) == 1

    def _is_silu(self, node: onnx.NodeProto) -> bool:
        """Whether a Sigmoid's one reader multiplies it by the convolution that it reads itself."""
        maker, readers = self.maker.get(node.input[0]), self.readers.get(node.output[0], [])
        if maker is None or maker.op_type not in self.clipped or len(readers) != 1:
            return False
        (reader,) = readers
        users = self.readers[node.input[0]]
        return reader.op_type == "Mul" and node.input[0] in reader.input and len(users) == 2

    def _typed(self, node: onnx.NodeProto, kernel: Kernel) -> Kernel:
        known = self.known.get(node.output[0])
        if known is None or known.dtype != _HALF:
            return kernel
        return Kernel(f"{kernel.kind}.half", *kernel.as_list()[1:])
