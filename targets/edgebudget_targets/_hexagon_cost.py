"""What a network costs a Hexagon NPU, from a model fitted on the vendor's own estimates.

On this NPU narrow channels cost as much as 32, and a layer's start and the graph's edges as much
as its arithmetic, so that MACs alone mislead: the model is linear in what `_hexagon_kernels`
finds, with weights of zero or more, after the kernel sums of "nn-Meter: Towards Accurate Latency
Prediction of Deep-Learning Model Inference on Diverse Edge Devices" (2021).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgebudget_runtime.errors import TargetError, UnsupportedError
from edgebudget_targets._hexagon_micro import SUITE

if TYPE_CHECKING:
    import onnx

    from edgebudget.workload import Array

FILE = Path(__file__).with_name("hexagon_cost.json")
_FOLDS = 5
_ROUNDS = 6  # of reweighting, so that no odd network bends the whole model


@dataclass(frozen=True, slots=True)
class Fit:
    """Weights (us per feature) for one SoC, and how far off they were on networks not fitted.

    `median_error` and `p90_error` are relative; `rank` is Spearman's correlation.
    """

    weights: Mapping[str, float]
    known: tuple[str, ...]  # features that some network of the suite had
    count: int  # networks
    median_error: float
    p90_error: float
    rank: float

    def us(self, features: Mapping[str, float]) -> float:
        """Predicted time in us.

        Raises:
            UnsupportedError: EB247, the network has kernels that no fitted network had.
        """
        strange = sorted({k.partition("_")[0] for k in features if k not in self.known})
        if strange:
            raise UnsupportedError(
                "EB247",
                f"the NPU cost model knows nothing of {', '.join(strange)} kernels",
                hint="compile for a SoC whose compiler prints an estimate: "
                "npu:hexagon/sa8255 or npu:hexagon/sar2230p",
            )
        return sum(self.weights.get(k, 0.0) * v for k, v in features.items())


@dataclass(frozen=True, slots=True)
class CostModel:
    """Fits by SoC, of one version of the vendor's compiler."""

    version: str
    fits: Mapping[str, Fit]

    @classmethod
    def load(cls, version: str, file: Path = FILE) -> CostModel:
        """Read fitted weights, for the engine that is installed.

        Raises:
            TargetError: EB620, they are of another version or cannot be read.
        """
        try:
            stored: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            fits = {
                name: Fit(**{**fit, "known": tuple(fit["known"])})
                for name, fit in stored["fits"].items()
            }
            model, suite = cls(str(stored["version"]), fits), int(stored["suite"])
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise TargetError(
                "EB620",
                f"the NPU cost model {file.name} cannot be read: {type(e).__name__}",
                hint="install edgebudget again, or fit it: python -m benchmarks.hexagon_cost",
            ) from e
        if (model.version, suite) != (version, SUITE):
            raise TargetError(
                "EB620",
                f"the NPU cost model was fitted on onnxruntime-qnn {model.version}, "
                f"{version or 'none'} is installed",
                hint=f'pip install "onnxruntime-qnn=={model.version}", or fit it anew: '
                "python -m benchmarks.hexagon_cost",
            )
        return model

    def save(self, file: Path = FILE) -> None:
        """Write it aside, then rename it."""
        fits = {name: asdict(fit) for name, fit in self.fits.items()}
        content = {"version": self.version, "suite": SUITE, "fits": fits}
        aside = file.with_name(f".{file.name}.part")
        aside.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        aside.replace(file)


def predict_us(fit: Fit, model: onnx.ModelProto) -> float:
    """Predicted time of a network in us, for 8-bit activations; it may still be float.

    Raises:
        UnsupportedError: EB247 a kernel was never fitted, EB211 or EB212 a shape is not known.
    """
    from edgebudget_targets._hexagon_kernels import features

    return fit.us(features(model))


def fit(rows: Sequence[Mapping[str, float]], us: Sequence[float], seed: int = 0) -> Fit:
    """Fit weights on networks' features and estimates; errors are of five-fold cross-validation."""
    names = tuple(sorted({k for row in rows for k in row}))
    x = np.array([[row.get(k, 0.0) for k in names] for row in rows])
    y = np.asarray(us, dtype=np.float64)
    fold = np.random.default_rng(seed).permutation(len(y)) % _FOLDS
    guess = np.zeros(len(y))
    for k in range(_FOLDS):
        guess[fold == k] = x[fold == k] @ _weights(x[fold != k], y[fold != k])
    error = np.abs(guess / y - 1)
    weights = {k: float(f"{w:.6g}") for k, w in zip(names, _weights(x, y), strict=True) if w > 0}
    rank = float(np.corrcoef(_ranks(guess), _ranks(y))[0, 1])
    return Fit(
        weights,
        names,
        len(y),
        round(float(np.median(error)), 4),
        round(float(np.quantile(error, 0.9)), 4),
        round(rank, 4),
    )


def _weights(x: Array, y: Array) -> Array:
    """Non-negative weights of least relative error, far outliers counting less."""
    from scipy.optimize import nnls

    scale = np.maximum(x.max(0), 1e-12)
    trust = np.ones(len(y))
    for _ in range(_ROUNDS):
        found, _ = nnls((x / scale) * (trust / y)[:, None], trust, maxiter=100 * x.shape[1])
        error = np.abs((x / scale) @ found / y - 1)
        trust = np.maximum(error, 0.1) ** -0.25
    return np.asarray(found / scale)


def _ranks(values: Array) -> Array:
    return np.argsort(np.argsort(values))
