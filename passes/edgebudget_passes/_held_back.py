"""Judge quantized graphs by their outputs on calibration samples that set no range."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgebudget import graph as graphs
from edgebudget.ranges import batch_size, feed, run_over
from edgebudget.session import CpuSession
from edgebudget_runtime.errors import UsageError

if TYPE_CHECKING:
    import onnx

    from edgebudget.events import Emit
    from edgebudget.workload import Array, Dataset

_KEPT_BYTES = 1 << 28  # inputs stay in memory up to here, else they are read again
_SHARE = 0.25
_MOST = 128


@dataclass(frozen=True, slots=True)
class Split:
    """Sample numbers that set ranges, and those that judge them."""

    ranges: tuple[int, ...]
    judge: tuple[int, ...]


def split(dataset: Dataset | None, samples: int, rng: np.random.Generator) -> Split:
    """A seeded draw of at most `samples`, a quarter of them held back.

    Raises:
        UsageError: EB130, there is no calibration data.
    """
    if dataset is None or len(dataset) == 0:
        raise UsageError(
            "EB130",
            "no calibration data: integer ranges must come from real samples",
            hint="give --data imagefolder:DIR or --data npz:FILE",
        )
    order = [int(i) for i in rng.permutation(len(dataset))[:samples]]
    held = min(_MOST, max(1, round(len(order) * _SHARE)))
    judge = tuple(sorted(order[:held]))
    return Split(tuple(sorted(order[held:])) or judge, judge)


class Judge:
    """Float outputs on the held-back samples, and the error of others against them.

    `exact` is the target's: what clips there clips here.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        dataset: Dataset,
        indices: Sequence[int],
        emit: Emit,
        *,
        exact: bool,
    ) -> None:
        self._exact = exact
        size = batch_size(model)
        runs = -(-len(indices) // size)
        self._parts = [
            [indices[(i * size + j) % len(indices)] for j in range(size)] for i in range(runs)
        ]
        self._dataset = dataset
        first = feed(dataset, self._parts[0])
        fits = sum(v.nbytes for v in first.values()) * runs <= _KEPT_BYTES
        self._kept = [feed(dataset, p) for p in self._parts] if fits else None
        found = [o for _, o in run_over(model, dataset, indices, emit=emit, work="reference")]
        self._reference = {k: np.stack([o[k] for o in found]) for k in found[0]}

    @property
    def samples(self) -> int:
        """Number of held-back samples."""
        return len({i for part in self._parts for i in part})

    def fewer(self, samples: int) -> Judge:
        """The same judge on its first samples only."""
        part = object.__new__(Judge)
        runs = max(1, min(len(self._parts), samples // len(self._parts[0])))
        part._parts, part._dataset = self._parts[:runs], self._dataset
        part._exact = self._exact
        part._kept = self._kept[:runs] if self._kept is not None else None
        part._reference = {k: v[:runs] for k, v in self._reference.items()}
        return part

    def errors(self, model: onnx.ModelProto) -> dict[str, float]:
        """Noise power over signal power of each output; for integers, the share that differs."""
        session = CpuSession(graphs.canonical_bytes(model), exact=self._exact)
        feeds = self._kept or (feed(self._dataset, p) for p in self._parts)
        found = [session.run(f) for f in feeds]
        return {
            k: _noise(reference, np.stack([o[k] for o in found]))
            for k, reference in self._reference.items()
        }

    def error(self, model: onnx.ModelProto) -> float:
        """The mean of `errors`."""
        return float(np.mean(list(self.errors(model).values())))


def decibel(noise: float) -> float:
    """Signal-to-quantization-noise ratio in dB of a noise-to-signal power ratio."""
    return math.inf if noise <= 0.0 else -10.0 * math.log10(noise)


def _noise(reference: Array, found: Array) -> float:
    if reference.dtype.kind != "f":
        return float((reference != found).mean())
    wanted = reference.astype(np.float64)
    noise = float(np.square(found.astype(np.float64) - wanted).mean())
    if not math.isfinite(noise):
        return math.inf
    signal = float(wanted.var()) or float(np.square(wanted).mean()) or 1.0
    return noise / signal
