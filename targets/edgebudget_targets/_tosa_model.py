"""Arm's TOSA reference model: computes the very graph that Vela compiles.

It talks to the terminal and can crash: use it in a process of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def run(file: Path, arrays: Sequence[Any]) -> list[Any]:
    """Outputs [samples, ...] of inputs [samples, ...] as integers, NCHW, one sample at a time.

    Raises:
        RuntimeError: the model refuses the graph.
    """
    import tosa_reference_model

    graph = file.read_bytes()
    rows = []
    for i in range(len(arrays[0])):
        found, status = tosa_reference_model.run(
            graph,
            [np.ascontiguousarray(a[i]) for a in arrays],
            verbosity="NONE",
            initialize_variable_tensor_from_numpy=True,
            debug_mode=None,
        )
        if "VALID" not in str(status) or "INVALID" in str(status):
            raise RuntimeError(f"the TOSA reference model says {status}")
        rows.append(found)
    return [np.stack(v) for v in zip(*rows, strict=True)]
