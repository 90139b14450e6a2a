"""`cifar10-resnet56` pruned to a MACs bound: ours against torch-pruning's global magnitude.

Both sides start from the same weights, refresh statistics on the same calibration pictures, and
train by the same pass with the same order of pictures, steps, schedule and loss. The last lines
say which had the better top-1. Needs CIFAR-10 as a folder (EDGEBUDGET_DATA/cifar10).

    python -m benchmarks.prune_resnet56 --epochs 1
    python -m benchmarks.prune_resnet56 --epochs 0.1 --train-limit 6400   # a quick look
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks._quantizing import CPU
from benchmarks._split import Evenly
from benchmarks.harness import data_folder, save
from edgebudget.batchnorm import refresh
from edgebudget.counter import count
from edgebudget.events import Event, Said
from edgebudget.program import Context, PassResult, Program, TensorSpec
from edgebudget.tasks import Classification
from edgebudget.train import Caller, load_tensors, outputs_over
from edgebudget.workload import Data
from edgebudget_models.checkpoint import load_into
from edgebudget_models.cifar10_resnet56 import ENTRY
from edgebudget_passes import prune_channels, recover
from edgebudget_runtime.budget import Budget, parse_count


def main(arguments: list[str]) -> int:
    """Run both sides and write the figures; 1 where ours is not the better after training."""
    options = _options(arguments)
    root = data_folder() / "cifar10"
    if not (root / "test").is_dir():
        sys.stderr.write(f"skipped: no CIFAR-10 folder at {root} (set EDGEBUDGET_DATA)\n")
        return 0
    torch.set_num_threads(options.threads)
    bound = int(parse_count(options.macs))
    body = ENTRY.load(None)
    if options.weights:
        body = load_into(ENTRY.build(), options.weights)
    program = Program("module", body.eval(), (TensorSpec("image", (1, 3, 32, 32)),), ("scores",))
    data = Data(
        Evenly(ENTRY.data("calibration", root)),
        Evenly(ENTRY.data("train", root), options.train_limit),
    )
    test = Evenly(ENTRY.data("evaluation", root), options.test_limit)
    judge = Judge(test)
    result: dict[str, Any] = {
        "threads": options.threads,
        "bound_macs": bound,
        "epochs": options.epochs,
        "train_pictures": len(data.train or ()),
        "test_pictures": len(test),
        "original": {"macs": count(program).macs, **judge(program)},
        "runs": [],
    }
    for seed in range(options.seeds):
        for side in (_ours, _magnitude):
            run = _one(side, program, data, judge, bound, options, seed)
            result["runs"].append(run)
            sys.stderr.write(f"{json.dumps(run)}\n")
    result["summary"] = _summary(result["runs"])
    better = result["summary"]["gain"] > 0
    if not (options.train_limit or options.test_limit):  # a quick look proves nothing
        save("prune_resnet56", {**result, "ok": {"better top-1 after training": better}})
    sys.stderr.write(f"{json.dumps(result['summary'], indent=1)}\n")
    sys.stderr.write(
        f"{'ok  ' if better else 'MISS'} better than global magnitude after training\n"
    )
    return 0 if better else 1


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.prune_resnet56", description=__doc__
    )
    parser.add_argument("--macs", default="63M")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--train-limit", type=int, default=0)
    parser.add_argument("--test-limit", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--weights", type=Path, default=None)
    parser.add_argument("--settings", default="", help="of recover: lr=0.05,schedule=rex,...")
    parser.add_argument("--pruning", default="", help="of prune_channels: candidates=1,...")
    return parser.parse_args(arguments)


class Judge:
    """Top-1 with a 95 % interval (Wilson) on the test pictures."""

    def __init__(self, test: Evenly) -> None:
        self.data = load_tensors(test, ["image"])

    def __call__(self, program: Program) -> dict[str, float]:
        scores = outputs_over(Caller.of(program), program.body, self.data, 250)[0]
        assert self.data.labels is not None
        n, right = len(self.data), float((scores.argmax(1) == self.data.labels).float().mean())
        z = 1.96
        centre = (right + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(right * (1 - right) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        return {"top1": right, "low": centre - half, "high": centre + half}


def _one(
    side: Any,
    program: Program,
    data: Data,
    judge: Judge,
    bound: int,
    options: argparse.Namespace,
    seed: int,
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        ctx = _context(program, data, seed, Path(folder))
        start = time.perf_counter()
        pruned = side(replace(program, body=copy.deepcopy(program.body)), ctx, bound, options)
        pruned_s = time.perf_counter() - start
        before = judge(pruned)
        start = time.perf_counter()
        settings = {"augment": "flip", "epochs": options.epochs, **_pairs(options.settings)}
        trained: PassResult = recover.run(pruned, recover.Config(**settings), ctx)
        return {
            "side": side.__name__.strip("_"),
            "seed": seed,
            "macs": count(trained.program).macs,
            "before_training": before,
            "after_training": judge(trained.program),
            "prune_s": round(pruned_s, 1),
            "train_s": round(time.perf_counter() - start, 1),
            "train": [n.what for n in (*trained.did, *trained.declined)][-1],
        }


def _ours(program: Program, ctx: Context, bound: int, options: argparse.Namespace) -> Program:
    config = prune_channels.Config(macs=bound, **_pairs(options.pruning))
    return prune_channels.run(program, config, ctx).program


def _magnitude(program: Program, ctx: Context, bound: int, _: argparse.Namespace) -> Program:
    """The largest network under the bound that torch-pruning's own pruner makes.

    Its tracing takes the padded shortcut for an addition, so the residual stream is left whole.
    """
    low, high, best = 0.0, 0.95, program
    for _step in range(9):
        ratio = (low + high) / 2
        trial = replace(program, body=_torch_pruning(program.body, ratio))
        if count(trial).macs <= bound:
            high, best = ratio, trial
        else:
            low = ratio
    assert ctx.data.calibration is not None
    samples = load_tensors(ctx.data.calibration, ["image"])
    refresh(best.body, (c.inputs for c in samples.batches(64)))
    return best


def _torch_pruning(body: nn.Module, ratio: float) -> nn.Module:
    import torch_pruning as tp

    trial = copy.deepcopy(body)
    for p in trial.parameters():
        p.requires_grad_(True)
    stream = [m for n, m in trial.named_modules() if n in ("conv1", "linear") or ".conv2" in n]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tp.pruner.MetaPruner(
            trial,
            torch.zeros(1, 3, 32, 32),
            importance=tp.importance.MagnitudeImportance(p=2),
            global_pruning=True,
            pruning_ratio=ratio,
            ignored_layers=stream,
        ).step()
    return trial.eval()


def _context(program: Program, data: Data, seed: int, folder: Path) -> Context:
    rng = np.random.default_rng(seed)
    return Context(Budget(), CPU, Classification(), data, program, seed, rng, folder, _listen)


def _listen(event: Event) -> None:
    if isinstance(event, Said):
        sys.stderr.write(f"{event.text}\n")


def _pairs(text: str) -> dict[str, Any]:
    pairs = (x.split("=") for x in text.split(",") if x)
    return {k: _number(v) for k, v in pairs}


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for side in ("ours", "magnitude"):
        for when in ("before_training", "after_training"):
            values = [r[when]["top1"] for r in runs if r["side"] == side]
            found[f"{side}_{when}"] = {
                "mean": sum(values) / len(values),
                "low": min(values),
                "high": max(values),
            }
    found["gain"] = found["ours_after_training"]["mean"] - found["magnitude_after_training"]["mean"]
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
