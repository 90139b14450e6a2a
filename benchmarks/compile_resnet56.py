"""`compile cifar10-resnet56 --macs 63M --max-drop 1% --target cpu`, from an empty cache.

Needs CIFAR-10 as a folder (EDGEBUDGET_DATA/cifar10).

    python -m benchmarks.compile_resnet56
"""

from __future__ import annotations

import argparse
import sys

from benchmarks.harness import compiled_afresh, data_folder, save

_LIMIT_S = 30 * 60


def main(arguments: list[str]) -> int:
    """Compile, and compare what came out with what was promised."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile_resnet56")
    parser.parse_args(arguments)
    root = data_folder() / "cifar10"
    if not (root / "test").is_dir():
        sys.stderr.write(f"skipped: no CIFAR-10 folder at {root} (set EDGEBUDGET_DATA)\n")
        return 0
    found = compiled_afresh(
        "cifar10-resnet56", "--data", f"imagefolder:{root}",
        "--target", "cpu", "--macs", "63M", "--max-drop", "1%",
    )  # fmt: skip
    if found is None:
        return 1
    summary, checks = found.summary, {}
    drop = next(x for x in summary["quality_limits"] if x["kind"] == "max_drop")
    checks["compile at most 30 minutes"] = found.seconds <= _LIMIT_S
    checks["at most 63 MMACs"] = summary["cost"]["macs"]["value"] <= 63e6
    checks["at most 1 % of top-1 lost"] = drop["holds"]
    save(
        "compile_resnet56",
        {
            "seconds": found.seconds,
            "peak_bytes": found.peak_bytes,
            "macs": summary["cost"]["macs"]["value"],
            "original_macs": summary["original_cost"]["macs"]["value"],
            "size_bytes": summary["cost"]["size_bytes"]["value"],
            "top1": summary["quality"]["value"],
            "top1_interval": [summary["quality"]["low"], summary["quality"]["high"]],
            "original_top1": summary["original_quality"]["value"],
            "relative_drop": drop["value"],
            "pictures": summary["quality"]["count"],
            "ok": checks,
        },
    )
    for text, ok in checks.items():
        sys.stderr.write(f"{'ok  ' if ok else 'MISS'} {text}\n")
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
