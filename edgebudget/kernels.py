"""Kernels: what an engine runs for a file after its own fusion, and what their time depends on.

A network is split by the engine itself, not by rules of ours, so that what is predicted is what
runs: the method of "nn-Meter: Towards Accurate Latency Prediction of Deep-Learning Model Inference
on Diverse Edge Devices" (2021), whose hardest part is guessing that split.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgebudget.energy_model import Work
from edgebudget_runtime.errors import ArtifactError

if TYPE_CHECKING:
    from edgebudget.workload import Array

_BLOCK = 16  # channels that engines compute at once (AVX-512: 16, others: 8 or 4)


@dataclass(frozen=True, slots=True)
class Kernel:
    """One fused kernel. Sizes are of one run; 0 where a kernel has no such size.

    `rows` are output positions of a convolution, or rows of a matrix product; a matrix product
    has size 1 and stride 1. `parts` are the groups of a convolution, or products in a batch.
    """

    kind: str  # "Conv.nchwc.dw", "QLinearAdd": kernels of one kind share a regressor
    macs: float
    in_bytes: float  # activations read
    weight_bytes: float
    out_bytes: float
    rows: int = 0
    width: int = 0  # of the output picture; of other kernels, the last dimension
    cin: int = 0
    cout: int = 0
    size: int = 0
    stride: int = 0
    parts: int = 0

    def features(self) -> list[float]:
        """What a regressor sees: logarithms, then how well the channels fill the blocks."""
        logs = (
            self.macs, self.in_bytes, self.weight_bytes, self.out_bytes, self.rows, self.width,
            self.cin, self.cout, self.size, self.stride, self.parts,
            self.macs / max(1.0, self.moved),  # arithmetic intensity
        )  # fmt: skip
        return [*(math.log2(1.0 + x) for x in logs), _filled(self.cin), _filled(self.cout)]

    @property
    def moved(self) -> float:
        """Bytes read and written."""
        return self.in_bytes + self.weight_bytes + self.out_bytes

    def as_list(self) -> list[Any]:
        """Compact plain data, for a log."""
        return [getattr(self, name) for name in self.__slots__]

    @staticmethod
    def from_list(raw: Sequence[Any]) -> Kernel:
        """Read what `as_list` wrote.

        Raises:
            ArtifactError: EB584, it is something else.
        """
        names = Kernel.__slots__
        try:
            kind, *rest = raw
            numbers = [float(x) for x in rest]
        except (TypeError, ValueError):
            numbers = [math.nan]
        if len(numbers) + 1 != len(names) or not all(0 <= x < math.inf for x in numbers):
            raise ArtifactError("EB584", "not a kernel", hint="calibrate the device again")
        macs, read, held, written, *sizes = numbers
        return Kernel(str(kind), macs, read, held, written, *map(int, sizes))


FEATURES = 14


def _filled(channels: int) -> float:
    """The part of the last block that is used, 1 where blocks are full or there are none."""
    if not channels:
        return 1.0
    return channels / (math.ceil(channels / _BLOCK) * _BLOCK)


@dataclass(frozen=True, slots=True)
class Observation:
    """One file's time, and that of each kernel as the engine's own clock told it.

    `kernel_us` is empty where the engine tells the time of whole runs alone. `energy_mj` is what
    one run adds to the device's idle power; None where no counter tells.
    """

    total_ms: float
    kernels: tuple[Kernel, ...]
    kernel_us: tuple[float, ...]
    energy_mj: float | None = None


def work_of(kernels: Sequence[Kernel], ms: float) -> Work:
    """What kernels that take `ms` together do, as far as energy is concerned.

    Bytes are those of an engine that keeps nothing on the chip between kernels.
    """
    macs: dict[str, float] = {}
    for kernel in kernels:
        name = "float16" if kernel.kind.endswith(".half") else "float32"
        name = "int8" if kernel.kind.startswith("Q") or "nteger" in kernel.kind else name
        macs[name] = macs.get(name, 0.0) + kernel.macs
    moved = sum(k.moved for k in kernels)
    return Work(macs=macs, bytes={"dram": moved}, seconds=ms / 1e3)


def matrix(kernels: Sequence[Kernel]) -> Array:
    """Features [kernels, FEATURES]."""
    return np.array([k.features() for k in kernels], np.float64).reshape(-1, FEATURES)


def by_kind(kernels: Sequence[Kernel]) -> Mapping[str, list[int]]:
    """Indices of the kernels of each kind."""
    found: dict[str, list[int]] = {}
    for i, kernel in enumerate(kernels):
        found.setdefault(kernel.kind, []).append(i)
    return found
