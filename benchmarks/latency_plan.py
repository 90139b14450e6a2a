"""A plan made for a latency beside the plan made for MACs alone, on an Ethos-U.

Both are compiled whole, training and all. The first gets a bound on MACs; the second gets the
first one's time over 1.25, and may use what MACs it likes. Time is Vela's (simulated), quality
that of the integer graph on the 5,000 test pictures. Needs CIFAR-10 (EDGEBUDGET_DATA/cifar10).

    python -m benchmarks.latency_plan
"""

from __future__ import annotations

import sys
from typing import Any

from benchmarks.harness import Compiled, compiled_afresh, data_folder, save

_PAIRS = (
    ("cifar10-resnet20", "npu:ethos-u55-128", "20M"),
    ("cifar10-resnet56", "npu:ethos-u55-128", "63M"),
)
_ASKED, _WANTED = 1.25, 1.2
_EQUAL = 0.005  # of top-1, about one standard error of 5,000 pictures


def main(arguments: list[str]) -> int:
    """Compile each pair and compare."""
    root = data_folder() / "cifar10"
    if not (root / "test").is_dir():
        sys.stderr.write(f"skipped: no CIFAR-10 folder at {root} (set EDGEBUDGET_DATA)\n")
        return 0
    rows: dict[str, Any] = {}
    checks: dict[str, bool] = {}
    for model, target, macs in _PAIRS:
        common = (model, "--data", f"imagefolder:{root}", "--target", target)
        # A limit that always holds makes the proof tell the time.
        by_macs = compiled_afresh(*common, "--macs", macs, "--latency", "10s")
        if by_macs is None:
            return 1
        wanted = _ms(by_macs) / _ASKED
        by_time = compiled_afresh(*common, "--latency", f"{wanted:.6f}ms")
        if by_time is None:
            return 1
        faster = _ms(by_macs) / _ms(by_time)
        gap = _quality(by_time) - _quality(by_macs)
        rows[f"{model} on {target}"] = {
            "by_macs": _row(by_macs),
            "by_time": _row(by_time),
            "times_faster": faster,
            "top1_gap": gap,
        }
        checks[f"{model}: at least {_WANTED} times faster"] = faster >= _WANTED
        checks[f"{model}: equal quality or better"] = gap >= -_EQUAL
        save("latency_plan", {"pairs": rows, "ok": checks})
    for text, ok in checks.items():
        sys.stderr.write(f"{'ok  ' if ok else 'MISS'} {text}\n")
    return 0 if all(checks.values()) else 1


def _ms(found: Compiled) -> float:
    return float(found.summary["cost"]["latency_ms"]["value"])


def _quality(found: Compiled) -> float:
    return float(found.summary["quality"]["value"])


def _row(found: Compiled) -> dict[str, Any]:
    quality = found.summary["quality"]
    return {
        "ms": _ms(found),
        "macs": found.summary["cost"]["macs"]["value"],
        "top1": quality["value"],
        "top1_interval": [quality["low"], quality["high"]],
        "original_top1": found.summary["original_quality"]["value"],
        "seconds": found.seconds,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
