"""Balance channels between consecutive layers, so that one 8-bit range serves them all.

Where a ReLU (or nothing) lies between two layers, dividing a channel by s > 0 in the first and
multiplying the weights that read it by s in the second changes nothing in float. s is chosen so
that the channel's activation and the weights reading it use the same share of their ranges.

Source: "Data-Free Quantization Through Weight Equalization and Bias Correction", Nagel et al.,
2019; activation ranges in place of weight ranges as in "SmoothQuant", Xiao et al., 2023.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgebudget import graph as graphs
from edgebudget.program import Context, Note, Pass, PassResult, Program
from edgebudget.quant_graph import Graph, prepare
from edgebudget.ranges import collect, run_over
from edgebudget_passes import _assign, _recipes
from edgebudget_passes._held_back import Judge, Split, decibel, split
from edgebudget_passes._recipes import Bench, Recipe

if TYPE_CHECKING:
    from edgebudget.workload import Array

_MOST = 64.0  # the largest factor: beyond it float rounding starts to show


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of this pass."""

    samples: int = 128


@dataclass(frozen=True, slots=True)
class Pair:
    """Two layers with one value between them that nothing else reads."""

    first: onnx.NodeProto
    second: onnx.NodeProto
    reads_axis: int  # the axis of the second weight that runs over the value's channels


def run(program: Program, config: Config, ctx: Context) -> PassResult:
    """Equalize every pair of layers, kept only if plain int8 comes nearer to the float outputs.

    Raises:
        UsageError: EB130, no calibration data.
        ArtifactError: EB520 or EB521, NaN or infinity in data or weights.
    """
    graph = prepare(program.body)
    found = pairs(graph)
    if not found:
        return PassResult(program, declined=(Note("graph", "not equalized", "no pair of layers"),))
    parts = split(ctx.data.calibration, config.samples, ctx.rng)
    data = ctx.data.calibration
    assert data is not None  # split has refused its absence
    balanced = Graph(_balanced(graph, found, _peaks(graph, found, parts, ctx)))
    judge = Judge(graph.model, data, parts.judge, ctx.emit, exact=ctx.target.exact)
    before, after = (_plain_error(g, parts, judge, ctx) for g in (graph, balanced))
    why = f"plain int8, held-back SQNR {decibel(before):.1f} -> {decibel(after):.1f} dB"
    if not after < before:
        return PassResult(program, declined=(Note("graph", "not equalized", why),))
    return PassResult(
        replace(program, body=balanced.model),
        (Note("graph", f"{len(found)} pairs of layers", why),),
    )


def pairs(graph: Graph) -> list[Pair]:
    """Layers whose channels may be rescaled against each other."""
    uses: dict[str, int] = {}
    for node in graph.nodes:
        for name in node.input:
            uses[name] = uses.get(name, 0) + 1
    found = []
    for node in graph.nodes:
        if node.op_type not in {"Conv", "Gemm"} or not graph.has_weight(node):
            continue
        clamp = graph.clamps.get(node.name)
        if clamp is not None and clamp.op_type != "Relu":
            continue  # an upper bound does not scale
        between = graph.result(node)
        readers = graph.readers[between]
        if len(readers) != 1 or between in graph.outputs or readers[0].input[0] != between:
            continue
        second = readers[0]
        if second.op_type not in {"Conv", "Gemm"} or not graph.has_weight(second):
            continue
        axis = _reads_axis(graph, second)
        stored = [n for layer in (node, second) for n in layer.input[1:] if n]
        if axis is None or any(uses[n] > 1 for n in stored):
            continue
        if graph.weights[second.input[1]].shape[axis] == graph.channels(node):
            found.append(Pair(node, second, axis))
    return found


def _reads_axis(graph: Graph, node: onnx.NodeProto) -> int | None:
    attributes = graphs.attributes(node)
    if node.op_type == "Gemm":
        return 1 if attributes.get("transB", 0) else 0
    groups = attributes.get("group", 1)
    if groups == 1:
        return 1
    weight = graph.weights[node.input[1]]
    return 0 if weight.shape[1] == 1 and weight.shape[0] == groups else None


def _peaks(graph: Graph, found: Sequence[Pair], parts: Split, ctx: Context) -> list[Array]:
    """Largest magnitude of every channel between the layers of each pair."""
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    del model.graph.output[:]
    as_input = graphs.opset(model) >= 18
    for i, pair in enumerate(found):
        value = graph.result(pair.first)
        rank = len(graph.shape(value) or (1,) * graph.weights[pair.second.input[1]].ndim)
        axes = [a for a in range(rank) if a != 1]
        inputs, extra = [f"eb.abs.{i}"], {"axes": axes}
        if as_input:
            name = f"eb.axes.{i}"
            model.graph.initializer.append(numpy_helper.from_array(np.array(axes, np.int64), name))
            inputs, extra = [*inputs, name], {}
        model.graph.node.append(helper.make_node("Abs", [value], [f"eb.abs.{i}"]))
        reduce = helper.make_node("ReduceMax", inputs, [f"eb.peak.{i}"], keepdims=0)
        reduce.attribute.extend(helper.make_attribute(k, v) for k, v in extra.items())
        model.graph.node.append(reduce)
        info = helper.make_tensor_value_info(f"eb.peak.{i}", TensorProto.FLOAT, None)
        model.graph.output.append(info)
    peaks = [np.zeros(graph.channels(p.first)) for p in found]
    for _, out in run_over(
        model, ctx.data.calibration, parts.ranges, emit=ctx.emit, work="channel ranges"
    ):
        peaks = [np.maximum(p, out[f"eb.peak.{i}"]) for i, p in enumerate(peaks)]
    return peaks


def _balanced(graph: Graph, found: Sequence[Pair], peaks: Sequence[Array]) -> onnx.ModelProto:
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    now = {k: np.array(v) for k, v in graph.weights.items()}
    for pair, peak in zip(found, peaks, strict=True):
        source, reads = pair.first.input[1], pair.second.input[1]
        others = tuple(a for a in range(now[reads].ndim) if a != pair.reads_axis)
        weight_peak = np.abs(now[reads]).max(axis=others)
        factor = _factor(peak, weight_peak)
        axis = graph.channel_axis(pair.first)
        now[source] = now[source] / _along(factor, axis, now[source].ndim)
        if len(pair.first.input) > 2 and pair.first.input[2]:
            bias = pair.first.input[2]
            now[bias] = now[bias] / factor
        now[reads] = now[reads] * _along(factor, pair.reads_axis, now[reads].ndim)
        for name in (source, reads, *pair.first.input[2:]):
            if name:
                graphs.set_initializer(model, name, now[name].astype(np.float32))
    return model


def _factor(peak: Array, weight_peak: Array) -> Array:
    """What to divide each channel by; 1 where the channel or the weights reading it are dead."""
    alive = (peak > 0.0) & (weight_peak > 0.0)
    share = np.where(alive, peak / max(peak.max(), 1e-30), 1.0)
    weight_share = np.where(alive, weight_peak / max(weight_peak.max(), 1e-30), 1.0)
    factor: Array = np.where(alive, np.sqrt(share / weight_share), 1.0)
    return np.clip(factor, 1.0 / _MOST, _MOST)


def _along(factor: Array, axis: int, rank: int) -> Array:
    return factor.reshape([-1 if a == axis else 1 for a in range(rank)])


def _plain_error(graph: Graph, parts: Split, judge: Judge, ctx: Context) -> float:
    assignment = _assign.assign(graph, ctx.target, frozenset(), frozenset())
    assert ctx.data.calibration is not None  # split has refused its absence
    stats = collect(
        graph.model,
        ctx.data.calibration,
        parts.ranges,
        _recipes.watched(graph, assignment),
        emit=ctx.emit,
    )
    bench = Bench(graph, stats, per_channel=True, family=ctx.target.family)
    return judge.error(bench.build(assignment, Recipe("minmax")))


PASS = Pass(
    "equalize",
    run,
    Config,
    "graph",
    "balance channels between consecutive layers before quantization",
    equivalence="close",
)
