"""Arm's compiler Vela on a TOSA file, in a process of its own, and what it reports."""

from __future__ import annotations

import csv
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgebudget_runtime.errors import ArtifactError, TargetError

if TYPE_CHECKING:
    import onnx

COMMAND: tuple[str, ...] = (sys.executable, "-P", "-m", "ethosu.vela")
_KIB, _GIB = 1024, 1024**3


@dataclass(frozen=True, slots=True)
class Setting:
    """Which NPU in which system, in Vela's own names."""

    accelerator: str  # "ethos-u55-128"
    system_config: str  # "Ethos_U55_High_End_Embedded"
    memory_mode: str  # "Shared_Sram"

    @classmethod
    def of(cls, options: Mapping[str, str]) -> Setting:
        """From a target's options."""
        return cls(options["accelerator"], options["system_config"], options["memory_mode"])


@dataclass(frozen=True, slots=True)
class Layer:
    """One operator as Vela schedules it."""

    name: str  # Vela's name of its output
    op: str
    cycles: float
    macs: float


@dataclass(frozen=True, slots=True)
class Estimate:
    """Vela's own model of one inference; never compared with silicon by us."""

    cycles: float  # in all, of the NPU's clock
    npu_cycles: float
    ms: float
    clock_hz: float
    sram_bytes: int  # peak
    dram_bytes: int
    off_chip_flash_bytes: int
    on_chip_flash_bytes: int
    off_chip_traffic_bytes: int  # read and written in one inference, DRAM and flash
    macs: float
    layers: tuple[Layer, ...]
    sram_bytes_per_s: float  # at most


def estimate(tosa: Path, setting: Setting, limit_s: float) -> Estimate:
    """Compile a TOSA file once more, for the report that comes with it.

    Raises:
        ArtifactError: EB510, the file is missing.
        TargetError: EB610 Vela crashed or refuses the file, EB611 it took longer than `limit_s`.
    """
    if not tosa.is_file():
        raise ArtifactError(
            "EB510", f"{tosa.name} is missing beside the .pte", hint="compile the model again"
        )
    with tempfile.TemporaryDirectory(prefix="edgebudget-") as scratch:
        _run(tosa, setting, Path(scratch), limit_s)
        summary = next(iter(_rows(Path(scratch), "*summary*.csv")), None)
        layers = _rows(Path(scratch), "*per-layer*.csv")
    if summary is None:
        raise _failed(setting, "it wrote no summary")
    return _estimate(summary, layers)


def _run(tosa: Path, setting: Setting, folder: Path, limit_s: float) -> None:
    command = (
        *COMMAND,
        str(tosa.resolve()),
        f"--accelerator-config={setting.accelerator}",
        "--config=Arm/vela.ini",
        "--output-format=raw",
        f"--system-config={setting.system_config}",
        f"--memory-mode={setting.memory_mode}",
        f"--output-dir={folder}",
        "--verbose-performance",
    )
    try:
        done = subprocess.run(
            command, capture_output=True, stdin=subprocess.DEVNULL, timeout=limit_s, check=False
        )
    except subprocess.TimeoutExpired:
        raise TargetError(
            "EB611",
            f"Vela gave no answer for {setting.accelerator} within {limit_s:.0f} s",
            hint="free the machine of other work, or compile a smaller model",
        ) from None
    if done.returncode:
        said = (done.stderr + done.stdout).decode(errors="replace").strip().splitlines()
        errors = [x for x in said if "rror" in x] or said or [f"exit status {done.returncode}"]
        raise _failed(setting, " ".join(errors[-1].split())[:300])


def _failed(setting: Setting, why: str) -> TargetError:
    return TargetError(
        "EB610",
        f"Vela fails for {setting.accelerator} ({setting.system_config}, "
        f"{setting.memory_mode}): {why}",
        hint="check system_config and memory_mode, or choose another NPU",
    )


def _rows(folder: Path, pattern: str) -> list[dict[str, str]]:
    found: list[dict[str, str]] = []
    for file in sorted(folder.rglob(pattern)):
        with file.open(newline="", encoding="utf-8") as lines:
            found += csv.DictReader(lines)
    return found


def _estimate(row: Mapping[str, str], layers: list[dict[str, str]]) -> Estimate:
    def number(key: str) -> float:
        return float(row[key] or 0)

    def stored(key: str) -> int:
        return round(number(key) * _KIB)

    return Estimate(
        cycles=number("cycles_total"),
        npu_cycles=number("cycles_npu"),
        ms=number("inference_time") * 1e3,
        clock_hz=number("core_clock"),
        sram_bytes=stored("sram_memory_used"),
        dram_bytes=stored("dram_memory_used"),
        off_chip_flash_bytes=stored("off_chip_flash_memory_used"),
        on_chip_flash_bytes=stored("on_chip_flash_memory_used"),
        off_chip_traffic_bytes=round(
            number("dram_total_bytes") + number("off_chip_flash_total_bytes")
        ),
        macs=number("nn_macs"),
        layers=tuple(_layer(r) for r in layers),
        sram_bytes_per_s=number("sram_bandwidth") * _GIB,
    )


def _layer(row: Mapping[str, str]) -> Layer:
    return Layer(
        name=row.get("Name", ""),
        op=row.get("Original Operator") or row.get("TFLite_operator") or "",
        cycles=float(row.get("Op Cycles") or 0),
        macs=float(row.get("MAC Count") or 0),
    )


def by_node(found: Estimate, model: onnx.ModelProto) -> dict[str, float]:
    """Milliseconds of the graph's nodes, as far as Vela's operators are the same ones.

    Vela names its operators anew. They keep the graph's order, and an operator is a node of as
    many multiply-accumulates, or, where it has none, of the same kind; others are left out.
    """
    from edgebudget.count_onnx import count_graph
    from edgebudget.onnx_shapes import label

    macs = {x.name: float(x.macs) for x in count_graph(model).layers}
    nodes = [(label(n, i), n.op_type) for i, n in enumerate(model.graph.node)]
    ms, start = dict[str, float](), 0
    for layer in found.layers:
        for at in range(start, len(nodes)):
            name, op = nodes[at]
            if layer.macs == macs.get(name, 0.0) and (layer.macs or layer.op == op):
                ms[name] = layer.cycles / found.clock_hz * 1e3
                start = at + 1
                break
    return ms
