"""ONNX graphs as the compiler holds them: static shapes, names, numbers, bytes.

Imports onnx: reach this module only where a graph is at hand.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import numpy_helper, shape_inference

from edgebudget.program import Program, TensorSpec
from edgebudget.session import CpuSession
from edgebudget_runtime.errors import EdgeBudgetError, UnsupportedError

if TYPE_CHECKING:
    from edgebudget.workload import Array

OPSET = 20  # what we export; the first with a Gelu operator
ROUNDING = 1e-5  # the same arithmetic, regrouped by the engine
REORDERED = 1e-4  # constants folded into others: float32 rounding through a deep network


def program(model: onnx.ModelProto, facts: frozenset[str] = frozenset()) -> Program:
    """The graph-stage program of a model with static shapes."""
    return Program("graph", model, specs(model), tuple(o.name for o in model.graph.output), facts)


def specs(model: onnx.ModelProto) -> tuple[TensorSpec, ...]:
    """Name, shape and dtype of every input that is not a weight.

    Raises:
        UnsupportedError: EB224, a dimension is not a number; EB227, neither are its elements.
    """
    found = []
    for value in inputs(model):
        shape = shape_of(value)
        if shape is None:
            raise UnsupportedError(
                "EB224",
                f"input {value.name!r} has no static shape",
                hint="give the shape with --input-shape",
            )
        found.append(TensorSpec(value.name, shape, _dtype(value)))
    return tuple(found)


def _dtype(value: onnx.ValueInfoProto) -> str:
    kind = value.type.tensor_type.elem_type
    if kind in onnx.TensorProto.DataType.values():
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind) if kind else None
        if dtype is not None and dtype.kind in "fiub":
            return str(dtype.name)
    raise UnsupportedError(
        "EB227",
        f"input {value.name!r} does not hold plain numbers (element type {kind})",
        hint="feed numbers: do text and image decoding outside the model",
    )


def inputs(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """The graph inputs that a caller has to feed (old files list weights there too)."""
    weights = {t.name for t in model.graph.initializer}
    return [i for i in model.graph.input if i.name not in weights]


def shape_of(value: onnx.ValueInfoProto) -> tuple[int, ...] | None:
    """The static shape of one value, or None."""
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        return None
    dims = tensor.shape.dim
    return tuple(d.dim_value for d in dims) if all(d.HasField("dim_value") for d in dims) else None


def infer_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which every shape that can be derived is written down, from scratch."""
    fresh = onnx.ModelProto()
    fresh.CopyFrom(model)
    del fresh.graph.value_info[:]
    return shape_inference.infer_shapes(fresh, data_prop=True)


def shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Static shapes by value name: inputs, outputs, weights and what shape inference derives."""
    inferred = infer_shapes(model).graph
    found = {t.name: tuple(t.dims) for t in inferred.initializer}
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        shape = shape_of(value)
        if shape is not None:
            found[value.name] = shape
    return found


def tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Every tensor stored in a graph: weights and attributes, sub-graphs included."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield sparse.values
        yield sparse.indices
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for body in (attribute.g, *attribute.graphs):
                yield from tensors(body)


def initializers(model: onnx.ModelProto) -> dict[str, Array]:
    """Weights by name, as read-only arrays."""
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def set_initializer(model: onnx.ModelProto, name: str, value: Array) -> None:
    """Add a weight, or replace the one with this name."""
    tensor = numpy_helper.from_array(np.ascontiguousarray(value), name)
    for old in model.graph.initializer:
        if old.name == name:
            old.CopyFrom(tensor)
            return
    model.graph.initializer.append(tensor)


def unique(name: str, used: set[str]) -> str:
    """`name`, or `name_2`, `name_3`, ... when it is taken; the answer is added to `used`."""
    candidate, count = name, 1
    while candidate in used:
        count += 1
        candidate = f"{name}_{count}"
    used.add(candidate)
    return candidate


def name_nodes(model: onnx.ModelProto) -> int:
    """Give every node a name that no other node has; returns how many were renamed."""
    used: set[str] = set()
    renamed = 0
    for node in model.graph.node:
        wanted = node.name or f"{node.op_type}.{next((o for o in node.output if o), '')}"
        name = unique(wanted, used)
        renamed += name != node.name
        node.name = name
    return renamed


def opset(model: onnx.ModelProto) -> int:
    """The version of the standard operator set, 0 when the model imports none."""
    return max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0)


def canonical_bytes(model: onnx.ModelProto) -> bytes:
    """The model's bytes: equal models give equal bytes."""
    return bytes(model.SerializeToString(deterministic=True))


def fingerprint(model: onnx.ModelProto) -> str:
    """SHA-256 of `canonical_bytes`."""
    return hashlib.sha256(canonical_bytes(model)).hexdigest()


def probe(specs: Iterable[TensorSpec], seed: int = 0) -> dict[str, Array]:
    """Seeded noise to compare two forms of one model on; never used to calibrate anything.

    Floats are standard normal. Integers are 0 or 1, which every embedding table accepts.
    """
    rng = np.random.default_rng(seed)
    values: dict[str, Array] = {}
    for spec in specs:
        dtype = np.dtype(spec.dtype)
        if dtype.kind == "f":
            values[spec.name] = rng.standard_normal(spec.shape, dtype=np.float32).astype(dtype)
        else:
            values[spec.name] = rng.integers(0, 2, spec.shape).astype(dtype)
    return values


def run(
    model: onnx.ModelProto, inputs: Mapping[str, Array], *, optimize: bool = True
) -> dict[str, Array]:
    """Run a model once on ONNX Runtime's CPU provider."""
    return CpuSession(canonical_bytes(model), optimize=optimize).run(inputs)


def difference(a: Sequence[Array], b: Sequence[Array]) -> float:
    """Largest difference over all outputs, relative to the largest magnitude of that output in `a`.

    Infinite when shapes differ or a value is not finite on one side only.
    """
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if x.shape != y.shape:
            return float("inf")
        if x.size == 0:
            continue
        left, right = x.astype(np.float64), y.astype(np.float64)
        same = (left == right) | (np.isnan(left) & np.isnan(right))
        if same.all():
            continue
        gap = np.abs(left - right)[~same].max()
        finite = np.abs(left)[np.isfinite(left)]
        scale = float(finite.max()) if finite.size else 0.0
        worst = max(worst, float(gap) / scale if scale > 0 and np.isfinite(gap) else float("inf"))
    return worst


class Reference:
    """What a model answers on a seeded probe, to hold changed versions of it against."""

    def __init__(self, model: onnx.ModelProto, seed: int = 0) -> None:
        self._inputs = probe(specs(model), seed)
        self._expected = run(model, self._inputs)

    def gap(self, model: onnx.ModelProto) -> float:
        """How far the outputs moved (see `difference`); infinite when the engine refuses it."""
        try:
            got = run(model, self._inputs)
            return difference(list(self._expected.values()), [got[k] for k in self._expected])
        except (EdgeBudgetError, KeyError):
            return float("inf")


def compare(before: onnx.ModelProto, after: onnx.ModelProto, seed: int = 0) -> float:
    """`Reference(before).gap(after)`, for a single comparison."""
    return Reference(before, seed).gap(after)


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """Attribute values by name."""
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
