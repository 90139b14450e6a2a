"""Elastic ResNet-56 beside the static one trained the same way, and beside a cascade.

Accuracy: the operating points of the exported integer artifact on the test pictures, against the
float ResNet-56 whose weights lie in `inputs/` (same teacher, pictures and epochs, no exits).
Cascade: the int8 ResNet-20 and ResNet-56 of the zoo, joined by `edgebudget cascade`.
Latency: batch 1, one thread, the elastic runner at an operating point and the static int8 network
in the same runner, on the same pictures, twenty by one and twenty by the other. An app holds one
network: with a turn at every picture (told beside it) each finds its weights pushed out of the
processor's caches by the other's, which costs the shorter runs more.

    python -m benchmarks.elastic_resnet56 --artifact DIR
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._elastic import elastic_artifact
from benchmarks.harness import data_folder, save
from edgebudget_runtime.manifest import Manifest, OperatingPoint
from edgebudget_runtime.runner import Runner

_STATIC = Path(__file__).parent / "inputs" / "static-resnet56.safetensors"
_SHARE, _LOSS = 0.40, 0.003  # of the static network's MACs; of top-1
_GAIN = 0.8  # of the gain in MACs that must be seen in latency
_PICTURES = 400
_BLOCK = 20  # pictures that a network answers in a row


def main(arguments: list[str]) -> int:
    """Compile what is missing, read figures from the manifests, and time."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.elastic_resnet56")
    parser.add_argument("--artifact", type=Path, default=None)
    artifact = elastic_artifact(parser.parse_args(arguments).artifact)
    if artifact is None:
        return 0
    root = data_folder() / "cifar10"
    manifest = Manifest.load(artifact)
    with tempfile.TemporaryDirectory(prefix="edgebudget-") as name:
        folder = Path(name)
        static = _compiled(folder / "static", "cifar10-resnet56", root, "--weights", str(_STATIC))
        whole = Manifest.load(static)
        macs, top1 = _macs(whole), whole.subnetworks[0].original_quality
        assert top1 is not None, "the pictures have labels"
        points = [p for p in manifest.operating_points if p.quality is not None]
        fitting = [p for p in points if (p.mean_cost.macs.value or 0) <= _SHARE * macs]
        best = max(fitting, key=lambda p: p.quality.value if p.quality else 0.0)
        joined = _cascade(folder, root)
        times = _times(artifact, best.id, static, root, _BLOCK)
        by_turns = _times(artifact, best.id, static, root, 1)
    rows = _beside(points, joined)
    mean_macs = best.mean_cost.macs.value or 0.0
    mac_gain, gain = macs / mean_macs, times["static_ms"] / times["elastic_ms"]
    assert best.quality is not None
    checks = {
        "top-1 of the static float network - 0.3 points at 40 % of its MACs": (
            best.quality.value >= top1.value - _LOSS
        ),
        "better than the cascade at every mean budget": all(r["better"] for r in rows),
        "latency gain at least 80 % of the MACs gain": gain >= _GAIN * mac_gain,
    }
    result = {
        "static_float_top1": top1.value,
        "static_macs": macs,
        "point": best.id,
        "point_top1": best.quality.value,
        "point_interval": [best.quality.low, best.quality.high],
        "point_macs": mean_macs,
        "points": [_plain(p) for p in points],
        "beside_cascade": rows,
        **times,
        "mac_gain": mac_gain,
        "latency_gain": gain,
        "latency_gain_at_every_turn": by_turns["static_ms"] / by_turns["elastic_ms"],
        "ok": checks,
    }
    save("elastic_resnet56", result)
    for text, ok in checks.items():
        sys.stderr.write(f"{'ok  ' if ok else 'MISS'} {text}\n")
    return 0 if all(checks.values()) else 1


def _compiled(out: Path, model: str, root: Path, *more: str) -> Path:
    command = [str(Path(sys.executable).parent / "edgebudget"), "compile", model, *more]
    command += ["--data", f"imagefolder:{root}", "--target", "cpu", "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True)
    return out


def _cascade(folder: Path, root: Path) -> Manifest:
    """ResNet-20 and ResNet-56 of the zoo; half of the test pictures solve the thresholds.

    Both have seen the calibration pictures in training, on which they are too sure.
    """
    small = _compiled(folder / "small", "cifar10-resnet20", root)
    large = _compiled(folder / "large", "cifar10-resnet56", root)
    command = [str(Path(sys.executable).parent / "edgebudget"), "cascade", str(small), str(large)]
    command += ["--data", f"imagefolder:{root}", "--held-back", "50%"]
    subprocess.run([*command, "--out", str(folder / "both")], check=True, capture_output=True)
    return Manifest.load(folder / "both")


def _beside(points: list[OperatingPoint], cascade: Manifest) -> list[dict[str, Any]]:
    """For every setting of the cascade, the best elastic point that costs no more."""
    rows = []
    for theirs in cascade.operating_points:
        if theirs.quality is None:
            continue
        bound = theirs.mean_cost.macs.value or 0.0
        ours = [p for p in points if (p.mean_cost.macs.value or 0.0) <= bound]
        top1 = max((p.quality.value for p in ours if p.quality is not None), default=0.0)
        rows.append(
            {
                "mean_macs": bound,
                "cascade_top1": theirs.quality.value,
                "elastic_top1": top1,
                "better": top1 > theirs.quality.value,
            }
        )
    return rows


def _times(elastic: Path, point: str, static: Path, root: Path, block: int) -> dict[str, float]:
    """Mean milliseconds of an input for both: an elastic network's cost is a mean over inputs."""
    from edgebudget_models.cifar10_resnet56 import ENTRY

    data = ENTRY.data("evaluation", root)
    chosen = np.random.default_rng(0).permutation(len(data))[:_PICTURES]
    pictures = [data.sample(int(i))[0]["image"][None] for i in chosen]
    rounds: list[tuple[float, float]] = []
    ran = 0
    with Runner(elastic, threads=1, profile=False) as ours, Runner(static, threads=1) as theirs:
        for turn in range(6):  # the first one warms up
            mine = other = 0.0
            for k in range(0, len(pictures), block):
                some = pictures[k : k + block]
                start = time.perf_counter()
                for x in some:
                    ran += len(ours.run({"image": x}, policy=f"point:{point}").ran)
                middle = time.perf_counter()
                for x in some:
                    theirs.run({"image": x})
                mine, other = mine + middle - start, other + time.perf_counter() - middle
            if turn:
                rounds.append((mine, other))
            else:
                ran = 0
    scale = 1e3 / len(pictures)
    return {
        "elastic_ms": scale * statistics.median(r[0] for r in rounds),
        "static_ms": scale * statistics.median(r[1] for r in rounds),
        "pictures": len(pictures),
        "rounds": len(rounds),
        "segments_a_picture": ran / (len(rounds) * len(pictures)),
    }


def _macs(manifest: Manifest) -> float:
    return manifest.subnetworks[0].cost.macs.value or 0.0


def _plain(point: OperatingPoint) -> dict[str, Any]:
    quality = point.quality
    return {
        "id": point.id,
        "mean_macs": point.mean_cost.macs.value,
        "top1": None if quality is None else quality.value,
        "shares": dict(point.shares),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
