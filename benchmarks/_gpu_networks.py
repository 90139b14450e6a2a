"""Zoo networks at several widths, batches and precisions, as files for a GPU to run."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx

    from edgebudget.program import Context, Program

# name -> (input shape of one sample, batch that loads a large GPU)
NETWORKS: dict[str, tuple[tuple[int, int, int], int]] = {
    "mobilenet-v2": ((3, 224, 224), 32),
    "cifar10-resnet56": ((3, 32, 32), 256),
    "cifar10-vit": ((3, 32, 32), 128),
    "uhd-iqa": ((3, 544, 960), 4),  # a quarter of its sides: the whole picture would take minutes
}
SHARES = (1.0, 0.5, 0.25)  # of the MACs, by pruning channels


@dataclass(frozen=True)
class Variant:
    """One file and what one run of it does."""

    network: str
    share: float  # of the original's MACs that was asked for
    batch: int
    precision: str  # "float32", "float16", "int8 weights"
    file: str
    macs: float
    weight_bytes: float
    activation_bytes: float  # every value written once, and read once by each of its readers
    kernels: list[list[Any]]  # as a latency predictor sees them; [] for weights as integers

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def build(name: str, folder: Path) -> Iterator[Variant]:
    """Prune, export and convert one network; files go to `folder`."""
    from edgebudget.counter import count
    from edgebudget.export import to_graph
    from edgebudget.program import Program
    from edgebudget_models import catalogue
    from edgebudget_passes import clean_graph
    from edgebudget_targets._webgpu_kernels import kernels

    shape, batch = NETWORKS[name]
    entry = catalogue.get(name)
    outputs = entry.outputs
    original = Program(
        "module", entry.load(None).eval(), (_spec(entry.input_name, (1, *shape)),), outputs
    )
    ctx = _context(original)
    for share in SHARES:
        body = _pruned(original, share, ctx)
        for size in (1, batch):
            whole = Program("module", body, (_spec(entry.input_name, (size, *shape)),), outputs)
            graph = clean_graph.run(to_graph(whole), clean_graph.Config(), ctx).program
            macs = float(count(graph).macs)
            kinds = ["float32", "float16"]
            if size == 1 and share == 1.0:
                kinds.append("int8 weights")
            for kind in kinds:
                model = _converted(graph.body, kind)
                file = folder / f"{name}-{share:g}-{size}-{kind.replace(' ', '-')}.onnx"
                file.write_bytes(model.SerializeToString())
                weights, activations = _bytes(model)
                seen = [] if kind == "int8 weights" else [k.as_list() for _, k in kernels(model)]
                yield Variant(name, share, size, kind, file.name, macs, weights, activations, seen)


def _spec(name: str, shape: tuple[int, ...]) -> Any:
    from edgebudget.program import TensorSpec

    return TensorSpec(name, shape)


def _context(original: Program) -> Context:
    import tempfile

    from edgebudget import target_registry
    from edgebudget.events import ignore
    from edgebudget.program import Context
    from edgebudget.tasks import make
    from edgebudget.workload import Data
    from edgebudget_runtime.budget import Budget

    return Context(
        budget=Budget(),
        target=target_registry.get("gpu").spec,
        task=make("agreement"),
        data=Data(None, None, None),
        original=original,
        seed=0,
        rng=np.random.default_rng(0),
        workdir=Path(tempfile.gettempdir()),
        emit=ignore,
    )


def _pruned(original: Program, share: float, ctx: Context) -> Any:
    from dataclasses import replace

    from edgebudget_passes import prune_channels

    program = replace(original, body=copy.deepcopy(original.body))
    if share == 1.0:
        return program.body
    smallest, whole = prune_channels.reachable(program, ctx.target)
    bound = max(int(whole * share), int(smallest * 1.02))
    return prune_channels.run(program, prune_channels.Config(macs=bound), ctx).program.body


def _converted(model: onnx.ModelProto, kind: str) -> onnx.ModelProto:
    from edgebudget_targets._half_precision import to_half

    if kind == "float32":
        return model
    return to_half(model if kind == "float16" else _int8_weights(model))


def _int8_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Weights of multiplying nodes as integers with one scale per output channel."""
    import onnx
    from onnx import helper, numpy_helper

    result = onnx.ModelProto()
    result.CopyFrom(model)
    stored = {w.name: w for w in result.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in result.graph.node:
        weight = stored.get(node.input[1]) if len(node.input) > 1 else None
        if node.op_type in {"Conv", "Gemm", "MatMul"} and weight is not None:
            value = numpy_helper.to_array(weight)
            flipped = node.op_type == "Gemm" and any(
                a.name == "transB" and a.i for a in node.attribute
            )
            axis = 0 if node.op_type == "Conv" or flipped else value.ndim - 1
            others = tuple(i for i in range(value.ndim) if i != axis)
            scale = np.maximum(np.abs(value).max(axis=others, keepdims=True), 1e-8) / 127
            steps = np.round(value / scale).astype(np.int8)
            named = weight.name
            weight.CopyFrom(numpy_helper.from_array(steps, named))
            flat = scale.reshape(-1).astype(np.float32)
            result.graph.initializer.append(numpy_helper.from_array(flat, f"{named}/scale"))
            made = f"{named}/float"
            nodes.append(
                helper.make_node(
                    "DequantizeLinear", [named, f"{named}/scale"], [made], made, axis=axis
                )
            )
            node.input[1] = made
        nodes.append(node)
    copies = [onnx.NodeProto.FromString(n.SerializeToString()) for n in nodes]
    del result.graph.node[:]
    result.graph.node.extend(copies)
    return result


def _bytes(model: onnx.ModelProto) -> tuple[float, float]:
    """Bytes of the weights, and of values written and read."""
    import onnx
    from onnx import helper

    from edgebudget import graph as graphs

    inferred = graphs.infer_shapes(model).graph
    weights = {w.name for w in model.graph.initializer}
    stored = sum(
        math.prod(w.dims) * helper.tensor_dtype_to_np_dtype(w.data_type).itemsize
        for w in model.graph.initializer
    )
    sizes: dict[str, int] = {}
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        kind = value.type.tensor_type.elem_type
        shape = graphs.shape_of(value)
        if kind != onnx.TensorProto.UNDEFINED and shape is not None:
            sizes[value.name] = math.prod(shape) * helper.tensor_dtype_to_np_dtype(kind).itemsize
    moved = sum(
        sizes.get(name, 0)
        for node in model.graph.node
        for name in (*node.input, *node.output)
        if name not in weights
    )
    return float(stored), float(moved)
