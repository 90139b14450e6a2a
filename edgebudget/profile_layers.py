"""From the engine's nodes back to those of the file.

ONNX Runtime fuses nodes, moves them to other layouts and names what it makes after a node of the
file, or after the tensor that the fused nodes end in, with suffixes of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgebudget_runtime.measure.layers import Kernel
from edgebudget_runtime.profile_detail import LayerTime

if TYPE_CHECKING:
    import onnx

_SUFFIX = re.compile(r"(?:_nchwc|_token_\d+|_fused|_quant)$")
# Operators whose inputs' data passes on: a fused node that ends in one is named for the work.
_LIGHT = {"Clip", "Relu", "LeakyRelu", "Sigmoid", "HardSigmoid", "Tanh", "QuantizeLinear",
          "DequantizeLinear", "Add", "Mul", "Identity"}  # fmt: skip
_HEAVY = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
_HEAVY_KERNELS = ("Conv", "Gemm", "MatMul")


def layer_times(
    files: Mapping[str, Path], kernels: Mapping[str, Sequence[Kernel]]
) -> tuple[LayerTime, ...]:
    """Layers of every segment (its file) in the order they ran, with their shares.

    Without the library that reads files, names stay the engine's own.
    """
    found: list[LayerTime] = []
    for segment, listed in kernels.items():
        total = sum(k.ms for k in listed)
        names = _Names(files[segment]) if segment in files else None
        for kernel in listed:
            name = None if names is None else names.of(kernel)
            added = names is not None and names.readable and name is None
            share = kernel.ms / total if total > 0 else 0.0
            found.append(
                LayerTime(
                    segment=segment,
                    name=name or kernel.name,
                    op=kernel.op,
                    ms=kernel.ms,
                    share=min(share, 1.0),
                    added=added,
                )
            )
    return tuple(found)


class _Names:
    """Names of one file's nodes and tensors."""

    def __init__(self, file: Path) -> None:
        self._by_name: dict[str, onnx.NodeProto] = {}
        self._by_output: dict[str, onnx.NodeProto] = {}
        self.readable = False
        try:
            import onnx
        except ImportError:
            return
        try:
            graph = onnx.load_model(str(file), load_external_data=False).graph
        except Exception:  # not ONNX: another engine's file
            return
        self.readable = True
        self._by_name = {n.name: n for n in graph.node if n.name}
        self._by_output = {o: n for n in graph.node for o in n.output if o}

    def of(self, kernel: Kernel) -> str | None:
        """The node of the file that this kernel does the work of, or None."""
        name = kernel.name
        while True:
            node = self._by_name.get(name) or self._by_output.get(name)
            if node is not None:
                return self._worker(node, kernel.op).name
            shorter = _SUFFIX.sub("", name)
            if shorter == name:
                return None
            name = shorter

    def _worker(self, node: onnx.NodeProto, op: str) -> onnx.NodeProto:
        """Of fused nodes that end in `node`, the one that the kernel is named for."""
        if not any(h in op for h in _HEAVY_KERNELS):
            return node
        at: onnx.NodeProto | None = node
        while at is not None and at.op_type in _LIGHT:
            at = next((self._by_output[i] for i in at.input if i in self._by_output), None)
        return at if at is not None and at.op_type in _HEAVY else node
