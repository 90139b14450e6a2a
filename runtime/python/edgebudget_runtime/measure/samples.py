"""Inputs to measure on: seeded, of the shapes and types that a path takes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgebudget_runtime.inputs import Array
from edgebudget_runtime.manifest import Tensor


def make(tensors: Sequence[Tensor], seed: int = 0) -> dict[str, Array]:
    """One input: noise for floats and bytes, zeros for other integers, which may be indices.

    A size that the caller may choose is 1. Dense kernels do not look at values, except that
    float denormals, of which noise has none, can slow them down.
    """
    rng = np.random.default_rng(seed)
    found: dict[str, Array] = {}
    for tensor in tensors:
        shape, kind = [d or 1 for d in tensor.shape], np.dtype(tensor.dtype)
        if kind.kind == "f":
            found[tensor.name] = rng.standard_normal(shape, np.float32).astype(kind)
        elif kind.kind in "iu" and kind.itemsize == 1:
            limits = np.iinfo(kind)
            found[tensor.name] = rng.integers(limits.min, limits.max, shape, kind, endpoint=True)
        else:
            found[tensor.name] = np.zeros(shape, kind)
    return found
