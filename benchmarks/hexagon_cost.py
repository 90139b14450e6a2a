"""Fit the Hexagon cost model on the vendor compiler's estimates, and try it on whole networks.

Resumable: estimates are kept in `build/hexagon_cost/`, by engine version, SoC and network. Writes
`targets/edgebudget_targets/hexagon_cost.json`; the held-out networks are in no fit.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, save
from edgebudget import target_registry
from edgebudget_targets._hexagon_cost import CostModel, Fit, fit, predict_us
from edgebudget_targets._hexagon_kernels import features
from edgebudget_targets._hexagon_micro import SUITE, Micro, networks
from edgebudget_targets.onnxruntime_qnn import HexagonTarget

SOCS = ("sa8255", "sa8797", "sar2230p")
_MOBILE = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1),
           (6, 160, 3, 2), (6, 320, 1, 1))  # fmt: skip


def main(arguments: list[str]) -> int:
    """Fit, save, and compare with the compiler on networks that were not fitted."""
    targets = {soc: target_registry.get(f"npu:hexagon/{soc}") for soc in SOCS}
    state = next(iter(targets.values())).available()
    if not state.ok:
        sys.stderr.write(f"skipped: {state.why}; {state.install}\n")
        return 0
    kept = ROOT / "build" / "hexagon_cost" / f"{state.version}.jsonl"
    rows = {name: features(net.model()) for name, net in networks()}
    fits: dict[str, Fit] = {}
    for soc, target in targets.items():
        assert isinstance(target, HexagonTarget)
        us = _estimates(target, soc, networks(), kept)
        fits[soc] = fit([rows[n] for n in rows], [us[n] for n in rows])
    CostModel(state.version, fits).save()
    result: dict[str, Any] = {"engine_version": state.version, "suite": SUITE, "socs": {}}
    for soc, target in targets.items():
        assert isinstance(target, HexagonTarget)
        result["socs"][soc] = _held_out(target, soc, fits[soc], kept)
    save("hexagon_cost", result)
    return 0


def _held_out(target: HexagonTarget, soc: str, fitted: Fit, kept: Path) -> dict[str, Any]:
    us = _estimates(target, soc, _whole(), kept)
    guess = {name: predict_us(fitted, net.model()) for name, net in _whole()}
    error = {n: guess[n] / us[n] - 1 for n in us}
    by_true, by_guess = sorted(us, key=us.__getitem__), sorted(us, key=guess.__getitem__)
    gaps = [(by_true.index(n) - by_guess.index(n)) ** 2 for n in us]
    count = len(us)
    sizes = sorted(abs(e) for e in error.values())
    return {
        "fitted_on": fitted.count,
        "cross_validated": {"median": fitted.median_error, "p90": fitted.p90_error},
        "held_out": {
            "count": count,
            "median_error": statistics.median(sizes),
            "share_within_20_percent": sum(s <= 0.2 for s in sizes) / count,
            "rank_correlation": 1 - 6 * sum(gaps) / (count * (count**2 - 1)),
            "networks": {n: {"estimate_us": us[n], "model_us": round(guess[n], 1)} for n in us},
        },
    }


def _estimates(
    target: HexagonTarget, soc: str, nets: Iterator[tuple[str, Micro]], kept: Path
) -> dict[str, float]:
    """The compiler's estimate of each network with its default settings, in us."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    lines = kept.read_text().splitlines() if kept.exists() else []
    known = {(r["soc"], r["digest"]): r["us"] for r in map(json.loads, lines)}
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder, kept.open("a", encoding="utf-8") as log:
        file = Path(folder) / "network.onnx"
        for name, net in nets:
            content = net.model().SerializeToString(deterministic=True)
            digest = hashlib.sha256(content).hexdigest()
            if (soc, digest) not in known:
                file.write_bytes(content)
                us = known[soc, digest] = target.emulator.estimate(file)["us"]
                row = {"soc": soc, "name": name, "digest": digest, "us": us}
                log.write(json.dumps(row) + "\n")
                log.flush()
            found[name] = known[soc, digest]
    return found


def _whole() -> Iterator[tuple[str, Micro]]:
    """Well-known networks, at several widths and input sizes."""
    for width, size in ((0.35, 224), (0.5, 224), (0.75, 224), (1.0, 224), (1.4, 224), (1.0, 160),
                        (1.0, 128), (1.0, 96), (0.5, 160)):  # fmt: skip
        yield f"mobilenet-v2 {width} at {size}", _mobilenet(width, size)
    for depth, width in ((20, 16), (56, 16), (20, 32), (20, 8)):
        yield f"resnet-{depth} width {width} at 32, shortcuts", _resnet(depth, width)
    for width, size in ((64, 224), (32, 224), (64, 112)):
        yield f"resnet-18 width {width} at {size}, shortcuts", _resnet18(width, size)


def _mobilenet(width: float, size: int) -> Micro:
    """ "MobileNetV2: Inverted Residuals and Linear Bottlenecks" (2018)."""

    def scaled(c: float) -> int:
        return max(8, int(c * width + 4) // 8 * 8)

    net = Micro((3, size, size)).conv(scaled(32), 3, 2)
    for expand, out, count, first in _MOBILE:
        for i in range(count):
            start, stride, same = net.x, first if i == 0 else 1, net.c == scaled(out)
            if expand > 1:
                net.conv(net.c * expand, 1)
            net.conv(0, 3, stride, depthwise=True).conv(scaled(out), 1)
            if stride == 1 and same:
                net.add(start)
    return net.conv(max(1280, scaled(1280)), 1).pool("GlobalAveragePool").linear(1000)


def _resnet(depth: int, width: int) -> Micro:
    """The CIFAR networks of "Deep Residual Learning for Image Recognition" (2015)."""
    net = Micro((3, 32, 32)).conv(width)
    for stage in range(3):
        for i in range((depth - 2) // 6):
            _basic(net, width * 2**stage, 2 if stage and i == 0 else 1)
    return net.pool("GlobalAveragePool").linear(10)


def _resnet18(width: int, size: int) -> Micro:
    net = Micro((3, size, size)).conv(width, 7, 2).pool()
    for stage in range(4):
        for i in range(2):
            _basic(net, width * 2**stage, 2 if stage and i == 0 else 1)
    return net.pool("GlobalAveragePool").linear(1000)


def _basic(net: Micro, out: int, stride: int) -> None:
    start = (net.x, net.c, net.h, net.w)
    net.conv(out, 3, stride).conv(out)
    inside = net.x, net.c, net.h, net.w
    net.x, net.c, net.h, net.w = start
    if stride == 2:
        net.halve(out)
    side = net.x
    net.x, net.c, net.h, net.w = inside
    net.add(side)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
