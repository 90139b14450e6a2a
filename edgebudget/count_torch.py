"""The fast count, on `torch.export`'s graph.

Its MACs equal `count_onnx.count_graph` of the same program exported by
`torch.onnx.export(dynamo=True)`: a node that depends on no input and that the exporter folds into
a stored tensor costs nothing here either. Parameters are what the exported file stores once batch
normalisation is folded into the convolution before it; they differ from the file where the
exporter stores a computed table or stores equal tensors once, and there the file is right. Other
operations follow the same table but ATen's operators, not ONNX's, so they only come close.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from edgebudget.count_rules import Shape
from edgebudget.count_torch_rules import MACS, OTHER, AtenCall
from edgebudget.counter import CountReport, LayerCount
from edgebudget_runtime.errors import UnsupportedError

# The exporter's optimiser (onnxscript) computes constant nodes up to these numbers of elements.
_FOLD_INPUT, _FOLD_OUTPUT = 8192, 512 * 512
_NORMS = frozenset({"batch_norm", "_native_batch_norm_legit_no_training"})
_ABSORBS = frozenset(
    {"conv1d", "conv2d", "conv3d", "convolution"}
    | {"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}
)


def count_exported(ep: ExportedProgram) -> CountReport:
    """Count an exported program at its example shapes.

    Raises:
        UnsupportedError: EB211 a dynamic dimension, EB214 an ATen operator without a rule.
    """
    try:
        return _count(ep)
    except UnsupportedError as e:
        if e.code != "EB214":
            raise
    # Inlines what torch wraps in higher-order operators; slow, and seldom needed.
    return _count(ep.run_decompositions({}))


def _count(ep: ExportedProgram) -> CountReport:
    stored = _stored(ep)
    state = _State(stored, {}, set())
    layers = []
    alive = _alive(ep)
    for node in ep.graph.nodes:
        if node not in alive:
            continue
        if node.op == "placeholder":
            if node.name in stored:
                state.fixed.add(node.name)
        elif node.op == "get_attr":
            state.fixed.add(node.name)
        elif node.op == "call_function":
            layer = _layer(node, state)
            if layer is not None:
                layers.append(layer)
    return CountReport(tuple(layers))


def _alive(ep: ExportedProgram) -> set[Node]:
    """Nodes that an output, or a write into a tensor, depends on; no exporter keeps the others."""
    pending = [
        n
        for n in ep.graph.nodes
        if n.op == "output"
        or (isinstance(n.target, torch._ops.OpOverload) and n.target._schema.is_mutable)
    ]
    alive = set(pending)
    while pending:
        for source in pending.pop().all_input_nodes:
            if source not in alive:
                alive.add(source)
                pending.append(source)
    return alive


@dataclass(frozen=True, slots=True)
class _State:
    stored: Mapping[str, tuple[Any, torch.Tensor]]  # placeholder -> identity, tensor
    charged: dict[Any, str]  # identity -> the node it is charged to
    fixed: set[str]  # nodes that depend on no input and that the exporter computes


def _stored(ep: ExportedProgram) -> dict[str, tuple[Any, torch.Tensor]]:
    """Placeholders that stand for parameters, buffers and constants; tied ones are identical."""
    signature = ep.graph_signature
    names = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    found = {}
    for placeholder, name in names.items():
        tensor = ep.state_dict.get(name, ep.constants.get(name))
        assert isinstance(tensor, torch.Tensor), name
        where = tensor.data_ptr() or id(tensor)  # 0 for fake and empty tensors
        found[placeholder] = ((where, tuple(tensor.shape), tensor.stride()), tensor)
    return found


def _layer(node: Node, state: _State) -> LayerCount | None:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        if getattr(target, "__name__", "") == "getitem":
            if any(i.name in state.fixed for i in node.all_input_nodes):
                state.fixed.add(node.name)
            return None
        raise _unsupported(node)
    outputs = _tensors(node.meta.get("val"))
    shapes = [_shape(t, node) for t in outputs]
    if _folded(node, shapes, state):
        state.fixed.add(node.name)
        return None
    call = AtenCall(
        [_argument(a, node) for a in _arguments(node, target)], shapes[0] if shapes else (0,)
    )
    name = target.overloadpacket.__name__
    macs = MACS[name](call) if name in MACS else 0
    other = _other_ops(node, target, name, call)
    params, nbytes = _charge(node, name, state)
    return LayerCount(
        name=node.name,
        op=name,
        macs=macs,
        other_ops=other,
        params=params,
        weight_bytes=nbytes,
        output_shape=shapes[0] if shapes else (),
        output_dtype=str(outputs[0].dtype).removeprefix("torch.") if outputs else "",
    )


def _other_ops(node: Node, target: torch._ops.OpOverload[Any, Any], name: str, c: AtenCall) -> int:
    if name in _NORMS and _absorbing(node) is not None:
        return 0
    rule = OTHER.get(name) or OTHER.get(name.removesuffix("_"))
    if rule is not None:
        return rule(c)
    if target.namespace == "aten" and torch.Tag.pointwise in target.tags:
        return c.elements
    raise _unsupported(node)


def _unsupported(node: Node) -> UnsupportedError:
    return UnsupportedError(
        "EB214",
        f"no counting rule for {node.target} (node {node.name!r})",
        hint="write it with convolutions, matrix products and element-wise operators, or give"
        " the model as .onnx",
    )


def _arguments(node: Node, target: torch._ops.OpOverload[Any, Any]) -> list[Any]:
    """Positional and keyword arguments in the schema's order, what is missing as None."""
    found: list[Any] = list(node.args)
    for position, formal in enumerate(target._schema.arguments):
        if position >= len(found):
            found.append(node.kwargs.get(formal.name, formal.default_value))
    return found


def _argument(value: Any, node: Node) -> Any:
    """A tensor becomes its shape; lists are walked."""
    if isinstance(value, (list, tuple)):
        return [_argument(v, node) for v in value]
    if isinstance(value, Node):
        tensors = _tensors(value.meta.get("val"))
        return _shape(tensors[0], node) if tensors else None
    return value


def _tensors(value: Any) -> list[torch.Tensor]:
    values = value if isinstance(value, (list, tuple)) else [value]
    return [v for v in values if isinstance(v, torch.Tensor)]


def _shape(tensor: torch.Tensor, node: Node) -> Shape:
    if not all(isinstance(d, int) for d in tensor.shape):
        raise UnsupportedError(
            "EB211",
            f"{node.target} (node {node.name!r}) has dynamic shape {list(tensor.shape)}",
            hint="export the program with static shapes",
        )
    return tuple(tensor.shape)


def _folded(node: Node, shapes: list[Shape], state: _State) -> bool:
    """Whether the exporter replaces this node by a stored tensor."""
    sources = node.all_input_nodes
    if not shapes or any(s.name not in state.fixed for s in sources):
        return False
    sizes = [t.numel() for s in sources for t in _tensors(s.meta.get("val"))]
    return all(n <= _FOLD_INPUT for n in sizes) and all(
        math.prod(s) <= _FOLD_OUTPUT for s in shapes
    )


def _absorbing(norm: Node) -> Node | None:
    """The convolution that this batch normalisation is folded into, if any."""
    source = norm.args[0]
    assert isinstance(source, Node)
    target = source.target
    if not isinstance(target, torch._ops.OpOverload) or len(source.users) != 1:
        return None
    return source if target.overloadpacket.__name__ in _ABSORBS else None


def _charge(node: Node, name: str, state: _State) -> tuple[int, int]:
    """Parameters and bytes of the tensors this node is the first to use."""
    params = nbytes = 0
    for source in node.all_input_nodes:
        if source.name not in state.stored:
            continue
        identity, tensor = state.stored[source.name]
        if identity in state.charged:
            continue
        state.charged[identity] = node.name
        if not (name in _NORMS and _absorbing(node) is not None):
            nbytes += tensor.numel() * tensor.element_size()
            params += tensor.numel() if tensor.is_floating_point() and tensor.dim() else 0
    if name in _NORMS and (conv := _absorbing(node)) is not None:
        if len(conv.args) < 3 or conv.args[2] is None:  # the fold gives it a bias
            tensor = _tensors(node.meta["val"])[0]
            params, nbytes = tensor.shape[1], tensor.shape[1] * tensor.element_size()
    return params, nbytes
