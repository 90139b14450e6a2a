"""What the quantization benchmarks share: targets, a bare context, ONNX Runtime's own recipe."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from edgebudget import target_registry
from edgebudget.events import ignore
from edgebudget.program import Context
from edgebudget.tasks import Classification
from edgebudget.workload import Data
from edgebudget_runtime.budget import Budget

if TYPE_CHECKING:
    from edgebudget.target import TargetSpec
    from edgebudget.workload import Dataset, Task

_WARMUP = 5

CPU = target_registry.get("cpu").spec
NPU = target_registry.get("npu").spec


def context(data: Dataset, target: TargetSpec, task: Task | None = None) -> Context:
    """A pass's context with calibration data and seed 0."""
    nothing: Any = None
    return Context(
        budget=Budget(),
        target=target,
        task=task or Classification(),
        data=Data(calibration=data),
        original=nothing,
        seed=0,
        rng=np.random.default_rng(0),
        workdir=Path(),
        emit=ignore,
    )


def in_random_order(
    runs: Mapping[str, Sequence[Callable[[], object]]], rounds: int
) -> dict[str, dict[str, float]]:
    """Time several instances of each candidate, all in a new seeded order every round.

    In one fixed order, identical graphs were seen 4 to 6 % apart: what runs just before leaves
    the caches behind, and each loaded instance lies elsewhere in memory. Returns milliseconds:
    the median over instances of each one's median and quartiles, and the instances' range.
    """
    turns = [(name, i) for name, instances in runs.items() for i in range(len(instances))]
    times: dict[tuple[str, int], list[float]] = {turn: [] for turn in turns}
    order = np.random.default_rng(0)
    for count in range(rounds + _WARMUP):
        for k in order.permutation(len(turns)):
            name, i = turns[k]
            start = time.perf_counter()
            runs[name][i]()
            if count >= _WARMUP:
                times[name, i].append((time.perf_counter() - start) * 1e3)
    found = {}
    for name, instances in runs.items():
        parts = [statistics.quantiles(times[name, i], n=4) for i in range(len(instances))]
        q1, middle, q3 = (statistics.median(p[k] for p in parts) for k in range(3))
        medians = [p[1] for p in parts]
        found[name] = {
            "median_ms": middle,
            "q1_ms": q1,
            "q3_ms": q3,
            "instances_range_ms": max(medians) - min(medians),
            "instances": len(parts),
            "count": rounds,
        }
    return found


def quantize_static(
    model: onnx.ModelProto, data: Dataset, activations: str, folder: Path
) -> onnx.ModelProto:
    """ONNX Runtime's recipe with per-channel int8 weights, on all of `data`."""
    from onnxruntime.quantization import QuantFormat, QuantType
    from onnxruntime.quantization import quantize_static as quantize
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader:
        def __init__(self) -> None:
            self._next = iter(range(len(data)))

        def get_next(self) -> dict[str, Any] | None:
            index = next(self._next, None)
            if index is None:
                return None
            return {k: v[None] for k, v in data.sample(index).inputs.items()}

    source, ready, out = (folder / n for n in ("float.onnx", "ready.onnx", "int8.onnx"))
    onnx.save(model, source)
    quant_pre_process(source, ready)
    quantize(
        ready,
        out,
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType[activations],
        weight_type=QuantType.QInt8,
    )
    return onnx.load(out)
