"""From a graph to a `.pte` whose operators run in XNNPACK; works in a process of its own.

Imports torch and executorch.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge_transform_and_lower
from onnx import TensorProto, numpy_helper

from edgebudget import graph as graphs
from edgebudget.import_onnx import import_graph
from edgebudget_runtime.errors import UnsupportedError, first_line
from edgebudget_targets._even_grids import even_grids
from edgebudget_targets._executorch_origin import left_out, step

_LOGGER = "executorch.backends.xnnpack.partition"
_ROUNDS = 3  # each makes stored tensors float that the one before left in integers


def lower(sources: Mapping[str, Path], out: Path, max_batch: int = 1) -> dict[str, dict[str, str]]:
    """Lower graphs with static shapes to the methods of one program, which share equal tensors.

    Above 1, `max_batch` samples of the graph's own shapes may be given at a time.

    Returns:
        For each method: ONNX node name -> why it is not delegated.

    Raises:
        UnsupportedError: EB243 an operator has no counterpart in torch, EB244 the graph cannot
            take several samples at a time.
    """
    models = {k: onnx.load_model(str(v)) for k, v in sources.items()}
    # XNNPACK takes a bias as float and rounds it to the product of the two steps itself, which
    # gives the stored integers back.
    for model in models.values():
        even_grids(model, {"Concat"})
        stored = _stored_integers(model)
        _make_float(model, {n for n, t in stored.items() if t == TensorProto.INT32})
    for _ in range(_ROUNDS):
        modules = {k: import_graph(m, batches=max_batch > 1) for k, m in models.items()}
        with _reasons() as said, torch.no_grad(), _no_libraries():
            exported = {k: _exported(modules[k], model, max_batch) for k, model in models.items()}
            lowered = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
        left = {k: left_out(lowered.exported_program(k), module) for k, module in modules.items()}
        # A layer that has no integer kernel after all multiplies float weights.
        packed = {k: {*_stored_integers(model)} & {*left[k]} for k, model in models.items()}
        if not any(packed.values()):
            break
        for k, model in models.items():
            _make_float(model, packed[k])
    aside = out.with_name(f".{out.name}.part")
    with _no_libraries():
        aside.write_bytes(lowered.to_executorch().buffer)
    aside.replace(out)
    found: dict[str, dict[str, str]] = {}
    for k, module in modules.items():
        why = {module.node_names.get(key, key): reason for key, reason in said.items()}
        found[k] = {n: why.get(n) or _no_kernel(op) for n, op in left[k].items()}
    return found


def _exported(
    module: torch.nn.Module, model: onnx.ModelProto, max_batch: int
) -> torch.export.ExportedProgram:
    specs = graphs.specs(model)
    example = tuple(
        torch.zeros((max_batch * s.shape[0], *s.shape[1:]), dtype=getattr(torch, s.dtype))
        for s in specs
    )
    if max_batch == 1:
        return torch.export.export(module, example)
    free = {0: torch.export.Dim("batch", min=1, max=max_batch)}
    try:
        # A tuple in a tuple: the module takes its inputs as *values.
        return torch.export.export(module, example, dynamic_shapes=(tuple(free for _ in specs),))
    except Exception as e:  # torch.export raises what the operators of a module raise
        raise UnsupportedError(
            "EB244",
            f"the graph cannot take {max_batch} samples at a time: {first_line(e)}",
            hint="compile without --max-batch",
        ) from e


def _stored_integers(model: onnx.ModelProto) -> dict[str, int]:
    """Name and element type of every node that makes a stored integer tensor float."""
    stored = {t.name: t.data_type for t in model.graph.initializer}
    return {
        n.name: stored[n.input[0]]
        for n in model.graph.node
        if n.op_type == "DequantizeLinear" and n.input[0] in stored
    }


def _make_float(model: onnx.ModelProto, names: set[str]) -> None:
    """Replace the named nodes by the float tensors that they give."""
    if not names:
        return
    stored = {t.name: t for t in model.graph.initializer}
    kept = []
    for node in model.graph.node:
        if node.name not in names:
            kept.append(node)
            continue
        whole, scale = (numpy_helper.to_array(stored[n]) for n in node.input[:2])
        zero = numpy_helper.to_array(stored[node.input[2]]) if len(node.input) > 2 else np.int8(0)
        axis = graphs.attributes(node).get("axis", 1)
        if scale.size > 1:
            shape = [1] * whole.ndim
            shape[axis] = -1
            scale = scale.reshape(shape)
            zero = zero.reshape(shape if zero.size > 1 else [1] * whole.ndim)
        value = (whole.astype(np.float32) - zero.astype(np.float32)) * scale
        if whole.dtype == np.int32:  # beyond float32's whole numbers
            value = (whole.astype(np.float64) * scale).astype(np.float32)
        model.graph.initializer.append(
            numpy_helper.from_array(np.asarray(value, np.float32), node.output[0])
        )
    del model.graph.node[:]
    model.graph.node.extend(kept)


@contextmanager
def _reasons() -> Iterator[dict[str, str]]:
    """Collects what the partitioner says about nodes it does not take, by step of the module."""
    found: dict[str, str] = {}

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            node, reason = getattr(record.msg, "node", None), getattr(record.msg, "reason", "")
            name = "" if node is None else step(node)
            if name and reason:
                found.setdefault(name, f"XNNPACK: {' '.join(str(reason).split())}")

    logger, listener = logging.getLogger(_LOGGER), Listener()
    before = logger.level, logger.propagate
    logger.addHandler(listener)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    try:
        yield found
    finally:
        logger.removeHandler(listener)
        logger.level, logger.propagate = before


@contextmanager
def _no_libraries() -> Iterator[None]:
    """Torch chooses between libraries by the batch, from 16 on, which would fix or bound it."""
    with torch.backends.mkldnn.flags(enabled=False), torch.backends.nnpack.flags(enabled=False):
        yield


def _no_kernel(op: str) -> str:
    return f"XNNPACK does not take {op}; ExecuTorch's portable kernel runs it"
