"""A predictor of latency and energy on one device and engine: data, checked, never code.

Each kind of kernel has a regressor on the logarithm of its time: a power law of the kernel's sizes,
and boosted trees on what the power law leaves. A network's time is the sum over its kernels and a
floor for each run ("nn-Meter: Towards Accurate Latency Prediction of Deep-Learning Model Inference
on Diverse Edge Devices", 2021), and what starting each kernel takes. Energy, where a counter told
it to the calibration, is that of the kernels' work and of the predicted time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgebudget.energy_model import EnergyModel
from edgebudget.kernels import FEATURES, Kernel, by_kind, matrix, work_of
from edgebudget_runtime import codec
from edgebudget_runtime.cost import Figure
from edgebudget_runtime.device_id import Device
from edgebudget_runtime.errors import ArtifactError, TargetError, UsageError

if TYPE_CHECKING:
    from edgebudget.workload import Array

SCHEMA = 4
_MOST_BYTES = 8_000_000
_MOST_NODES = 100_000  # of the trees of one regressor


@dataclass(frozen=True, slots=True)
class Trees:
    """Boosted regression trees as flat arrays: node i goes to `left[i]` where x <= threshold.

    `roots` are the trees' first nodes; a leaf has feature -1. Children come after their parent,
    so that a walk ends.
    """

    roots: tuple[int, ...] = ()
    feature: tuple[int, ...] = ()
    threshold: tuple[float, ...] = ()
    left: tuple[int, ...] = ()
    right: tuple[int, ...] = ()
    value: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        count = len(self.feature)
        parts = (self.threshold, self.left, self.right, self.value)
        if count > _MOST_NODES or any(len(p) != count for p in parts):
            raise ValueError(f"arrays of one length, {_MOST_NODES} nodes at most")
        if not all(0 <= r < count for r in self.roots):
            raise ValueError("roots that exist")
        for i, f in enumerate(self.feature):
            inner = f >= 0
            if f >= FEATURES or (
                inner and not (i < self.left[i] < count and i < self.right[i] < count)
            ):
                raise ValueError(f"node {i} that leads on")

    def sums(self, x: Array) -> Array:
        """The sum of all trees for rows of features [N, FEATURES], as [N]."""
        feature, threshold = np.array(self.feature, int), np.array(self.threshold)
        left, right = np.array(self.left, int), np.array(self.right, int)
        value, total = np.array(self.value), np.zeros(len(x))
        rows = np.arange(len(x))
        for root in self.roots:
            at = np.full(len(x), root)
            while (inner := feature[at] >= 0).any():
                goes = x[rows, np.maximum(feature[at], 0)] <= threshold[at]
                at = np.where(inner, np.where(goes, left[at], right[at]), at)
            total += value[at]
        return total


@dataclass(frozen=True, slots=True)
class Regressor:
    """The time of one kind of kernel."""

    count: int  # kernels it was fitted on
    intercept: float
    weights: tuple[float, ...]  # of the features: the power law
    lowest: float  # log of microseconds: nothing far beyond what was seen is believed
    highest: float
    trees: Trees = field(default_factory=Trees)

    def __post_init__(self) -> None:
        if len(self.weights) != FEATURES or self.lowest > self.highest or self.highest > 30:
            raise ValueError(f"{FEATURES} weights, and bounds that make sense")

    def microseconds(self, x: Array) -> Array:
        """Times [N] of kernels with features [N, FEATURES]."""
        logs = self.intercept + x @ np.array(self.weights) + self.trees.sums(x)
        # A kernel a few times larger than all that were timed still grows as the power law says.
        return np.asarray(np.exp(np.clip(logs, self.lowest - 1.0, self.highest + 3.0)))


@dataclass(frozen=True, slots=True)
class Errors:
    """Relative errors on networks that the fit has not seen, by default left out of it in turn."""

    networks: int
    median: float
    p90: float
    rank_correlation: float
    judged_on: str = ""  # what else they are of

    @property
    def words(self) -> str:
        """For the `how` of a figure."""
        judged = self.judged_on or f"cross-validated on {self.networks} networks"
        return f"{judged}: median error {self.median:.1%}, 90 % within {self.p90:.1%}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictor:
    """What a calibration found. `regressors` has one for each kind, and "*" for all others."""

    device: Device
    errors: Errors
    floor_us: float  # of one run, whatever it runs
    each_us: float  # of starting a kernel, where the regressors' times are without
    regressors: Mapping[str, Regressor]
    energy: EnergyModel | None = None  # what a run adds to idle power
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        if "*" not in self.regressors or not all(
            0 <= us < math.inf for us in (self.floor_us, self.each_us)
        ):
            raise ValueError("a regressor for other kinds, and times that make sense")

    def milliseconds(self, kernels: Sequence[Kernel]) -> float:
        """The predicted time of one run."""
        return (self.floor_us + float(self.microseconds(kernels).sum())) / 1e3

    def microseconds(self, kernels: Sequence[Kernel]) -> Array:
        """The predicted time of each kernel, [kernels]."""
        x, times = matrix(kernels), np.zeros(len(kernels))
        for kind, rows in by_kind(kernels).items():
            times[rows] = self.each_us + self._regressor(kind).microseconds(x[rows])
        return times

    def figure(self, kernels: Sequence[Kernel]) -> Figure:
        """The predicted latency with its error, as a modelled figure."""
        unknown = sorted({k.kind for k in kernels} - set(self.regressors))
        beyond = f"; no {', '.join(unknown)} among the kernels it knows" if unknown else ""
        engine = f"{self.device.engine} {self.device.engine_version}"
        return Figure(
            value=self.milliseconds(kernels),
            evidence="modelled",
            how=f"predicted for {engine} from {len(kernels)} kernels, {self.errors.words}{beyond}",
            device=self.device.cpu,
        )

    def energy_figure(self, kernels: Sequence[Kernel]) -> Figure:
        """The predicted energy in mJ, idle power subtracted, with its error.

        Unknown where no counter told any, or none of work of such a kind or size.
        """
        why = "no energy counter answered when this device was calibrated"
        if self.energy is not None:
            try:
                return self.energy.predict(work_of(kernels, self.milliseconds(kernels)))
            except UsageError as e:
                why = e.what
        return Figure(value=None, evidence="unknown", how=why, device=self.device.cpu)

    def check(self, device: Device) -> None:
        """Refuse to speak about another device, engine or version.

        Raises:
            TargetError: EB652, with what differs.
        """
        if device == self.device:
            return
        ours, theirs = codec.encode(Device, device), codec.encode(Device, self.device)
        differ = ", ".join(f"{k} {theirs[k]}, here {ours[k]}" for k in ours if ours[k] != theirs[k])
        raise TargetError(
            "EB652",
            f"the predictor belongs to another device or engine: {differ}",
            hint="run `edgebudget calibrate` here",
        )

    def _regressor(self, kind: str) -> Regressor:
        """Of the kind, or of the nearest one by its name, from "Conv.nchwc.dw" up to "*"."""
        while kind not in self.regressors and "." in kind:
            kind = kind.rpartition(".")[0]
        return self.regressors.get(kind, self.regressors["*"])

    def encode(self) -> bytes:
        """Canonical JSON: equal predictors give equal bytes."""
        plain = codec.encode(Predictor, self)
        return (json.dumps(plain, sort_keys=True, separators=(",", ":")) + "\n").encode("ascii")

    @staticmethod
    def decode(data: bytes) -> Predictor:
        """Read a predictor; anything unexpected is refused.

        Raises:
            ArtifactError: EB585 it is not a predictor of this schema.
        """
        if len(data) > _MOST_BYTES:
            raise _damaged(f"is larger than {_MOST_BYTES // 1_000_000} MB")
        try:
            raw = json.loads(data.decode("utf-8"))
        except (ValueError, RecursionError) as e:
            raise _damaged(f"is not JSON: {type(e).__name__}") from None
        if not isinstance(raw, dict) or raw.get("schema") != SCHEMA:
            raise _damaged(f"is not of schema {SCHEMA}")
        try:
            found: Predictor = codec.decode(Predictor, raw)
        except ArtifactError as e:
            raise _damaged(f"does not read as one{e.what.removeprefix('manifest.json')}") from None
        return found

    def save(self, file: Path) -> None:
        """Write it whole or not at all."""
        file.parent.mkdir(parents=True, exist_ok=True)
        aside = file.with_name(f".{file.name}.part")
        aside.write_bytes(self.encode())
        aside.replace(file)


def _damaged(why: str) -> ArtifactError:
    return ArtifactError(
        "EB585", f"the predictor {why}", hint="run `edgebudget calibrate`, or get the file again"
    )


@cache
def read(file: Path) -> Predictor:
    """One file, read once in a process.

    Raises:
        ArtifactError: EB585 it is not a predictor of this schema, or cannot be read.
    """
    try:
        return Predictor.decode(file.read_bytes())
    except OSError as e:
        raise _damaged(f"{file.name} cannot be read: {e.strerror}") from e
