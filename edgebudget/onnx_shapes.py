"""Static shapes and types of every tensor of an ONNX graph, or a clear refusal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

from edgebudget.onnx_contrib import surrogate
from edgebudget_runtime.errors import UnsupportedError

_SMALL = 4096  # elements; larger constants never decide a shape
_DTYPES: Mapping[int, str] = {TensorProto.FLOAT: "float32", TensorProto.DOUBLE: "float64"}
_BITS = {
    **dict.fromkeys(("float64", "int64", "uint64", "complex64"), 64),
    "complex128": 128,
    **dict.fromkeys(("float32", "int32", "uint32"), 32),
    **dict.fromkeys(("float16", "bfloat16", "int16", "uint16"), 16),
    **dict.fromkeys(("int4", "uint4", "float4e2m1"), 4),
    **dict.fromkeys(("int2", "uint2"), 2),
}  # anything else that is sized takes 8


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor's static shape and element type (numpy's name, or ONNX's in lower case)."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes occupied, sub-byte types packed."""
        return -(-self.elements * _BITS.get(self.dtype, 8) // 8)

    @property
    def is_float(self) -> bool:
        """Whether the elements are floating-point numbers."""
        return "float" in self.dtype


def dtype_name(elem_type: int) -> str:
    """The name of an ONNX element type."""
    return _DTYPES.get(elem_type) or str(TensorProto.DataType.Name(elem_type)).lower()


class Tensors:
    """What is known about the tensors that one graph sees, its enclosing graphs included."""

    def __init__(
        self, graph: GraphProto, outer: Tensors | None = None, given: GraphProto | None = None
    ) -> None:
        """`given` is the graph as it came: its claims serve where inference found nothing."""
        self.opsets: tuple[tuple[str, int], ...] = ()
        self._outer = outer
        self._known: dict[str, TensorInfo] = {}
        self._left: dict[str, str] = {}  # name -> why it has no static shape
        for source in (graph, given):
            if source is not None:
                for value in (*source.input, *source.value_info, *source.output):
                    self._add(value)
        # Weights are known exactly, whatever the graph claims about them.
        stored = graph if given is None else given
        self._known.update(constants(stored))
        self._small = {t.name: t for t in stored.initializer if _decides_shapes(t)}

    def _add(self, value: ValueInfoProto) -> None:
        if value.name in self._known or not value.type.HasField("tensor_type"):
            return
        tensor = value.type.tensor_type
        if not tensor.HasField("shape") or tensor.elem_type in (0, TensorProto.STRING):
            return
        dims = [d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim]
        if any(d is None for d in dims):
            shown = [
                d.dim_param or "?" if n is None else n
                for d, n in zip(tensor.shape.dim, dims, strict=True)
            ]
            self._left[value.name] = f"[{', '.join(map(str, shown))}]"
            return
        shape = tuple(d for d in dims if d is not None)
        self._known[value.name] = TensorInfo(shape, dtype_name(tensor.elem_type))

    def get(self, name: str) -> TensorInfo | None:
        """What is known about a tensor, or None."""
        found = self._known.get(name)
        return found if found or self._outer is None else self._outer.get(name)

    def value(self, name: str) -> TensorProto | None:
        """A small initializer, as a subgraph may need it to know its shapes."""
        found = self._small.get(name)
        return found if found or self._outer is None else self._outer.value(name)

    def need(self, name: str, node: NodeProto) -> TensorInfo:
        """What is known about a tensor of `node`.

        Raises:
            UnsupportedError: EB211 a dimension is dynamic, EB212 nothing is known.
        """
        found = self.get(name)
        if found is not None:
            return found
        where = f"{node.op_type} {node.name or node.output[0]!r}"
        if name in self._left:
            raise UnsupportedError(
                "EB211",
                f"tensor {name!r} of {where} has dynamic shape {self._left[name]}",
                hint="fix every input dimension with --input-shape, e.g. 1x3x224x224",
            )
        raise UnsupportedError(
            "EB212",
            f"the shape of tensor {name!r} of {where} cannot be inferred",
            hint="export with static shapes; operators whose output size depends on the data"
            " have no fixed cost",
        )


def constants(graph: GraphProto) -> Iterator[tuple[str, TensorInfo]]:
    """Stored tensors of one graph: initializers, then `Constant` nodes.

    Raises:
        UnsupportedError: EB215, a sparse or string tensor.
    """
    if graph.sparse_initializer:
        raise UnsupportedError(
            "EB215",
            f"sparse initializer {graph.sparse_initializer[0].values.name!r} is not supported",
            hint="store it as a dense tensor",
        )
    for tensor in graph.initializer:
        yield tensor.name, _stored(tensor)
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute:
            value = node.attribute[0]
            if value.type == AttributeProto.TENSOR:
                yield node.output[0], _stored(value.t)
            elif value.name in ("value_float", "value_int"):
                yield node.output[0], TensorInfo((), _scalar_dtype(value.name))
            elif value.name in ("value_floats", "value_ints"):
                size = len(value.floats) or len(value.ints)
                yield node.output[0], TensorInfo((size,), _scalar_dtype(value.name))


def _scalar_dtype(attribute: str) -> str:
    return "float32" if "float" in attribute else "int64"


def _stored(tensor: TensorProto) -> TensorInfo:
    if tensor.data_type in (TensorProto.STRING, TensorProto.UNDEFINED):
        raise UnsupportedError(
            "EB215",
            f"constant {tensor.name!r} has element type "
            f"{TensorProto.DataType.Name(tensor.data_type)}",
            hint="models over text or without a type have no byte count",
        )
    return TensorInfo(tuple(tensor.dims), dtype_name(tensor.data_type))


def _decides_shapes(tensor: TensorProto) -> bool:
    inside = tensor.data_location != TensorProto.EXTERNAL
    return inside and math.prod(tensor.dims) <= _SMALL


def subgraphs(node: NodeProto) -> list[GraphProto]:
    """The graphs a control-flow node holds, in attribute order."""
    return [a.g for a in node.attribute if a.type == AttributeProto.GRAPH]


def label(node: NodeProto, index: int) -> str:
    """A name for a node, also when the file gives none."""
    return node.name or f"{node.op_type}_{index}"


def inlined(model: ModelProto) -> ModelProto:
    """The model with its local functions expanded (the model itself when it has none)."""
    if not model.functions:
        return model
    import onnx.inliner

    return onnx.inliner.inline_local_functions(model)


def infer(model: ModelProto) -> Tensors:
    """Infer every shape of an inlined model; weights are not copied.

    Tensors of a subgraph come from `within(...)`.

    Raises:
        UnsupportedError: EB212, the graph contradicts itself.
    """
    lean = _lean(model)
    inferred = _inferred(lean)
    known = Tensors(inferred.graph, given=model.graph)
    if any(known.get(o) is None for n in model.graph.node for o in n.output if o):
        known = _fold_shapes(lean, inferred, model)
    known.opsets = tuple((o.domain, o.version) for o in model.opset_import)
    return known


def within(graph: GraphProto, outer: Tensors, given: Mapping[str, TensorInfo]) -> Tensors:
    """Shapes inside a subgraph, its inputs being `given` and the rest captured from outside."""
    shell = ModelProto()
    shell.ir_version = onnx.IR_VERSION
    for domain, version in outer.opsets:
        shell.opset_import.add(domain=domain, version=version)
    shell.graph.CopyFrom(graph)
    own = {i.name for i in graph.input}
    produced = {o for n in graph.node for o in n.output} | {t.name for t in graph.initializer}
    for name in dict.fromkeys(used(graph.node)):
        found, value = outer.get(name), outer.value(name)
        if name in own | produced:
            continue
        if value is not None:
            shell.graph.initializer.append(value)
        elif found is not None:
            shell.graph.input.append(_value(name, found))
    for value in shell.graph.input:
        if value.name in given:
            value.CopyFrom(_value(value.name, given[value.name]))
    known = infer(shell)
    known._outer = outer
    return known


def used(nodes: Iterable[NodeProto]) -> list[str]:
    """Names that nodes read, those captured by their subgraphs included, in order."""
    names: list[str] = []
    for node in nodes:
        names += [i for i in node.input if i]
        for graph in subgraphs(node):
            names += used(graph.node)
            names += [o.name for o in graph.output]
    return names


def _value(name: str, info: TensorInfo) -> ValueInfoProto:
    elem = next(v for v in TensorProto.DataType.values() if dtype_name(v) == info.dtype)
    return onnx.helper.make_tensor_value_info(name, elem, info.shape)


def _lean(model: ModelProto) -> ModelProto:
    """A copy for shape inference: large weights become inputs, vendor operators stand-ins."""
    lean = ModelProto()
    lean.ir_version = max(model.ir_version, 4)
    lean.opset_import.extend(model.opset_import)
    graph = model.graph
    stored = {t.name: tuple(t.dims) for t in graph.initializer}
    for value in graph.input:
        # Old files list weights among the inputs, where inference takes them for variable.
        if value.name not in stored:
            lean.graph.input.add().CopyFrom(value)
    for tensor in graph.initializer:
        if _decides_shapes(tensor):
            lean.graph.initializer.add().CopyFrom(tensor)
        else:
            lean.graph.input.append(_value(tensor.name, _stored(tensor)))
    for node in graph.node:
        for stand_in in surrogate(node, stored) or [node]:
            lean.graph.node.add().CopyFrom(stand_in)
    for value in graph.output:
        # The declared shape may be symbolic where inference finds numbers.
        lean.graph.output.add(name=value.name)
    lean.graph.name = graph.name or "graph"
    return lean


def _inferred(lean: ModelProto) -> ModelProto:
    try:
        return onnx.shape_inference.infer_shapes(lean, data_prop=True)
    except (onnx.shape_inference.InferenceError, ValueError, RuntimeError) as e:
        raise UnsupportedError(
            "EB212",
            f"shape inference fails: {str(e).strip().splitlines()[0]}",
            hint="check the file with onnx.checker, or export it again",
        ) from e


def _fold_shapes(lean: ModelProto, inferred: ModelProto, model: ModelProto) -> Tensors:
    """Compute shape arithmetic that ONNX's own data propagation does not know, to a fixpoint."""
    opsets = {o.domain: o.version for o in model.opset_import}
    while True:
        known = Tensors(inferred.graph, given=model.graph)
        values: dict[str, Any] = {
            t.name: onnx.numpy_helper.to_array(t) for t in lean.graph.initializer
        }
        changed = False
        for node in lean.graph.node:
            value = _evaluate(node, values, known, opsets)
            if value is None:
                continue
            values[node.output[0]] = value
            if node.op_type != "Constant":
                tensor = onnx.numpy_helper.from_array(value)
                folded = onnx.helper.make_node("Constant", [], [node.output[0]], value=tensor)
                node.CopyFrom(folded)
                changed = True
        if not changed:
            return known
        inferred = _inferred(lean)


def _evaluate(
    node: NodeProto, values: Mapping[str, Any], known: Tensors, opsets: dict[str, int]
) -> Any:
    """The value of a small node whose inputs (or, for Shape, whose input's shape) are known."""
    import numpy as np
    from onnx.reference import ReferenceEvaluator

    if node.domain or len(node.output) != 1 or subgraphs(node):
        return None
    if node.op_type in ("Shape", "Size"):
        info = known.get(node.input[0])
        if info is None:
            return None
        feeds = {node.input[0]: np.broadcast_to(np.float32(0), info.shape)}
    elif all(i in values for i in node.input if i) and node.op_type not in _RANDOM:
        out = known.get(node.output[0])
        if out is not None and out.elements > _SMALL:
            return None
        feeds = {i: values[i] for i in node.input if i}
    else:
        return None
    single = GraphProto(name="node", node=[node])
    single.input.extend(ValueInfoProto(name=n) for n in feeds)
    single.output.add(name=node.output[0])
    try:
        results: Any = ReferenceEvaluator(single, opsets).run(None, feeds)
    except Exception:  # an operator the evaluator lacks only leaves the shape unknown
        return None
    value = np.asarray(results[0])
    return value if value.size <= _SMALL else None


_RANDOM = frozenset(
    {
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
        "Bernoulli",
        "Multinomial",
    }
)
