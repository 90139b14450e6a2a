"""What an integer graph must look like for Ethos-U's compiler to keep its numbers.

Imports onnx.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgebudget import graph as graphs
from edgebudget.workload import Array
from edgebudget_targets._even_grids import even_grids

# Operators whose result the compiler takes to have the grid of what they read.
_ONE_GRID = frozenset(
    "Clip Concat DepthToSpace Expand Flatten Identity MaxPool Pad ReduceMax ReduceMin Relu Reshape "
    "Slice SpaceToDepth Split Squeeze Tile Transpose Unsqueeze".split()
)
_MOST_THINNED = 3  # keeps every n-th pixel


def for_ethos(model: onnx.ModelProto, most_stride: int) -> onnx.ModelProto:
    """The same function with float edges, and means and thinned pictures as convolutions."""
    made = onnx.ModelProto()
    made.CopyFrom(graphs.infer_shapes(model))
    _float_edges(made)
    in_npu_forms(made, most_stride)
    return made


def in_npu_forms(model: onnx.ModelProto, most_stride: int | None = None) -> None:
    """Rewrite what the compiler would take to have one grid, edges left as they are.

    Means over larger strides than `most_stride` stay as they are: the CPU computes them.
    """
    even_grids(model, _ONE_GRID)
    _means_as_convolutions(model, most_stride)


def _float_edges(model: onnx.ModelProto) -> None:
    """Integer inputs become float ones that are rounded: what the compiler takes off again."""
    for value in model.graph.input:
        kind = value.type.tensor_type
        if kind.elem_type == TensorProto.FLOAT:
            continue
        readers = [n for n in model.graph.node if value.name in n.input]
        if not readers or any(n.op_type != "DequantizeLinear" for n in readers):
            continue
        kind.elem_type = TensorProto.FLOAT
        inner = f"{value.name}.integer"
        for node in readers:
            node.input[0] = inner
        rounding = helper.make_node(
            "QuantizeLinear", [value.name, *readers[0].input[1:]], [inner], name=inner
        )
        model.graph.node.insert(0, rounding)


def _means_as_convolutions(model: onnx.ModelProto, most_stride: int | None) -> None:
    """Average pooling, and every n-th pixel, become convolutions with ones.

    One rounding of the exact sum: the compiler's own pooling takes input and output to have the
    same step. Slices of two axes have a value in between that nothing rounds, so that the
    compiler leaves them to the CPU.
    """
    shapes = {
        v.name: [d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in (*model.graph.value_info, *model.graph.input)
    }
    stored = {t.name: t for t in model.graph.initializer}
    nodes = list(model.graph.node)
    del model.graph.node[:]
    for node in nodes:
        shape = shapes.get(node.input[0], []) if node.input else []
        window = None
        if len(shape) == 4 and all(shape):
            window = _window(node, shape[2:]) or _thinned(node, shape[2:], stored)
        if window is None or max(window["strides"]) > (most_stride or math.inf):
            model.graph.node.append(node)
        else:
            _add_convolution(model, node, shape[1], window)


def _add_convolution(
    model: onnx.ModelProto, node: onnx.NodeProto, channels: int, window: dict[str, list[int]]
) -> None:
    """The mean over `window` in place of `node`, channel by channel."""
    kernel = window["kernel_shape"]
    start = f"{node.name or node.output[0]}.ones"
    stored: dict[str, Array] = {
        f"{start}.q": np.ones((channels, 1, *kernel), np.int8),
        f"{start}.scale": np.asarray(1 / (kernel[0] * kernel[1]), np.float32),
        f"{start}.zero": np.asarray(0, np.int8),
    }
    for name, array in stored.items():
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    given = [node.input[0], start]
    model.graph.node.extend(
        [
            helper.make_node("DequantizeLinear", list(stored), [start], name=start),
            helper.make_node(
                "Conv",
                given,
                list(node.output),
                name=node.name,
                group=channels,
                kernel_shape=kernel,
                strides=window["strides"],
                pads=window["pads"],
            ),
        ]
    )


def _thinned(
    node: onnx.NodeProto, size: list[int], stored: Mapping[str, onnx.TensorProto]
) -> dict[str, list[int]] | None:
    """The window of a slice that takes every n-th row and column from the first; else None."""
    if (
        node.op_type != "Slice"
        or len(node.input) < 5
        or any(i not in stored for i in node.input[1:])
    ):
        return None
    starts, ends, axes, steps = (
        numpy_helper.to_array(stored[i]).ravel().tolist() for i in node.input[1:5]
    )
    strides = [1, 1]
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        side = axis % 4 - 2
        if side < 0 or start or end < size[side] or not 1 <= step <= _MOST_THINNED:
            return None
        strides[side] = int(step)
    if strides == [1, 1]:
        return None
    return {"kernel_shape": [1, 1], "strides": strides, "pads": [0] * 4}


def _window(node: onnx.NodeProto, size: list[int]) -> dict[str, list[int]] | None:
    """Kernel, strides and pads of a pool that weighs all it covers alike; None for others."""
    if node.op_type == "GlobalAveragePool":
        return {"kernel_shape": size, "strides": [1, 1], "pads": [0] * 4}
    found = graphs.attributes(node)
    pads = list(found.get("pads", [0] * 4))
    even = not any(pads) or bool(found.get("count_include_pad", 0))
    plain = not found.get("ceil_mode", 0) and set(found.get("dilations", [1])) == {1}
    automatic = found.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID", b"NOTSET", b"VALID")
    if node.op_type != "AveragePool" or not even or not plain or automatic:
        return None
    return {
        "kernel_shape": list(found["kernel_shape"]),
        "strides": list(found.get("strides", [1, 1])),
        "pads": pads,
    }
