"""Training state in one safetensors file: tensors beside a JSON header, replaced in one rename."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

_KEY = "edgebudget"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Named tensors and plain JSON facts of one moment."""

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]


def write(path: Path, checkpoint: Checkpoint) -> None:
    """Write aside, flush to disk, rename: a kill leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().contiguous().clone() for k, v in checkpoint.tensors.items()}
    header = {_KEY: json.dumps(checkpoint.facts, sort_keys=True)}
    aside = path.with_suffix(".part")
    with aside.open("wb") as f:
        f.write(save(tensors, metadata=header))
        f.flush()
        os.fsync(f.fileno())
    aside.replace(path)


def read(path: Path) -> Checkpoint | None:
    """The checkpoint at `path`, or None where there is none that can be read."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as f:
            header = f.metadata() or {}
            facts = json.loads(header[_KEY])
            return Checkpoint({k: f.get_tensor(k) for k in f.keys()}, facts)
    except (SafetensorError, OSError, KeyError, ValueError, RuntimeError):
        return None


def flatten(prefix: str, tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors among the values, under prefixed names."""
    return {f"{prefix}.{k}": v for k, v in tensors.items() if isinstance(v, torch.Tensor)}
