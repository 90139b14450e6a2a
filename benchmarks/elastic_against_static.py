"""One elastic artifact beside networks that were pruned and fine-tuned for one budget each.

The rivals are `inputs/pruned-*m.onnx`: the static ResNet-56 of `elastic_resnet56`, pruned to a
bound by `prune_channels`, then trained on the same numbered views as the elastic network, taught
by its last answer: 53, 84, 86, 56 and 62 epochs at rate 0.05, smallest first, where the elastic
network had 172 with four wide teachers. Both sides are quantized by the same pass on pictures
kept back, and scored as int8 on the test pictures. A budget is a mean of MACs over the inputs,
which the elastic artifact keeps by thresholds solved on pictures kept back; the best path for
budgets that hold for every input stands beside it.

    python -m benchmarks.elastic_against_static --artifact DIR
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from benchmarks._elastic import elastic_artifact
from benchmarks._quantizing import CPU, context
from benchmarks.harness import data_folder, save
from edgebudget.counter import count
from edgebudget.program import Program, TensorSpec
from edgebudget.session import CpuSession
from edgebudget.workload import Sample
from edgebudget_passes import clean_graph, quantize_int8
from edgebudget_runtime.manifest import Manifest

_INPUTS = Path(__file__).parent / "inputs"
# MACs. Set before any rival was trained, but for the smallest: 25 million, which no pruning of
# ResNet-56 to the CPU's channel multiple reaches.
_BUDGETS = (27e6, 35e6, 45e6, 63e6, 90e6)
_LOSS = 0.005  # of top-1
_BYTES = 1.3  # times the largest path's
_CALIBRATION = 512


class Pictures:
    """A zoo split as a data set."""

    def __init__(self, source: Any, most: int | None = None) -> None:
        self.name = str(source.name)
        self._source = source
        chosen = np.random.default_rng(0).permutation(len(source))[:most]
        self._rows = sorted(int(i) for i in chosen)

    def __len__(self) -> int:
        return len(self._rows)

    def sample(self, index: int) -> Sample:
        return Sample(*self._source.sample(self._rows[index]))

    def digest(self) -> str:
        return f"{self._source.digest()}/{len(self)}"


def main(arguments: list[str]) -> int:
    """Score every rival, and hold the artifact's own figures against them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.elastic_against_static")
    parser.add_argument("--artifact", type=Path, default=None)
    artifact = elastic_artifact(parser.parse_args(arguments).artifact)
    if artifact is None:
        return 0
    manifest = Manifest.load(artifact)
    rows = [_row(manifest, budget) for budget in _BUDGETS]
    total, largest = _bytes(manifest)
    checks = {
        "within 0.5 points of the network made for the budget, at each of five": all(
            r["elastic_top1"] >= r["static_top1"] - _LOSS for r in rows
        ),
        "all bytes at most 1.3 times the largest path's": total <= _BYTES * largest,
    }
    save(
        "elastic_against_static",
        {"rows": rows, "total_bytes": total, "largest_path_bytes": largest, "ok": checks},
    )
    for row in rows:
        sys.stderr.write(f"{row}\n")
    for text, ok in checks.items():
        sys.stderr.write(f"{'ok  ' if ok else 'MISS'} {text}\n")
    return 0 if all(checks.values()) else 1


def _row(manifest: Manifest, budget: float) -> dict[str, Any]:
    """Top-1 in int8 of the rival for this budget, and of the best that the artifact has for it."""
    static = _static(_INPUTS / f"pruned-{budget / 1e6:.0f}m.onnx")
    points = [
        (p.quality.value, p.mean_cost.macs.value or 0.0, p.id)
        for p in manifest.operating_points
        if p.quality is not None and (p.mean_cost.macs.value or 0.0) <= budget
    ]
    paths = [
        (s.quality.value, s.cost.macs.value or 0.0, s.id)
        for s in manifest.subnetworks
        if s.quality is not None and (s.cost.macs.value or 0.0) <= budget
    ]
    top1, macs, chosen = max([*points, *paths])
    path = max(paths)
    return {
        "budget_macs": budget,
        **static,
        "elastic_top1": top1,
        "elastic_mean_macs": macs,
        "chosen": chosen,
        "worst_case_top1": path[0],
        "worst_case_macs": path[1],
    }


def _static(file: Path) -> dict[str, float]:
    """Top-1 in float and int8 of one rival."""
    from edgebudget_models.cifar10_resnet56_elastic import ENTRY

    root = data_folder() / "cifar10"
    kept_back = Pictures(ENTRY.data("calibration", root), _CALIBRATION)
    test = Pictures(ENTRY.data("evaluation", root))
    inputs = (TensorSpec("image", (1, 3, 32, 32)),)
    program = Program("graph", onnx.load(file), inputs, ("scores",))
    clean = clean_graph.run(program, clean_graph.PASS.config(), context(kept_back, CPU)).program
    small = quantize_int8.run(clean, quantize_int8.Config(), context(kept_back, CPU)).program
    found = {}
    for name, model in (("static_float_top1", clean.body), ("static_top1", small.body)):
        session = CpuSession(model.SerializeToString(), threads=1, exact=False)
        right = []
        for i in range(len(test)):
            sample = test.sample(i)
            assert sample.target is not None
            (scores,) = session.run({"image": sample.inputs["image"][None]}).values()
            right.append(int(scores.argmax()) == int(sample.target))
        found[name] = float(np.mean(right))
    return {**found, "static_macs": count(clean).macs}


def _bytes(manifest: Manifest) -> tuple[int, int]:
    """Bytes of all files, and of those that the largest path needs."""

    def files(ids: tuple[str, ...]) -> int:
        segments = [s for s in manifest.segments if s.id in ids]
        found = {s.file: s.bytes for s in segments}
        found |= {x.file: x.bytes for s in segments for x in s.extra}
        return sum(found.values())

    largest = max(files(s.path) for s in manifest.subnetworks)
    return files(tuple(s.id for s in manifest.segments)), largest


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
