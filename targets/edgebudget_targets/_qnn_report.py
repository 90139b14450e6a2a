"""Reading what the NPU engine reports: who runs which node and why, and its own estimate."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgebudget.target import NodePlacement

if TYPE_CHECKING:
    import onnx

_CPU = "CPUExecutionProvider"
# Our own node names survive the engine's rewriting as prefixes ("ebn12x_token_5").
_MARK = re.compile(r"ebn(\d+)x(?:_token_\d+)?")
_REFUSED = re.compile(
    r"Validation FAILED for \d+ nodes in OrtNodeUnit \([^)]*\) :\n"
    r"(?P<nodes>(?:\tOperator type: .*\n)+)\s*REASON : (?P<why>(?:.|\n(?!\s*\n|\d{4}-))*)"
)
_NO_SPACE = re.compile(r"\.(?=[A-Z])")
# Estimate rows -> our names. The times are of the whole graph on the NPU.
_ROWS = {
    "Simulated (Accelerator exec cycles)": "cycles",
    "Simulated (Accelerator exec time us)": "us",
    "Simulated (Accelerator exec time us (lower estimate))": "us_low",
    "Simulated (Accelerator exec time us (upper estimate))": "us_high",
    "Input Fill": "input_fill_bytes",
    "Intermediate Fill": "intermediate_fill_bytes",
    "Intermediate Spill": "intermediate_spill_bytes",
    "Inter HTP Fill": "inter_fill_bytes",
    "Inter HTP Spill": "inter_spill_bytes",
    "Output Spill": "output_spill_bytes",
}


def mark_nodes(model: onnx.ModelProto) -> None:
    """Give every node of the main graph a name that can be found again."""
    for i, node in enumerate(model.graph.node):
        node.name = f"ebn{i}x"


def place(
    named: Sequence[tuple[str, str]],
    assigned: Sequence[tuple[str, str, str]],
    reasons: dict[int, str],
) -> tuple[NodePlacement, ...]:
    """One row for every node of the file, and for every node that the engine put on the CPU.

    Args:
        named: (name, op) of each node of the file, in order.
        assigned: (provider, op, marked name) of each node that the engine runs.
        reasons: node number to why the NPU refuses it.
    """
    cpu, inserted = set[int](), list[NodePlacement]()
    for provider, op, marked in assigned:
        if provider != _CPU:
            continue
        match = _MARK.match(marked)
        if match:
            cpu.add(int(match[1]))
        else:
            inserted.append(NodePlacement(marked or op, op, "cpu", "inserted by the engine"))
    rows = []
    for i, (name, op) in enumerate(named):
        if i in cpu:
            why = reasons.get(i, "the engine gave no reason")
            rows.append(NodePlacement(name, op, "cpu", why))
        else:  # seen on the NPU, or folded into a node that is
            rows.append(NodePlacement(name, op, "npu"))
    return (*rows, *inserted)


def refusals(log: str, names: Sequence[str]) -> dict[int, str]:
    """Node number to the engine's reason, from a verbose log; `names` are the file's own."""
    found: dict[int, str] = {}
    for block in _REFUSED.finditer(log):
        why = _MARK.sub(lambda m: names[int(m[1])], " ".join(block["why"].split()))
        why = _NO_SPACE.sub(". ", why)
        for match in _MARK.finditer(block["nodes"]):
            found[int(match[1])] = why
    return found


def read_estimate(file: Path) -> dict[str, float]:
    """The compiler's own estimate out of its profile; empty where this SoC has none.

    Graphs that the engine cut in several parts are added up. `dram_bytes` is all traffic.
    """
    if not file.is_file():
        return {}
    found: dict[str, float] = {}
    with file.open(newline="", encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            name = _ROWS.get((row["Event Identifier"] or "").strip())
            if name:
                found[name] = found.get(name, 0.0) + float(row["Time"])
    if found.get("cycles", 0.0) <= 0:
        return {}
    found["dram_bytes"] = sum(v for k, v in found.items() if k.endswith("_bytes"))
    return found
