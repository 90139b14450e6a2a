"""Options that several commands share, and reading their values."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from edgebudget_runtime.errors import UsageError

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A zoo name, FILE.py:FUNCTION, FILE.pt2, FILE.onnx, a Hugging Face folder or id.",
    ),
]
Artifact = Annotated[
    Path, typer.Argument(metavar="ARTIFACT", help="The folder that `compile --out` wrote.")
]
Json = Annotated[bool, typer.Option("--json", help="Pure JSON on stdout.")]
TargetName = Annotated[
    str, typer.Option("--target", help="Where it will run: see `edgebudget targets`.")
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data", help="imagefolder:DIR, npz:FILE, FILE.py:FUNCTION, builtin (the zoo's)."
    ),
]
Task = Annotated[
    str | None,
    typer.Option(
        "--task", help="classification, regression, detection, agreement, FILE.py:FUNCTION."
    ),
]
Weights = Annotated[
    Path | None, typer.Option("--weights", help="A .safetensors file for MODEL's architecture.")
]
InputShape = Annotated[
    str | None, typer.Option("--input-shape", help="Batch included, such as 1x3x224x224.")
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="The same seed gives the same bytes.")]

Macs = Annotated[str | None, typer.Option("--macs", help="Multiply-accumulates of one input: 50G.")]
Params = Annotated[str | None, typer.Option("--params", help="Parameters: 2M.")]
Size = Annotated[str | None, typer.Option("--size", help="Deployable bytes: 4MB, 4MiB.")]
Memory = Annotated[
    str | None, typer.Option("--memory", help="Weights and activations at their peak: 64MiB.")
]
Latency = Annotated[
    str | None, typer.Option("--latency", help="Of one input: 10ms, 10ms@p99 (p50 otherwise).")
]
Energy = Annotated[str | None, typer.Option("--energy", help="Of one input: 5mJ.")]
EnergyModel = Annotated[
    str | None,
    typer.Option(
        "--energy-model", help="For energy that nothing measures: a fitted .json, 45nm, 7nm."
    ),
]
MaxDrop = Annotated[
    str | None, typer.Option("--max-drop", help="Quality that may be lost, relative: 1%.")
]
MinQuality = Annotated[
    str | None, typer.Option("--min-quality", help="Quality to keep, of the task's metric: 0.80.")
]
MaxFallback = Annotated[
    int | None,
    typer.Option("--max-fallback", help="Nodes outside the target's processor (npu: 0)."),
]
MaxBatch = Annotated[
    int,
    typer.Option("--max-batch", min=1, help="Inputs that one call may take (cpu:xnnpack)."),
]
TimeLimit = Annotated[
    str | None, typer.Option("--time-limit", help="For the whole compile: 20m. Keeps the best.")
]


def parse_shape(text: str | None) -> tuple[int, ...] | None:
    """Read 1x3x224x224.

    Raises:
        UsageError: EB101, it is no list of positive sizes.
    """
    if text is None:
        return None
    sizes = re.split(r"[x,]", text.strip().lower())
    if not all(re.fullmatch(r"[1-9]\d*", s) for s in sizes):
        raise UsageError(
            "EB101",
            f"--input-shape {text!r} is not a list of positive sizes",
            hint="batch first, sizes joined by x: 1x3x224x224",
        )
    return tuple(int(s) for s in sizes)


def write_file(path: Path, text: str) -> None:
    """Write a file that the user named.

    Raises:
        UsageError: EB108, it cannot be written.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as e:
        raise UsageError(
            "EB108", f"{path} cannot be written: {e.strerror}", hint="name another --out"
        ) from e


def parse_share(option: str, text: str) -> float:
    """A share between 0 and 1, from `95%` or `0.95`.

    Raises:
        UsageError: EB157, it is something else.
    """
    try:
        value = float(text.rstrip("%")) / (100.0 if text.endswith("%") else 1.0)
    except ValueError:
        value = 0.0
    if not 0.0 < value < 1.0:
        raise UsageError("EB157", f"{option} {text} is not between 0 and 1", hint="write 95%")
    return value
