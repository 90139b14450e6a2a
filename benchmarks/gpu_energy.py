"""Joules and latency of zoo networks on an NVIDIA GPU: an energy model's and a predictor's errors.

Four networks at three widths, single and half precision, one sample and a batch that loads a
large GPU, through `gpu:webgpu`; energy from the GPU's own counter, with idle power and without.
The energy model is fitted to them; the predictor of `gpu:webgpu/h200` has seen none of them, and is
held against the runs of one sample. Needs an NVIDIA GPU with Vulkan, `edgebudget[webgpu]` and
`edgebudget[energy]`.

    python -m benchmarks.gpu_energy
    python -m benchmarks.gpu_energy --measure raw.json   # only measure
    python -m benchmarks.gpu_energy --samples raw.json   # only fit
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks._gpu_networks import NETWORKS, build
from benchmarks.harness import ROOT, machine, save

if TYPE_CHECKING:
    from edgebudget.predictor import Predictor


def main(arguments: list[str]) -> int:
    """Measure, fit and write; 0 also where there is no GPU to measure on."""
    options = _options(arguments)
    if options.samples:
        raw = json.loads(options.samples.read_text())
    else:
        if why := _missing():
            sys.stderr.write(f"skipped: {why}\n")
            return 0
        with tempfile.TemporaryDirectory(prefix="edgebudget-") as temp:
            folder = options.work or Path(temp)
            raw = measure(options.networks or list(NETWORKS), options.seconds, folder)
    if options.measure:
        options.measure.write_text(json.dumps(raw))
        return 0
    summary = {**summarise(raw), "energy_model": fitted(raw)}
    if (predictor := _shipped(raw["gpu"])) is not None:
        summary["predictor"] = predicted(raw, summary["rows"], predictor)
    save("gpu_energy", summary)
    _show(summary)
    return 0


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each loop")
    parser.add_argument("--measure", type=Path, help="write raw samples here, fit nothing")
    parser.add_argument("--samples", type=Path, help="fit these raw samples, measure nothing")
    parser.add_argument("--work", type=Path, help="keep networks and samples in this folder")
    parser.add_argument("networks", nargs="*", metavar="NETWORK")
    return parser.parse_args(arguments)


def _missing() -> str:
    from edgebudget import target_registry

    target = target_registry.get("gpu")
    if not target.available().ok or not target.spec.tells:
        return f"no GPU: {target.available().why}"
    if find_spec("pynvml") is None:
        return 'no NVML: pip install "edgebudget[energy]"'
    return ""


def measure(networks: list[str], seconds: float, folder: Path) -> dict[str, Any]:
    """Build the networks that `folder` lacks, each in its own process, and run all files."""
    lacking = [n for n in networks if not (folder / f"{n}.json").is_file()]
    threads = max(
        1, (os.cpu_count() or 1) // max(1, len(lacking))
    )  # more would wait for each other
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    module = "from benchmarks.gpu_energy import build_into; build_into"
    builders = [
        subprocess.Popen(
            [sys.executable, "-c", f"{module}({n!r}, {str(folder)!r})"], cwd=ROOT, env=environment
        )
        for n in lacking
    ]
    if any([b.wait() for b in builders]):
        raise SystemExit("a network could not be built")
    variants = [v for n in networks for v in json.loads((folder / f"{n}.json").read_text())]
    (folder / "variants.json").write_text(json.dumps(variants))
    command = [sys.executable, "-m", "benchmarks._gpu_loops", str(folder), str(seconds)]
    done = subprocess.run(command, cwd=ROOT, check=False)
    if not (folder / "loops.json").is_file():
        raise SystemExit(f"nothing was measured (exit {done.returncode})")
    raw: dict[str, Any] = json.loads((folder / "loops.json").read_text())
    return {**raw, "machine": machine()}


def build_into(network: str, folder: str) -> None:
    """Write all files of one network and what they do."""
    began = time.monotonic()
    variants = [v.as_dict() for v in build(network, Path(folder))]
    sys.stderr.write(f"{network}: built in {time.monotonic() - began:.0f} s\n")
    (Path(folder) / f"{network}.json").write_text(json.dumps(variants))


def summarise(raw: dict[str, Any]) -> dict[str, Any]:
    """One row per file: latency percentiles, joules with and without idle power, spread."""
    rows = []
    for network in raw["networks"].values():
        idle = statistics.mean(network["idle_watts"])
        for row in network["rows"]:
            loops = row["energy"]
            joules = statistics.mean(x["joules"] for x in loops)
            seconds = statistics.mean(x["seconds"] for x in loops)
            found = {k: v for k, v in row.items() if k not in {"energy", "ms", "file", "kernels"}}
            found |= {
                "mj_per_sample": 1e3 * joules / row["batch"],
                "mj_per_sample_above_idle": 1e3 * (joules - idle * seconds) / row["batch"],
                "watts": statistics.mean(x["watts"] for x in loops),
                "idle_watts": idle,
                "seconds_per_run": seconds,
                # two rounds, half a minute apart: how far they differ
                "spread": abs(loops[0]["joules"] - loops[-1]["joules"]) / joules,
                "runs": sum(int(x["runs"]) for x in loops),
                "sm_mhz": statistics.mean(x["sm_mhz"] for x in loops),
            }
            if row["ms"]:
                p50, p90, p99 = np.percentile(row["ms"], [50, 90, 99])
                found |= {"p50_ms": p50, "p90_ms": p90, "p99_ms": p99, "count": len(row["ms"])}
            rows.append(found)
    keys = ("gpu", "driver", "onnxruntime", "plugin", "seconds_each")
    return {**{k: raw[k] for k in keys}, "measured_on": raw["machine"], "rows": rows}


def _shipped(gpu: str) -> Predictor | None:
    """The predictor that comes with edgebudget for this GPU, if there is one."""
    import edgebudget_targets
    from edgebudget.predictor import read

    folder = Path(edgebudget_targets.__file__).parent / "predictors"
    found = [read(f) for f in sorted(folder.glob("*.json"))]
    return next((p for p in found if p.device.cpu.startswith(f"{gpu}, ")), None)


def predicted(
    raw: dict[str, Any], rows: list[dict[str, Any]], predictor: Predictor
) -> dict[str, Any]:
    """What the predictor says of each run of one sample, written into its row, and its errors."""
    from edgebudget.kernels import Kernel
    from edgebudget.predictor_fit import errors_of

    given = [r for network in raw["networks"].values() for r in network["rows"]]
    pairs = list[tuple[dict[str, Any], float, float | None]]()
    for row, source in zip(rows, given, strict=True):
        if row["batch"] > 1 or not source["kernels"]:
            continue
        kernels = [Kernel.from_list(k) for k in source["kernels"]]
        told = predictor.milliseconds(kernels), predictor.energy_figure(kernels).value
        row["predicted_ms"], row["predicted_mj_above_idle"] = told
        pairs.append((row, *told))
    ms = errors_of(np.array([p for _, p, _ in pairs]), np.array([r["p50_ms"] for r, _, _ in pairs]))
    metered = [(r["mj_per_sample_above_idle"], mj) for r, _, mj in pairs if mj is not None]
    energy = errors_of(np.array([mj for _, mj in metered]), np.array([a for a, _ in metered]))
    return {
        "device": predictor.device.cpu,
        "latency": asdict(ms),
        "energy": asdict(energy),
        "stated": {
            "latency": predictor.errors.words,
            "energy": predictor.energy.error_words if predictor.energy else "",
        },
    }


def fitted(raw: dict[str, Any]) -> dict[str, Any]:
    """The energy model of the measured joules, and its error on what was left out of the fit."""
    from edgebudget.energy_model import Sample, Work, fit

    def samples(group: str) -> list[Sample]:
        return [
            Sample(
                work=Work(
                    macs={r["precision"]: r["macs"]},
                    bytes={"dram": r["weight_bytes"] + r["activation_bytes"]},
                    seconds=r["seconds_per_run"],
                ),
                joules=1e-3 * r["mj_per_sample"] * r["batch"],
                group=group.format(**r),
            )
            for r in summarise(raw)["rows"]
            if r["precision"] != "int8 weights"
        ]

    device = {
        "device": raw["gpu"],
        "engine": "onnxruntime-webgpu",
        "engine_version": raw["plugin"],
    }
    found = {}
    for label, group in (
        ("unseen network", "{network}"),
        ("unseen width", "{network}/{share}"),
    ):
        model = fit(samples(group), **device)
        found[label] = {"median_error": model.median_error, "p90_error": model.p90_error}
    return {**json.loads(model.encode()), "errors": found}


def _show(summary: dict[str, Any]) -> None:
    for r in summary["rows"]:
        latency = f"{r['p50_ms']:7.2f} ms" if "p50_ms" in r else " " * 10
        sys.stderr.write(
            f"{r['network']:18} {r['share']:5.2f} x{r['batch']:<4} {r['precision']:13} {latency} "
            f"{r['mj_per_sample']:9.3f} mJ ({r['mj_per_sample_above_idle']:9.3f} above idle) "
            f"{r['watts']:5.0f} W\n"
        )
    for label in ("latency", "energy") if "predictor" in summary else ():
        e = summary["predictor"][label]
        sys.stderr.write(
            f"predictor, {label} of {e['networks']} files that it has not seen: median error "
            f"{e['median']:.1%}, 90 % within {e['p90']:.1%}, rank {e['rank_correlation']:.3f}\n"
        )
    for label, error in summary["energy_model"]["errors"].items():
        sys.stderr.write(
            f"energy model, {label}: median error {error['median_error']:.1%}, "
            f"90 % within {error['p90_error']:.1%}\n"
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
