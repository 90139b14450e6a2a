"""A plan made for a latency beside the plan made for MACs alone, on an Ethos-U.

The first plan gets a bound on MACs; the second gets the first one's time over 1.2, and may use
what MACs it likes. Both are then trained for equally many steps and compiled. Time is Vela's
(simulated), quality that of the integer graph on the test pictures; equal is what is at most a
standard error below. Needs CIFAR-10 as a folder (EDGEBUDGET_DATA/cifar10); MobileNetV2 takes more
than an hour on two cores, so `make bench` leaves this one out.

    python -m benchmarks.latency_plan [--steps 600] [--models digits ...]
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.harness import data_folder, save
from edgebudget import compiler
from edgebudget.events import Event, Said
from edgebudget.plan import Plan
from edgebudget_runtime.budget import Budget
from edgebudget_runtime.manifest import Manifest

_PAIRS = (
    ("digits", "npu:ethos-u55-128", "250K"),
    ("mobilenet-v2", "npu:ethos-u55-128", "75M"),
)
_FASTER = 1.2


def main(arguments: list[str]) -> int:
    """Plan, train and compile each pair, and compare."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.latency_plan")
    parser.add_argument("--steps", type=int, default=600, help="training steps of every plan")
    parser.add_argument("--models", nargs="*", default=[m for m, _, _ in _PAIRS])
    options = parser.parse_args(arguments)
    root = data_folder() / "cifar10"
    rows: dict[str, Any] = {}
    checks: dict[str, bool] = {}
    for model, target, macs in _PAIRS:
        if model not in options.models:
            continue
        data = None if model == "digits" else f"imagefolder:{root}"
        if data and not (root / "test").is_dir():
            sys.stderr.write(f"{model} skipped: no CIFAR-10 folder at {root} (EDGEBUDGET_DATA)\n")
            continue
        # A limit that always holds makes the proof tell the time.
        by_macs = _compiled(model, target, data, options.steps, macs=macs, latency="10s")
        limit = f"{by_macs['ms'] / _FASTER:.6f}ms"
        by_time = _compiled(model, target, data, options.steps, latency=limit)
        faster, gap = by_macs["ms"] / by_time["ms"], by_time["top1"] - by_macs["top1"]
        share = by_macs["top1"]
        error = math.sqrt(share * (1 - share) / by_macs["pictures"])
        rows[f"{model} on {target}"] = {
            "by_macs": by_macs, "by_time": by_time, "times_faster": faster, "top1_gap": gap,
            "standard_error": error,
        }  # fmt: skip
        checks[f"{model}: at least {_FASTER} times faster"] = faster >= _FASTER
        checks[f"{model}: equal quality or better"] = gap >= -error
        save("latency_plan", {"steps": options.steps, "pairs": rows, "ok": checks})
    for text, ok in checks.items():
        sys.stderr.write(f"{'ok  ' if ok else 'MISS'} {text}\n")
    return 0 if all(checks.values()) else 1


def _compiled(
    model: str, target: str, data: str | None, steps: int, **limits: str
) -> dict[str, Any]:
    budget = Budget.parse(**limits)  # type: ignore[arg-type]
    proposal = compiler.propose(model, target=target, budget=budget, data=data, on_event=_listen)
    plan = _trained(proposal.plan, steps)
    with tempfile.TemporaryDirectory(prefix="edgebudget-") as folder:
        out = Path(folder) / "out"
        compiler.compile(
            model, target=target, budget=budget, data=data, plan=plan, out=out, on_event=_listen
        )
        manifest = Manifest.load(out)
    sub = manifest.subnetworks[0]
    assert sub.quality is not None
    assert sub.original_quality is not None
    assert sub.cost.latency_ms.value is not None
    return {
        "chosen": proposal.chosen,
        "ms": sub.cost.latency_ms.value,
        "macs": sub.cost.macs.value,
        "top1": sub.quality.value,
        "pictures": sub.quality.count,
        "top1_interval": [sub.quality.low, sub.quality.high],
        "original_top1": sub.original_quality.value,
    }


def _trained(plan: Plan, count: int) -> Plan:
    """The plan with `count` steps of training."""
    steps = tuple(
        dataclasses.replace(s, config=dataclasses.replace(s.config, steps=count))
        if s.name == "recover"
        else s
        for s in plan.steps
    )
    assert any(s.name == "recover" for s in steps), "both plans are trained"
    return dataclasses.replace(plan, steps=steps)


def _listen(event: Event) -> None:
    if isinstance(event, Said):
        sys.stderr.write(f"{event.text}\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
