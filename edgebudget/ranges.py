"""What values flow through a float model, and which range of each an integer should cover.

The model runs in ONNX Runtime with reductions inside the graph, so that a 66 MB activation
leaves it as two numbers and a few hundred samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import TensorProto, helper

from edgebudget import graph as graphs
from edgebudget.events import Advanced, Emit, Finished, Started
from edgebudget.session import CpuSession
from edgebudget_runtime.errors import ArtifactError, UsageError

if TYPE_CHECKING:
    from edgebudget.workload import Array, Dataset

Range = tuple[float, float]
POINTS = 1 << 18  # values kept of each activation, over all samples
_SEARCHED = 1 << 14  # values the squared-error search looks at
_ROOM_DRAWS = 4.0  # of range, shared by the samples: see `_room`


@dataclass(frozen=True, slots=True)
class Stats:
    """One activation over the calibration samples: exact extremes and an even subsample.

    `low` is 0 after a ReLU, seen or not. `room` is the share of the range to add on either side,
    for what so few samples cannot show.
    """

    low: float
    high: float
    values: Array
    room: float = 0.0


def collect(
    model: onnx.ModelProto,
    dataset: Dataset | None,
    indices: Sequence[int],
    tensors: Sequence[str],
    *,
    emit: Emit,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> dict[str, Stats]:
    """Run the float model over some samples and keep what `tensors` held.

    Raises:
        UsageError: EB130, there is no calibration data.
        ArtifactError: EB520, a sample or an activation holds NaN or infinity.
    """
    known = graphs.shapes(model) if shapes is None else shapes
    per_run = max(16, POINTS // max(1, len(indices)))
    watched = _with_reductions(model, tensors, known, per_run)
    low = dict.fromkeys(tensors, np.inf)
    high = dict.fromkeys(tensors, -np.inf)
    kept: dict[str, list[Array]] = {t: [] for t in tensors}
    for index, out in run_over(watched, dataset, indices, emit=emit, work="calibrate"):
        for i, name in enumerate(tensors):
            a = out.get(f"eb.min.{i}", np.float32(0.0))
            b, values = (out[f"eb.{part}.{i}"] for part in ("max", "some"))
            if not (np.isfinite(a) and np.isfinite(b) and np.isfinite(values).all()):
                raise ArtifactError(
                    "EB520",
                    f"activation {name!r} is NaN or infinite on calibration sample {index}",
                    hint="check the sample's values and the model's input scaling",
                )
            low[name], high[name] = min(low[name], float(a)), max(high[name], float(b))
            kept[name].append(values)
    room = {t: _room(known[t], len(indices)) for t in tensors}
    return {t: Stats(low[t], high[t], np.concatenate(kept[t]), room[t]) for t in tensors}


def _room(shape: tuple[int, ...], samples: int) -> float:
    """Room for a tensor of this shape, [N, C, ...].

    Feature maps show their tails within one picture; a pooled vector or a score has one draw a
    sample, and among few draws the extremes lie well inside those of the next thousand.
    """
    return min(0.25, _ROOM_DRAWS / samples) if math.prod(shape[2:]) == 1 else 0.0


def run_over(
    model: onnx.ModelProto | bytes,
    dataset: Dataset | None,
    indices: Sequence[int],
    *,
    emit: Emit,
    work: str,
    exact: bool = True,
) -> Iterator[tuple[int, dict[str, Array]]]:
    """Run a model sample by sample (by its own batch): (first sample's number, outputs).

    A last batch that is too short is filled with samples of the first. `exact` is the target's.

    Raises:
        UsageError: EB130, there is no calibration data.
        ArtifactError: EB520, a sample holds NaN or infinity.
    """
    if dataset is None or not indices:
        raise UsageError(
            "EB130",
            "no calibration data: integer ranges must come from real samples",
            hint="give --data imagefolder:DIR or --data npz:FILE",
        )
    blob = model if isinstance(model, bytes) else graphs.canonical_bytes(model)
    session = CpuSession(blob, exact=exact)
    emit(Started(work, len(indices)))
    size = batch_size(model)
    for start in range(0, len(indices), size):
        part = list(indices[start : start + size])
        filled = [part[i] if i < len(part) else indices[i % len(indices)] for i in range(size)]
        yield part[0], session.run(feed(dataset, filled))
        emit(Advanced(work, len(part)))
    emit(Finished(work))


def batch_size(model: onnx.ModelProto | bytes) -> int:
    """The first dimension of the model's first input."""
    loaded = onnx.load_from_string(model) if isinstance(model, bytes) else model
    shape = graphs.shape_of(graphs.inputs(loaded)[0])
    return shape[0] if shape else 1


def feed(dataset: Dataset, indices: Sequence[int]) -> dict[str, Array]:
    """Stack samples into one batch, checked to be finite.

    Raises:
        ArtifactError: EB520, a sample holds NaN or infinity.
    """
    samples = [dataset.sample(i) for i in indices]
    for index, sample in zip(indices, samples, strict=True):
        for name, value in sample.inputs.items():
            if value.dtype.kind == "f" and not np.isfinite(value).all():
                raise ArtifactError(
                    "EB520",
                    f"calibration sample {index} of {dataset.name!r} holds NaN or infinity "
                    f"in {name!r}",
                    hint="remove that sample, or repair its pre-processing",
                )
    return {k: np.stack([s.inputs[k] for s in samples]) for k in samples[0].inputs}


def minmax(stats: Stats) -> Range:
    """Everything that was seen, zero included."""
    return min(stats.low, 0.0), max(stats.high, 0.0)


def percentile(stats: Stats, share: float) -> Range:
    """The range that `share` percent of the values lie in; half of the rest on either side."""
    low, high = minmax(stats)
    both = low < 0.0 < high
    tail = (100.0 - share) / 2.0 if both else 100.0 - share
    if low < 0.0:
        low = min(0.0, max(low, float(np.percentile(stats.values, tail))))
    if high > 0.0:
        high = max(0.0, min(high, float(np.percentile(stats.values, 100.0 - tail))))
    return (low, high) if high > low else minmax(stats)


def least_squares(stats: Stats, levels: int) -> Range:
    """The range whose rounding and clipping to `levels` steps has the least squared error.

    Either end is shrunk in turn, judged on a subsample of the values.
    """
    step = max(1, stats.values.size // _SEARCHED)
    values = stats.values[::step].astype(np.float32)
    best = minmax(stats)
    least = _squared_error(values, best, levels)
    for shrink_high in (True, False, True):
        low, high = best
        for shrink in np.linspace(0.98, 0.3, 35):
            tried = (low, high * float(shrink)) if shrink_high else (low * float(shrink), high)
            error = _squared_error(values, tried, levels)
            if error < least:
                best, least = tried, error
    return best


def _squared_error(values: Array, span: Range, levels: int) -> float:
    low, high = span
    scale = (high - low) / levels
    if scale <= 0.0:
        return float(np.square(values).mean())
    zero = round(-low / scale)
    steps = np.clip(np.round(values / scale), -zero, levels - zero)
    return float(np.square(values - steps * scale).mean())


def _with_reductions(
    model: onnx.ModelProto,
    tensors: Sequence[str],
    shapes: Mapping[str, tuple[int, ...]],
    points: int,
) -> onnx.ModelProto:
    """Add the extremes and `points` evenly spaced values of each tensor as outputs."""
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    graph = watched.graph
    del graph.output[:]

    def constant(name: str, value: int) -> str:
        graph.initializer.append(helper.make_tensor(name, TensorProto.INT64, [1], [value]))
        return name

    flat, begin, end = constant("eb.flat", -1), constant("eb.begin", 0), constant("eb.end", 2**62)
    axis = constant("eb.axis", 0)
    clipped = {o for n in graph.node if n.op_type == "Relu" for o in n.output}

    def watch(part: str, i: int, op: str, inputs: list[str], **attributes: int) -> None:
        name = f"eb.{part}.{i}"
        node = helper.make_node(op, inputs, [name])
        node.attribute.extend(helper.make_attribute(k, v) for k, v in attributes.items())
        graph.node.append(node)
        graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))

    for i, name in enumerate(tensors):
        size = int(np.prod(shapes[name])) if name in shapes else points
        stride = constant(f"eb.stride.{i}", _coprime(-(-size // points), shapes.get(name, ())))
        if name not in clipped:  # else a pass over the whole value is saved
            watch("min", i, "ReduceMin", [name], keepdims=0)
        watch("max", i, "ReduceMax", [name], keepdims=0)
        graph.node.append(helper.make_node("Reshape", [name, flat], [f"eb.line.{i}"]))
        watch("some", i, "Slice", [f"eb.line.{i}", begin, end, axis, stride])
    return watched


def _coprime(stride: int, shape: Sequence[int]) -> int:
    """The next stride that walks through every channel and column of `shape`."""
    while any(np.gcd(stride, d) > 1 for d in shape if d > 1) and stride > 1:
        stride += 1
    return max(1, stride)
