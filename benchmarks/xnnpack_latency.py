"""8-bit `.pte` files for XNNPACK: ours beside ExecuTorch's own PT2E recipe for the same network.

Both are calibrated on the same seeded pictures. Each program is loaded several times, and
all of them run in random order; ratios are what to quote.
Numerics: the signal-to-noise ratio of each against the float network on other pictures, and ours
against the ONNX graph it was made of.

    python -m benchmarks.xnnpack_latency [--threads N]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks._executorch import program
from benchmarks._quantizing import context, in_random_order
from benchmarks.harness import save
from edgebudget import graph as graphs
from edgebudget import target_registry
from edgebudget.export import to_graph
from edgebudget.load_model import load_model
from edgebudget.verify import output_steps
from edgebudget.workload import Array, Sample
from edgebudget_passes import clean_graph, quantize_int8, rewrite_for_target
from edgebudget_runtime.executorch_program import Method, bindings

_NETWORKS: Mapping[str, int] = {"cifar10-resnet20": 300, "mobilenet-v2": 60}  # and rounds
_INSTANCES = 4
_CALIBRATION, _JUDGED = 32, 8
_SLOWER = 1.10


class Pictures:
    """Seeded pictures of blobs at two scales, in the range that the networks take."""

    name = "blobs"

    def __init__(self, shape: tuple[int, ...], count: int, first: int = 0) -> None:
        self._shape, self._count, self._first = shape, count, first

    def __len__(self) -> int:
        return self._count

    def sample(self, index: int) -> Sample:
        rng = np.random.default_rng(self._first + index)
        channels, height, width = self._shape
        coarse = rng.standard_normal((channels, height // 8, width // 8))
        fine = rng.standard_normal(self._shape)
        value = coarse.repeat(8, axis=1).repeat(8, axis=2) + 0.3 * fine
        return Sample({"image": np.asarray(value, np.float32)}, None)

    def digest(self) -> str:
        return f"{self.name}/{self._shape}/{self._count}/{self._first}"


def main(arguments: list[str]) -> int:
    """Lower both networks both ways, time and compare them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.xnnpack_latency")
    parser.add_argument("--threads", type=int, default=1)
    threads = parser.parse_args(arguments).threads
    if find_spec("executorch") is None:
        sys.stderr.write('skipped: pip install "edgebudget[executorch]"\n')
        return 0
    bindings()._unsafe_reset_threadpool(threads)
    rows = {name: _network(name, rounds) for name, rounds in _NETWORKS.items()}
    ok = {}
    for name, row in rows.items():
        ok[f"{name}: at most {_SLOWER} x the recipe's latency"] = row["ratio"] <= _SLOWER
        ok[f"{name}: within one step of the ONNX graph"] = row["worst_steps"] <= 1.001
    save("xnnpack_latency", {"networks": rows, "ok": ok, "threads": threads})
    for text, good in ok.items():
        sys.stderr.write(f"{'ok  ' if good else 'MISS'} {text}\n")
    return 0 if all(ok.values()) else 1


def _network(name: str, rounds: int) -> dict[str, Any]:
    loaded = load_model(name)
    shape = loaded.program.inputs[0].shape
    calibration = Pictures(shape[1:], _CALIBRATION)
    judged = [x[None] for x in _values(Pictures(shape[1:], _JUDGED, first=1000))]
    module: torch.nn.Module = loaded.program.body
    with torch.inference_mode():
        exact = [module(torch.from_numpy(x.copy())).numpy() for x in judged]
    theirs = program(module, [x[None] for x in _values(calibration)])
    with tempfile.TemporaryDirectory(prefix="edgebudget-") as folder:
        ours, left, steps = _ours(loaded.program, calibration, judged, Path(folder))
    files = {"ours": ours, "recipe": theirs}
    runs = {
        label: [Method(data, "forward").prepared(judged[:1]) for _ in range(_INSTANCES)]
        for label, data in files.items()
    }
    times = in_random_order(runs, rounds)
    answers = {
        label: [Method(data, "forward").run([x])[0] for x in judged]
        for label, data in files.items()
    }
    return {
        "ratio": times["ours"]["median_ms"] / times["recipe"]["median_ms"],
        "times": times,
        "bytes": {label: len(data) for label, data in files.items()},
        "sqnr_db": {label: _decibel(exact, found) for label, found in answers.items()},
        "worst_steps": steps,
        "not_delegated": left,
    }


def _ours(
    start: Any, calibration: Pictures, judged: list[Array], folder: Path
) -> tuple[bytes, list[str], float]:
    """The file, nodes that XNNPACK does not run, and the gap to the ONNX graph in output steps."""
    target = target_registry.get("cpu:xnnpack")
    setting = context(calibration, target.spec)
    found = to_graph(start)
    for step in (clean_graph, rewrite_for_target):
        found = step.run(found, step.Config(), setting).program
    config = quantize_int8.Config(samples=_CALIBRATION, mixed="off", label_bias="off")
    found = quantize_int8.run(found, config, setting).program
    file = target.lower(found, folder, "main").file
    data, steps = file.read_bytes(), output_steps(file)
    left = [f"{n.op} {n.name}" for n in target.placement(file).fallback]
    method, name = Method(data, "forward"), found.inputs[0].name
    gaps = []
    for x in judged:
        want = graphs.run(found.body, {name: x})
        for output, got in zip(found.outputs, method.run([x]), strict=True):
            gaps.append(float(np.abs(want[output] - got).max()) / steps[output])
    return data, left, max(gaps)


def _values(pictures: Pictures) -> list[Array]:
    return [pictures.sample(i).inputs["image"] for i in range(len(pictures))]


def _decibel(exact: list[Array], found: list[Array]) -> float:
    error = np.concatenate(exact) - np.concatenate(found)
    return float(10 * np.log10(np.concatenate(exact).var() / np.square(error).mean()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
