"""Fit what layers cost an Ethos-U as their widths change, on Vela's cycles of single layers.

Resumable: cycles are kept in `build/layer_times/`. Writes `ethos_u_layers.json` beside the target,
which plans for a latency are made with. Errors are of layers that were left out of the fit.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls

from benchmarks.harness import ROOT, save
from edgebudget import target_registry
from edgebudget.layer_time import KINDS, LayerKind, amounts
from edgebudget.program import Program, TensorSpec
from edgebudget_targets._hexagon_micro import Micro
from edgebudget_targets.ethos_u import EthosUTarget

FILE = ROOT / "targets" / "edgebudget_targets" / "ethos_u_layers.json"
_BLOCK = 16
_SIZES = (4, 7, 8, 8, 14, 16, 16, 28, 32, 32, 56, 64)
_WIDTHS = (8, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 144, 192, 256, 320)
_LAYERS = 14  # of one network
_LARGEST = 4e8  # multiply-accumulates of one layer
_FOLDS = 5
_ROUNDS = 6  # of reweighting, so that no odd layer bends the whole fit

# Kind, positions, taps, outputs, inputs of one output.
Shape = tuple[LayerKind, int, int, int, int]


def main(arguments: list[str]) -> int:
    """Ask Vela, fit, and save."""
    names = [n for n in target_registry.names() if n.startswith("npu:ethos-u")]
    targets: dict[str, EthosUTarget] = {}
    for name in names:
        target = target_registry.get(name)
        assert isinstance(target, EthosUTarget)
        targets[target.spec.options["accelerator"].removeprefix("ethos-")] = target
    state = next(iter(targets.values())).available()
    if not state.ok:
        sys.stderr.write(f"skipped: {state.why}; {state.install}\n")
        return 0
    shapes, us = _observations(targets)
    fits = {device: _fit(shapes, us[device]) for device in sorted(us)}
    source = f"Vela {version('ethos-u-vela')}'s cycles (simulated)"
    content = {"block": _BLOCK, "source": source, "fits": fits}
    FILE.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    save("layer_times", {"layers": len(shapes), **content})
    for device, fit in fits.items():
        sys.stderr.write(f"{device}: median error {fit['error']:.3f}, 90 % {fit['p90']:.3f}\n")
    return 0


def _networks() -> Iterator[tuple[Micro, list[Shape]]]:
    """Chains of layers of every kind, one picture size each; strides and odd widths among them."""
    dice = random.Random(0)
    for size in _SIZES:
        net = Micro((3, size, size))
        shapes: list[Shape] = []
        while len(shapes) < _LAYERS:
            kernel, depthwise = dice.choice((1, 1, 3, 3, 5)), dice.random() < 0.25
            kernel = max(kernel, 3) if depthwise else kernel
            stride = 2 if dice.random() < 0.05 and net.h > 4 else 1
            out = net.c if depthwise else dice.choice(_WIDTHS)
            positions = ((net.h - 1) // stride + 1) ** 2
            inputs, taps = (1 if depthwise else net.c), kernel * kernel
            if positions * taps * out * inputs > _LARGEST or (depthwise and net.c < 8):
                continue
            kind: LayerKind = "depthwise" if depthwise else "conv" if taps > 1 else "point"
            shapes.append((kind, positions, taps, out, inputs))
            net.conv(out, kernel, stride, depthwise=depthwise)
        # Something small at the edge, where Vela adds the caller's order of channels.
        yield net.pool("GlobalAveragePool").linear(10), shapes


def _observations(targets: dict[str, EthosUTarget]) -> tuple[list[Shape], dict[str, list[float]]]:
    """Layers, and for every device the microseconds of each."""
    kept = ROOT / "build" / "layer_times" / f"{version('ethos-u-vela')}.json"
    kept.parent.mkdir(parents=True, exist_ok=True)
    known: dict[str, dict[str, list[float]]] = json.loads(kept.read_text()) if kept.exists() else {}
    shapes: list[Shape] = []
    us: dict[str, list[float]] = {device: [] for device in targets}
    for number, (net, layers) in enumerate(_networks()):
        key = json.dumps(layers)
        if key not in known:
            sys.stderr.write(f"network {number + 1} of {len(_SIZES)}\n")
            known[key] = _ask(net, layers, targets)
            kept.write_text(json.dumps(known))
        shapes += layers
        for device, values in known[key].items():
            us[device] += values
    return shapes, us


def _ask(
    net: Micro, layers: list[Shape], targets: dict[str, EthosUTarget]
) -> dict[str, list[float]]:
    specs = (TensorSpec("x", (1, *net.shape)),)
    program = Program("graph", net.model(), specs, ("y",))
    found: dict[str, list[float]] = {}
    files: dict[bool, Path] = {}  # the graph is lowered once for U55 and U65, once for U85
    with tempfile.TemporaryDirectory() as folder:
        for device, target in targets.items():
            newer = device.startswith("u85")
            if newer not in files:
                files[newer] = target.lower(program, Path(folder) / device, "net").file
            told = target.estimate(files[newer])
            rows = [x for x in told.layers if x.op.endswith("Conv2D")][: len(layers)]
            counted = [p * t * o * i for _, p, t, o, i in layers]
            if [round(x.macs) for x in rows] != counted:
                raise SystemExit(f"{device}: Vela lists other layers than were built")
            found[device] = [x.cycles / told.clock_hz * 1e6 for x in rows]
    return found


def _fit(shapes: list[Shape], us: list[float]) -> dict[str, Any]:
    """Prices of every kind; the error is that of layers left out, relative to their time."""
    prices: dict[str, Any] = {}
    errors: list[float] = []
    for kind in KINDS:
        here = [i for i, shape in enumerate(shapes) if shape[0] == kind]
        x = np.array([amounts(_BLOCK, *shapes[i]) for i in here])
        y = np.array([us[i] for i in here])
        fold = np.random.default_rng(0).permutation(len(y)) % _FOLDS
        for k in range(_FOLDS):
            guess = x[fold == k] @ _weights(x[fold != k], y[fold != k])
            errors += np.abs(guess / y[fold == k] - 1).tolist()
        names = ("work", "weights", "written", "each")
        prices[kind] = {n: float(f"{w:.6g}") for n, w in zip(names, _weights(x, y), strict=True)}
    return {
        "prices": prices,
        "layers": len(shapes),
        "error": round(float(np.median(errors)), 4),
        "p90": round(float(np.quantile(errors, 0.9)), 4),
    }


def _weights(x: Any, y: Any) -> Any:
    """Weights of zero or more and least relative error, far outliers counting less."""
    scale, trust = x.max(0), np.ones(len(y))
    for _ in range(_ROUNDS):
        found, _ = nnls((x / scale) * (trust / y)[:, None], trust)
        error = np.abs((x / scale) @ found / y - 1)
        trust = np.maximum(error, 0.1) ** -0.25
    return found / scale


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
