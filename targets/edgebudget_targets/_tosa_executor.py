"""A segment in Arm's TOSA reference model, with the graph's own inputs and outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgebudget_runtime.errors import ArtifactError, TargetError
from edgebudget_targets._executor import chunks
from edgebudget_targets._executorch_process import EngineRefused, Worker

if TYPE_CHECKING:
    import onnx

    from edgebudget.workload import Array


@dataclass(frozen=True, slots=True)
class _Edge:
    """How an edge of the graph becomes the NPU's integers: q = value / scale + zero."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]  # of the graph's integer
    scale: np.float32
    zero: int
    is_float: bool  # the graph itself rounds this edge

    @property
    def shift(self) -> int:
        """What unsigned integers are above the NPU's signed ones."""
        return 128 if self.dtype == np.uint8 else 0

    @property
    def signed(self) -> np.dtype[Any]:
        """The NPU's integer type."""
        return np.dtype(np.int8) if self.dtype == np.uint8 else self.dtype


class TosaExecutor:
    """Runs the graph that Vela compiled, in a process of its own."""

    def __init__(self, file: Path, limit_s: float) -> None:
        """Read what lies beside a `.pte`.

        Raises:
            ArtifactError: EB510, the graph or the TOSA file is missing.
        """
        from edgebudget.segment_graph import read_graph

        self._tosa = file.with_suffix(".tosa")
        if not self._tosa.is_file():
            raise ArtifactError(
                "EB510",
                f"{self._tosa.name} is missing beside {file.name}",
                hint="compile the model again; models in several pieces have none",
            )
        model = read_graph(file)
        self._inputs = [_edge(model, v, is_input=True) for v in model.graph.input]
        self._outputs = [_edge(model, v, is_input=False) for v in model.graph.output]
        self._worker = Worker(limit_s)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run N samples, as many at a time as the segment's own batch.

        Raises:
            UsageError: EB142, an input is missing or has the wrong shape.
            TargetError: EB610 the model crashed, EB611 it took too long, EB613 it failed.
        """
        shapes: dict[str, tuple[int | str | None, ...]] = {e.name: e.shape for e in self._inputs}
        parts = list(chunks(inputs, shapes))
        whole = [np.stack([_to_integers(p[e.name], e) for p in parts]) for e in self._inputs]
        try:
            _, values = self._worker.ask({"do": "tosa", "file": str(self._tosa.resolve())}, whole)
        except EngineRefused as e:
            raise TargetError(
                "EB613",
                f"the TOSA reference model failed: {e}",
                hint="`edgebudget doctor` says which engines work here",
            ) from e
        return {e.name: _from_integers(v, e) for e, v in zip(self._outputs, values, strict=True)}


def _edge(model: onnx.ModelProto, value: onnx.ValueInfoProto, *, is_input: bool) -> _Edge:
    from onnx import helper, numpy_helper

    kind = value.type.tensor_type
    shape = tuple(d.dim_value for d in kind.shape.dim)
    own = np.dtype(helper.tensor_dtype_to_np_dtype(kind.elem_type))
    for node in model.graph.node:
        touches = node.input[:1] if is_input else node.output
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and value.name in touches:
            held = {t.name: t for t in model.graph.initializer}
            scale = numpy_helper.to_array(held[node.input[1]])
            zero = numpy_helper.to_array(held[node.input[2]])
            is_float = own == np.float32
            return _Edge(
                value.name, shape, zero.dtype, np.float32(scale.item()), int(zero.item()), is_float
            )
    return _Edge(value.name, shape, own, np.float32(1), 0, is_float=False)


def _to_integers(value: Array, edge: _Edge) -> Array:
    if not edge.is_float:
        return (value.astype(np.int32) - edge.shift).astype(edge.signed)
    limits = np.iinfo(edge.dtype)
    whole = np.rint(value.astype(np.float32) / edge.scale) + edge.zero
    return np.asarray(np.clip(whole, limits.min, limits.max) - edge.shift, edge.signed)


def _from_integers(values: Array, edge: _Edge) -> Array:
    """[pieces, ...] to [pieces x batch, ...] in the graph's own type."""
    found = values.reshape(-1, *edge.shape[1:]).astype(np.int32) + edge.shift
    if not edge.is_float:
        return found.astype(edge.dtype)
    return np.asarray((found - edge.zero).astype(np.float32) * edge.scale, np.float32)
