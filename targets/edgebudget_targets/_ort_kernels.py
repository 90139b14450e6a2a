"""The kernels that ONNX Runtime runs for a file, from its own profile, and their times.

The profile lists every node of the optimized graph (fused, its layout changed) with the shapes it
was given: no rule of ours guesses what the engine fuses. Its clock counts whole microseconds and
adds one or two to each kernel, which fitting takes back.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort

from edgebudget.kernels import Kernel, Observation
from edgebudget_runtime.errors import ArtifactError

if TYPE_CHECKING:
    from edgebudget.workload import Array

_SUFFIX = "_kernel_time"
_OPTIMIZED = "optimized.onnx"
_LAST_FIRST = ("QLinearConv", "NhwcMaxPool", "NhwcConv", "QLinearGlobalAveragePool")
_SIZES = {"float": 4, "uint8": 1, "int8": 1, "int32": 4, "int64": 8, "double": 8, "float16": 2,
          "bool": 1, "uint16": 2, "int16": 2}  # fmt: skip
_BURST_S, _LEAST, _MOST = 0.015, 8, 60  # of one burst of runs
_KEPT = 0.6  # of the runs, the fastest: what disturbs a run only ever adds to it
Shape = tuple[int, ...]
Feed = Mapping[str, "Array"]


def kernels(file: Path, feed: Feed, threads: int) -> tuple[Kernel, ...]:
    """Every kernel of one run, in order.

    Raises:
        ArtifactError: EB510, the engine refuses the file or the inputs.
    """
    return tuple(k for k, _ in _profiled(file, feed, threads, runs=lambda n, s: n < 1))


def observe(file: Path, feed: Feed, threads: int) -> Observation:
    """The usual time of one run, unprofiled, and of each kernel, in two short bursts.

    Raises:
        ArtifactError: EB510, the engine refuses the file or the inputs.
    """
    session = _session(file, threads)
    names = [o.name for o in session.get_outputs()]
    took: list[float] = []
    for _ in range(3):
        _guarded(partial(session.run, names, dict(feed)))
    began = time.perf_counter()
    while _more(len(took), time.perf_counter() - began):
        start = time.perf_counter()
        session.run(names, dict(feed))
        took.append((time.perf_counter() - start) * 1e3)
    del session  # the profiled one has the memory to itself, as this one had
    seen = _profiled(file, feed, threads, runs=_more)
    return Observation(
        float(np.median(took)), tuple(k for k, _ in seen), tuple(us for _, us in seen)
    )


def _more(done: int, seconds: float) -> bool:
    return done < _LEAST or (done < _MOST and seconds < _BURST_S)


def _profiled(
    file: Path, feed: Feed, threads: int, *, runs: Callable[[int, float], bool]
) -> list[tuple[Kernel, float]]:
    with tempfile.TemporaryDirectory(prefix="edgebudget-") as folder:
        session = _session(file, threads, Path(folder))
        weights = _weights(Path(folder) / _OPTIMIZED)
        _guarded(lambda: session.run(None, dict(feed)))
        began, done = time.perf_counter(), 0
        while runs(done, time.perf_counter() - began):
            session.run(None, dict(feed))
            done += 1
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    nodes = [e for e in events if e.get("cat") == "Node" and e.get("name", "").endswith(_SUFFIX)]
    per_run, rest = divmod(len(nodes), done + 1)
    if rest or not per_run:
        raise ArtifactError(
            "EB510",
            f"the engine's profile of {file.name} has {len(nodes)} kernels in {done + 1} runs",
            hint="a network whose kernels differ from run to run cannot be predicted",
        )
    times = np.sort(
        np.array([e["dur"] for e in nodes], np.float64).reshape(done + 1, per_run)[min(1, done) :],
        axis=0,
    )
    usual = times[: max(1, int(len(times) * _KEPT))].mean(axis=0)
    found = []
    for event, us in zip(nodes, usual, strict=False):
        name = event["name"].removesuffix(_SUFFIX)
        found.append((kernel_of(name, event["args"], weights.get(name)), float(us)))
    return found


def _weights(optimized: Path) -> dict[str, tuple[Shape, float]]:
    """Shape and bytes of each node's stored weight; the profile leaves out those it has packed."""
    import onnx

    graph = onnx.load_model(optimized, load_external_data=False).graph
    stored = {t.name: t for t in graph.initializer if len(t.dims) > 1}
    found = {}
    for node in graph.node:
        tensors = [stored[i] for i in node.input if i in stored]
        if tensors:
            largest = max(tensors, key=lambda t: math.prod(t.dims))
            size = onnx.helper.tensor_dtype_to_np_dtype(largest.data_type).itemsize
            found[node.name] = tuple(largest.dims), float(math.prod(largest.dims) * size)
    return found


def _session(file: Path, threads: int, profile: Path | None = None) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile / "profile")
        options.optimized_model_filepath = str(profile / _OPTIMIZED)
    return _guarded(
        lambda: ort.InferenceSession(
            str(file), options, providers=["CPUExecutionProvider"], enable_fallback=0
        )
    )


def _guarded(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except Exception as e:  # the engine raises a dozen unrelated types here
        first = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise ArtifactError(
            "EB510",
            f"ONNX Runtime cannot run this model: {first}",
            hint="check the file with `edgebudget inspect`",
        ) from e


def kernel_of(name: str, args: Mapping[str, Any], weight: tuple[Shape, float] | None) -> Kernel:
    """One kernel from its node's name, what the profile says of it, and its stored weight."""
    op = str(args["op_name"])
    given = [_tensor(t) for t in args.get("input_type_shape", [])]
    made = [_tensor(t) for t in args.get("output_type_shape", [])]
    out: Shape = made[0][0] if made else ()
    written = float(sum(b for _, b in made))
    # What is fused into a convolution shows in its bytes; it makes no kind of its own.
    base = op.replace("FusedConv", "Conv") + (".nchwc" if name.endswith("_nchwc") else "")
    if "Conv" in op and weight is not None and len(weight[0]) == len(out) == 4:
        if "Transpose" not in op:
            return _convolution(base, given, out, weight, written)
    if ("MatMul" in op or "Gemm" in op) and given:
        return _product(base, given, out, weight, written)
    width = out[-1] if out else 0
    channels = 0
    if len(out) == 4:
        channels = out[3] if op in _LAST_FIRST else out[1]
    dtypes = [next(iter(t)) for t in args.get("input_type_shape", [])]
    kind = base if op.startswith("Q") or not dtypes else f"{base}.{dtypes[0]}"
    read = sum(b for s, b in given if s)
    rows = math.prod(out) // max(1, width)
    held = 0.0 if weight is None else weight[1]
    macs = 0.0 if "Conv" not in op or weight is None else held * rows
    return Kernel(kind, macs, read, held, written, rows, width, 0, channels)


def _convolution(
    base: str,
    given: Sequence[tuple[Shape, float]],
    out: Shape,
    weight: tuple[Shape, float],
    written: float,
) -> Kernel:
    x, read = given[0]
    filters, each, high, wide = weight[0]
    last = base.startswith(_LAST_FIRST) and out[3] == filters and x[3] % each == 0
    if last:
        before, cin, height, width, filters = x[1], x[3], out[1], out[2], out[3]
    else:
        before, cin, height, width, filters = x[2], x[1], out[2], out[3], out[1]
    groups = max(1, cin // each)
    added = [b for s, b in given[1:] if len(s) == 4 and s == out]  # a sum that was fused in
    if groups > 1:
        base += ".dw" if each == 1 else ".group"
    elif high == wide == 1:
        base += ".1x1"
    return Kernel(
        base,
        float(math.prod(out) * each * high * wide),
        read + sum(added),
        weight[1],
        written,
        height * width,
        width,
        cin,
        filters,
        max(high, wide),
        max(1, round(before / max(1, height))),
        groups,
    )


def _product(
    base: str,
    given: Sequence[tuple[Shape, float]],
    out: Shape,
    weight: tuple[Shape, float] | None,
    written: float,
) -> Kernel:
    """Without a stored weight both factors are activations, as in attention."""
    a, read = given[0]
    inner, columns = (a[-1] if a else 1), (out[-1] if out else 1)
    total = math.prod(out)
    if weight is None:
        read += max((b for s, b in given[1:] if len(s) > 1), default=0.0)
    return Kernel(
        base + (".batch" if weight is None else ""),
        float(total * inner),
        read,
        0.0 if weight is None else weight[1],
        written,
        total // max(1, columns),
        columns,
        inner,
        columns,
        1,
        1,
        max(1, math.prod(out[:-2])) if weight is None else 1,
    )


def _tensor(raw: Mapping[str, Sequence[int]]) -> tuple[Shape, float]:
    """Shape and bytes of one entry, `{"float": [1, 3, 8, 8]}`."""
    for dtype, dims in raw.items():
        shape = tuple(int(d) for d in dims)
        return shape, float(math.prod(shape) * _SIZES.get(dtype, 4))
    return (), 0.0
