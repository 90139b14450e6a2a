"""What layers cost a target as their widths change, where multiply-accumulates mislead.

An NPU computes whole blocks of channels: 17 channels take as long as 32, and a layer that moves
more than it computes gains nothing from losing channels. The sum is of kernels, after
"nn-Meter: Towards Accurate Latency Prediction of Deep-Learning Model Inference on Diverse Edge
Devices" (2021); here it only has to tell which channels are worth removing: drafts are then timed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal

from edgebudget_runtime.errors import TargetError

LayerKind = Literal["conv", "point", "depthwise"]  # point: 1x1 convolutions, matrix products
KINDS: tuple[LayerKind, ...] = ("conv", "point", "depthwise")


@dataclass(frozen=True, slots=True)
class Price:
    """Microseconds of one unit of each work of a kind of layer; zero or more."""

    work: float  # a position, a tap and a pair of channel blocks (depthwise: one block)
    weights: float  # one weight
    written: float  # a position and a block of output channels
    each: float  # the layer itself

    def us(self, amounts: tuple[float, float, float, float]) -> float:
        """Time of a layer with these amounts of the four kinds of work."""
        work, weights, written, each = amounts
        return self.work * work + self.weights * weights + self.written * written + self.each * each


@dataclass(frozen=True, slots=True)
class LayerTime:
    """A price for every kind of layer, on one device; `error` is the median relative one."""

    block: int  # channels computed at once
    prices: Mapping[str, Price]
    error: float
    layers: int  # that were fitted
    source: str  # what told their times

    def us(self, kind: LayerKind, positions: int, taps: int, outputs: int, inputs: int) -> float:
        """Modelled time of a layer. `inputs` are those of one output: 1 for depthwise layers."""
        return self.prices[kind].us(amounts(self.block, kind, positions, taps, outputs, inputs))

    @staticmethod
    def read(file: str, device: str) -> LayerTime:
        """Of one device, from a file of fits in `edgebudget_targets`.

        Raises:
            TargetError: EB620, the file cannot be read.
        """
        try:
            text = files("edgebudget_targets").joinpath(file).read_text(encoding="utf-8")
            stored: dict[str, Any] = json.loads(text)
            fit = stored["fits"][device]
            prices = {k: Price(**v) for k, v in fit["prices"].items()}
            return LayerTime(
                int(stored["block"]),
                {k: prices[k] for k in KINDS},
                float(fit["error"]),
                int(fit["layers"]),
                str(stored["source"]),
            )
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise TargetError(
                "EB620",
                f"layer times of {device} in {file} cannot be read: {type(e).__name__}",
                hint="install edgebudget again, or fit them: python -m benchmarks.layer_times",
            ) from e


def amounts(
    block: int, kind: LayerKind, positions: int, taps: int, outputs: int, inputs: int
) -> tuple[float, float, float, float]:
    """Work, weights, writing and one: what the four prices are of."""
    if not outputs or not inputs:
        return 0.0, 0.0, 0.0, 0.0
    out = -(-outputs // block)
    pairs = out if kind == "depthwise" else out * -(-inputs // block)
    weights = taps * outputs * inputs
    return float(positions * taps * pairs), float(weights), float(positions * out), 1.0
