"""The one counter: what a model multiplies, stores and otherwise does, per layer.

The count on the exported ONNX graph is the truth (`count_onnx`); the count on `torch.export`'s
graph (`count_torch`) is the fast path during planning and agrees with it to the last MAC.
Neither torch nor onnx is loaded until a program of that stage is counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgebudget.program import Program

DEFINITION = """\
One MAC is one multiplication whose result is accumulated. Counted: every convolution (grouped,
dilated, transposed), linear layer, matrix product, einsum and recurrent cell, and both matrix
products of attention (the full score matrix, masked or not), as dense loops: products with
padding count, zeros in weights count.
FLOPs = 2 x MACs.
The count is for the stated input shapes, batch included; if/else counts its dearest branch and a
loop its largest number of rounds.
Other ops, listed apart: bias, activation, normalisation, pooling, resizing, quantization and
element-wise work, one per elementary function and output element (per window element for pooling,
per input element for reductions); pure data movement is 0.
Parameters: elements of stored float or quantized weight tensors, each tensor once however often it
is used; quantization scales and zero points, integer tables and scalars are not parameters.
Weight bytes: what every stored constant occupies, packed 4-bit weights at 4 bits, scales included.\
"""


@dataclass(frozen=True, slots=True)
class LayerCount:
    """What one node costs in one inference. A tensor is charged to its first user."""

    name: str
    op: str
    macs: int
    other_ops: int
    params: int
    weight_bytes: int
    output_shape: tuple[int, ...]
    output_dtype: str


@dataclass(frozen=True, slots=True)
class CountReport:
    """Every layer in execution order, and the sums."""

    layers: tuple[LayerCount, ...]

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one inference."""
        return sum(x.macs for x in self.layers)

    @property
    def other_ops(self) -> int:
        """Work that is no multiply-accumulate."""
        return sum(x.other_ops for x in self.layers)

    @property
    def params(self) -> int:
        """Distinct stored parameters."""
        return sum(x.params for x in self.layers)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all stored constants."""
        return sum(x.weight_bytes for x in self.layers)


def count(program: Program) -> CountReport:
    """Count a program at its stated input shapes, on the graph of its stage.

    Raises:
        UnsupportedError: EB210 to EB215, something in the model has no known cost; EB220,
            EB222, torch.export cannot trace the module.
    """
    if program.stage == "graph":
        from edgebudget.count_onnx import count_graph

        return count_graph(program.body)
    from edgebudget.count_torch import count_exported
    from edgebudget.export import capture

    return count_exported(capture(program))
