"""Post-training int8 on CIFAR-10 ResNets: ours beside ONNX Runtime's and ExecuTorch's recipes.

All see the same 512 training pictures and are scored on the same test pictures. Ours appears
twice: as it comes (it may fit the ten class biases to the calibration labels), and label-free.
ExecuTorch is not a dependency; without it its row says so.

    python -m benchmarks.ptq_cifar --data DIR --weights DIR
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from benchmarks._executorch import xnnpack
from benchmarks._quantizing import CPU, context, in_random_order, quantize_static
from benchmarks.harness import ROOT, data_folder, save
from edgebudget.export import to_graph
from edgebudget.load_model import load_model
from edgebudget.session import CpuSession
from edgebudget.workload import Array, Sample
from edgebudget_passes import clean_graph, quantize_int8
from edgebudget_passes.quantize_int8 import Config

_CALIBRATION = 512
_SEED = 0
_TOLERANCE = 0.1  # points of top-1
_INSTANCES = 4
_SLOWER = 1.05
_EXTRA_S = 20.0


class Drawn:
    """A seeded draw of a zoo split, decoded once."""

    def __init__(self, source: Any, count: int, name: str) -> None:
        self.name = name
        drawn = np.random.default_rng(_SEED).permutation(len(source))[:count]
        self._samples = [Sample(*source.sample(int(i))) for i in sorted(drawn)]

    def __len__(self) -> int:
        return len(self._samples)

    def sample(self, index: int) -> Sample:
        return self._samples[index]

    def digest(self) -> str:
        return f"{self.name}/{len(self)}"


def main(arguments: list[str]) -> int:
    """Quantize both networks every way, score and time them."""
    options = _options(arguments)
    root = options.data or data_folder() / "cifar10"
    if not (root / "test").is_dir():
        sys.stderr.write(f"skipped: no CIFAR-10 folder at {root} (give --data)\n")
        return 0
    result, ok = {}, {}
    for depth in (20, 56):
        name = f"cifar10-resnet{depth}"
        found = _network(name, options, root)
        result[name] = found
        ok.update({f"{name}: {k}": v for k, v in _checks(found["rows"]).items()})
    save("ptq_cifar", {**result, "ok": ok, "threads": options.threads, "calibration": _CALIBRATION})
    for text, good in ok.items():
        sys.stderr.write(f"{'ok  ' if good else 'MISS'} {text}\n")
    return 0 if all(ok.values()) else 1


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ptq_cifar", description=__doc__)
    parser.add_argument("--data", type=Path, default=None, help="cifar10 folder: {train,test}/...")
    parser.add_argument("--weights", type=Path, default=ROOT.parent / "shared/data/weights")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=200)
    return parser.parse_args(arguments)


def _network(name: str, options: argparse.Namespace, root: Path) -> dict[str, Any]:
    depth = name.removeprefix("cifar10-resnet")
    weights = options.weights / f"resnet{depth}-cifar10.safetensors"
    loaded = load_model(name, weights=weights if weights.exists() else None)
    train = Drawn(loaded.entry.data("train", root), _CALIBRATION, "train")
    test = Drawn(loaded.entry.data("evaluation", root), 5000, "test")
    exported = to_graph(loaded.program)
    clean = clean_graph.run(exported, clean_graph.PASS.config(), context(train, CPU)).program
    models: dict[str, onnx.ModelProto] = {"float": clean.body}
    seconds: dict[str, float] = {}
    for row, settings in (
        ("edgebudget", Config()),
        ("edgebudget, no labels", Config(label_bias="off")),
    ):
        start = time.perf_counter()
        done = quantize_int8.run(clean, settings, context(train, CPU))
        seconds[row], models[row] = time.perf_counter() - start, done.program.body
    with tempfile.TemporaryDirectory() as folder:
        for row, kind in (("ORT U8S8", "QUInt8"), ("ORT S8S8", "QInt8")):
            start = time.perf_counter()
            models[row] = quantize_static(clean.body, train, kind, Path(folder))
            seconds[row] = time.perf_counter() - start
    image = test.sample(0).inputs["image"][None]
    sessions = {
        k: CpuSession(m.SerializeToString(), threads=options.threads, exact=False)
        for k, m in models.items()
    }
    runs: dict[str, Callable[[Array], Array]] = {k: _scores(s) for k, s in sessions.items()}
    start = time.perf_counter()
    peer = xnnpack(loaded.program.body, train, options.threads)
    if callable(peer):
        runs["ExecuTorch XNNPACK"], seconds["ExecuTorch XNNPACK"] = (
            peer,
            time.perf_counter() - start,
        )
    times = in_random_order(_instances(models, runs, image, options.threads), options.rounds)
    answers = {k: _answers(r, test) for k, r in runs.items()}
    targets = [test.sample(i).target for i in range(len(test))]
    right = np.array([int(t) for t in targets if t is not None])
    rows: dict[str, Any] = {
        k: {**_top1(a, right, answers["float"]), **times[k], "quantize_s": seconds.get(k)}
        for k, a in answers.items()
    }
    for k, m in models.items():
        rows[k]["bytes"] = m.ByteSize()
    if isinstance(peer, str):
        rows["ExecuTorch XNNPACK"] = {"top1": None, "why": f"unknown: {peer}"}
    return {"weights": weights.name if weights.exists() else "packaged", "rows": rows}


def _scores(session: CpuSession) -> Callable[[Array], Array]:
    return lambda image: next(iter(session.run({session.inputs[0]: image}).values()))


def _bound(run: Callable[[Array], Array], image: Array) -> Callable[[], object]:
    return lambda: run(image)


def _instances(
    models: Mapping[str, onnx.ModelProto],
    runs: Mapping[str, Callable[[Array], Array]],
    image: Array,
    threads: int,
) -> dict[str, list[Callable[[], object]]]:
    """Each ONNX model loaded several times; ExecuTorch's once (its weights are packed once)."""
    loaded: dict[str, list[Callable[[], object]]] = {}
    for name, run in runs.items():
        loaded[name] = [_bound(run, image)]
        if name in models:
            blob = models[name].SerializeToString()
            more = (CpuSession(blob, threads=threads, exact=False) for _ in range(_INSTANCES - 1))
            loaded[name] += [_bound(_scores(s), image) for s in more]
    return loaded


def _answers(run: Callable[[Array], Array], test: Drawn) -> Array:
    """The class that a network answers for every test picture."""
    pictures = (test.sample(i).inputs["image"][None] for i in range(len(test)))
    return np.array([int(run(picture).argmax()) for picture in pictures])


def _top1(answers: Array, right: Array, whole: Array) -> dict[str, float]:
    """Top-1 in percent with its standard error, and how often the float network answers so too."""
    share = float((answers == right).mean())
    error = (share * (1 - share) / len(right)) ** 0.5
    return {
        "top1": 100 * share,
        "standard_error": 100 * error,
        "agrees_with_float": 100 * float((answers == whole).mean()),
        "pictures": len(right),
    }


def _checks(rows: Mapping[str, Any]) -> dict[str, bool]:
    ours = rows["edgebudget"]
    fastest = min(rows[k]["median_ms"] for k in ("ORT U8S8", "ORT S8S8"))
    checks = {
        "top-1 at least ORT U8S8 - 0.1": ours["top1"] >= rows["ORT U8S8"]["top1"] - _TOLERANCE,
        # Without labels nobody can know better than the float network: differences of top-1 are
        # then a draw of the few pictures on which they differ.
        "label-free answers agree with the float network's at least as often as ORT U8S8's": (
            rows["edgebudget, no labels"]["agrees_with_float"]
            >= rows["ORT U8S8"]["agrees_with_float"]
        ),
        "latency within 5 % of the fastest ORT recipe": ours["median_ms"] <= _SLOWER * fastest,
        "quantized within ORT's time + 20 s": (
            ours["quantize_s"] <= rows["ORT U8S8"]["quantize_s"] + _EXTRA_S
        ),
    }
    peer = rows["ExecuTorch XNNPACK"]["top1"]
    if peer is not None:
        checks["top-1 at least XNNPACK - 0.1"] = ours["top1"] >= peer - _TOLERANCE
    return checks


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
