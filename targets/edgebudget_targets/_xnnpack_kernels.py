"""What ExecuTorch runs for a graph, operator by operator, as XNNPACK fuses it.

The engine tells neither its kernels nor their times (its event log is not built into the package),
so that the split is ours: an activation that clips is fused into what feeds it, rounding is no
kernel but where integers begin or end, pads that differ between a picture's edges are written out
before an integer convolution (a float one does them itself), and what enters and leaves the graph
is copied. Imports onnx.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgebudget.kernels import Kernel
from edgebudget.layer_loads import stored_bytes

if TYPE_CHECKING:
    import onnx

    from edgebudget.onnx_shapes import Tensors

_CLIPS = frozenset({"Relu", "Clip"})
_CLIPPED = frozenset({"Conv", "Gemm", "MatMul", "Add", "Sub", "Mul", "ConvTranspose"})
_ROUNDING = frozenset({"QuantizeLinear", "DequantizeLinear"})
_POOLS = frozenset({"MaxPool", "AveragePool"})
_FREE = frozenset({"Constant", "Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze"})


def kernels(model: onnx.ModelProto, portable: Collection[str]) -> tuple[Kernel, ...]:
    """Every kernel of one run, in order. `portable` names nodes that XNNPACK does not take.

    Raises:
        UnsupportedError: EB2xx, a shape or an operator is not known.
    """
    return tuple(_Split(model, portable).kernels())


@dataclass(frozen=True, slots=True)
class _Sizes:
    rows: int = 0
    width: int = 0
    cin: int = 0
    cout: int = 0
    size: int = 0
    stride: int = 0
    parts: int = 0


class _Split:
    def __init__(self, model: onnx.ModelProto, portable: Collection[str]) -> None:
        from edgebudget.count_onnx import count_graph
        from edgebudget.onnx_shapes import constants, infer, inlined, label

        self._model = inlined(model)
        self._portable = portable
        graph = self._model.graph
        self._known: Tensors = infer(self._model)
        self._macs = {x.name: float(x.macs) for x in count_graph(self._model).layers}
        self._fixed = set(dict(constants(graph)))
        self._nodes: list[tuple[str, onnx.NodeProto]] = []  # that compute, with their labels
        for index, node in enumerate(graph.node):
            if all(i in self._fixed for i in node.input if i):
                self._fixed.update(node.output)
            else:
                self._nodes.append((label(node, index), node))
        self._bytes = stored_bytes(self._model, self._known)
        self._maker = {o: n for n in graph.node for o in n.output}
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)

    def kernels(self) -> list[Kernel]:
        found = self._ends()
        for name, node in self._nodes:
            if node.op_type in _ROUNDING:
                if self._at_edge(node):
                    found.append(self._kernel(node, node.op_type, 0.0))
                continue
            if node.op_type in _FREE or self._fused(node):
                continue
            portable = name in self._portable
            kind = "portable." if portable else "Q" if self._integer(node) else ""
            macs = self._macs.get(name, 0.0)
            if node.op_type == "Conv" and (pad := self._pad(node)) is not None:
                found.append(pad)
            found.append(self._kernel(node, kind + node.op_type, macs, floats=portable))
        return found

    def _kernel(
        self, node: onnx.NodeProto, kind: str, macs: float, *, floats: bool = False
    ) -> Kernel:
        """`floats`: it computes in float, whatever is stored around it."""
        size = self._float_bytes if floats else self._bytes
        held = [i for i in node.input if i and self._is_stored(i)]
        read = sum(size(i) for i in node.input if i and i not in held)
        weights = sum(size(i) for i in held)
        written = sum(size(o) for o in node.output if o)
        kind, sizes = self._sizes(node, kind)
        return Kernel(
            kind, macs, read, weights, written, sizes.rows, sizes.width, sizes.cin, sizes.cout,
            sizes.size, sizes.stride, sizes.parts,
        )  # fmt: skip

    def _ends(self) -> list[Kernel]:
        """What enters and leaves: both are copied, and pictures turned to channels last."""
        graph, found = self._model.graph, []
        for kind, values in (("Input", graph.input), ("Output", graph.output)):
            for name in (v.name for v in values if v.name not in self._fixed):
                shape, size = self._shape(name), self._bytes(name)
                width, channels = (shape[-1], shape[1]) if len(shape) == 4 else (0, 0)
                rows = math.prod(shape) // max(1, width)
                found.append(Kernel(kind, 0.0, size, 0.0, size, rows, width, 0, channels))
        return found

    def _sizes(self, node: onnx.NodeProto, kind: str) -> tuple[str, _Sizes]:
        out = self._shape(node.output[0])
        if node.op_type in _POOLS and len(out) == 4:
            from edgebudget.graph import attributes

            found = attributes(node)
            size, stride = max(found["kernel_shape"]), max(found.get("strides", [1]))
            return kind, _Sizes(out[2] * out[3], out[3], out[1], out[1], size, stride)
        if node.op_type in ("Conv", "ConvTranspose") and len(out) == 4:
            x, w = self._shape(node.input[0]), self._shape(node.input[1])
            groups = max(1, x[1] // max(1, w[1])) if node.op_type == "Conv" else 1
            size = max(w[2:])
            if groups > 1:
                kind += ".dw" if w[1] == 1 else ".group"
            elif size == 1:
                kind += ".1x1"
            stride = max(1, round(x[2] / max(1, out[2])))
            return kind, _Sizes(out[2] * out[3], out[3], x[1], out[1], size, stride, groups)
        if node.op_type in ("Gemm", "MatMul") and out:
            inner = self._shape(node.input[0])[-1]
            batched = node.op_type == "MatMul" and not self._is_stored(node.input[1])
            parts = math.prod(out[:-2]) if batched else 1
            rows = math.prod(out) // max(1, out[-1])
            kind += ".batch" if batched else ""
            return kind, _Sizes(rows, out[-1], inner, out[-1], 1, 1, max(1, parts))
        width = out[-1] if out else 0
        channels = out[1] if len(out) == 4 else 0
        return kind, _Sizes(math.prod(out) // max(1, width), width, 0, channels)

    def _pad(self, node: onnx.NodeProto) -> Kernel | None:
        """What writes out the pads of a convolution, where near and far edges have other ones."""
        from edgebudget.graph import attributes

        pads, shape = attributes(node).get("pads", []), self._shape(node.input[0])
        half = len(pads) // 2
        if pads[:half] == pads[half:] or len(shape) != 4 or not self._integer(node):
            return None
        read = self._bytes(node.input[0])
        high, wide = (n + b + a for n, b, a in zip(shape[2:], pads[:2], pads[2:], strict=True))
        written = read * high * wide / (shape[2] * shape[3])
        return Kernel("QPad", 0.0, read, 0.0, written, high * wide, wide, shape[1], shape[1])

    def _float_bytes(self, name: str) -> int:
        return 4 * math.prod(self._shape(name))

    def _shape(self, name: str) -> tuple[int, ...]:
        info = self._known.get(name)
        return info.shape if info is not None else ()

    def _is_stored(self, name: str) -> bool:
        return name in self._fixed

    def _fused(self, node: onnx.NodeProto) -> bool:
        """Whether an activation is part of the kernel before it."""
        maker = self._maker.get(node.input[0]) if node.op_type in _CLIPS else None
        if maker is None or maker.op_type not in _CLIPPED:
            return False
        return len(self._readers.get(node.input[0], [])) == 1

    def _integer(self, node: onnx.NodeProto) -> bool:
        makers = [self._maker.get(i) for i in node.input if i and i not in self._fixed]
        return bool(makers) and all(
            m is not None and m.op_type == "DequantizeLinear" for m in makers
        )

    def _at_edge(self, node: onnx.NodeProto) -> bool:
        """Whether values change between float and integer here, inside or at the graph's ends."""
        if node.op_type == "QuantizeLinear":
            maker = self._maker.get(node.input[0])
            return maker is None or not (self._integer(maker) or maker.op_type in _ROUNDING)
        readers = self._readers.get(node.output[0], [])
        if not readers:
            return True
        rounded = [
            all(u.op_type == "QuantizeLinear" for o in r.output for u in self._readers.get(o, []))
            for r in readers
            if r.op_type != "QuantizeLinear"
        ]
        return not all(rounded)
