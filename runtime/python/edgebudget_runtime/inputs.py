"""Are these the inputs that the artifact takes?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edgebudget_runtime.errors import UsageError
from edgebudget_runtime.manifest import Tensor

Array = np.ndarray[Any, Any]
Inputs = Mapping[str, Array] | Array
_LAYOUTS = (((0, 3, 1, 2), "NHWC", "NCHW"), ((0, 2, 3, 1), "NCHW", "NHWC"))


def named(given: Inputs, expected: Sequence[Tensor]) -> dict[str, Array]:
    """Inputs by name; a bare array is the only input.

    Raises:
        UsageError: EB170 an input is missing or unknown.
    """
    names = [t.name for t in expected]
    if isinstance(given, dict) and list(given) == names:
        return dict(given)
    if not isinstance(given, Mapping):
        if len(names) != 1:
            raise UsageError(
                "EB170",
                f"one array was given, the model takes {len(names)}: {', '.join(names)}",
                hint="give a dictionary from name to array",
            )
        return {names[0]: given}
    if set(given) != set(names):
        raise UsageError(
            "EB170",
            f"inputs are {', '.join(map(repr, given)) or 'none'}, "
            f"the model takes {', '.join(map(repr, names))}",
            hint="name every input as the model does",
        )
    return dict(given)


def check(given: Mapping[str, Array], expected: Sequence[Tensor]) -> None:
    """Check dtypes, shapes and values.

    Raises:
        UsageError: EB171 wrong shape, EB172 wrong dtype, EB173 NaN or infinity.
    """
    for tensor in expected:
        array = given[tensor.name]
        _check_dtype(tensor, array)
        if not fits(array.shape, tensor.shape):
            raise UsageError(
                "EB171",
                f"input {tensor.name!r} has shape {list(array.shape)}, "
                f"the model takes {shown(tensor.shape)}",
                hint=_shape_hint(array.shape, tensor.shape),
            )
        _check_values(tensor, array)


def shown(shape: Sequence[int | None]) -> str:
    """A shape for people: [1, 3, any, any]."""
    return "[" + ", ".join("any" if d is None else str(d) for d in shape) + "]"


def _check_dtype(tensor: Tensor, array: object) -> None:
    found = array.dtype if isinstance(array, np.ndarray) else None
    if found is not None and found == np.dtype(tensor.dtype):
        return
    what = "no numpy array" if found is None else f"{found}"
    hint = f"convert it: array.astype({tensor.dtype!r})"
    if found is None:
        hint = f"make it one: numpy.asarray(value, dtype={tensor.dtype!r})"
    elif found == np.uint8 and tensor.dtype.startswith("float"):
        hint = "scale and normalise the picture first: edgebudget_runtime.preprocess"
    raise UsageError(
        "EB172",
        f"input {tensor.name!r} is {what}, the model takes {tensor.dtype}",
        hint=hint,
    )


def _check_values(tensor: Tensor, array: Array) -> None:
    if array.size == 0 or array.dtype.kind != "f":
        return
    # A sum carries any NaN or infinity; of squares it may overflow, which the extremes cannot.
    if array.flags.c_contiguous and math.isfinite(np.vdot(array, array)):  # else it is copied
        return
    if np.isfinite(array.min()) and np.isfinite(array.max()):
        return
    bad = int(np.count_nonzero(~np.isfinite(array)))
    raise UsageError(
        "EB173",
        f"input {tensor.name!r} holds NaN or infinity in {bad} of {array.size} values",
        hint="clean the data: the answer would mean nothing",
    )


def fits(found: Sequence[int], expected: Sequence[int | None]) -> bool:
    """Whether a shape is one that is expected, None being any size."""
    if found == expected:
        return True
    return len(found) == len(expected) and all(
        e is None or f == e for f, e in zip(found, expected, strict=True)
    )


def _shape_hint(found: tuple[int, ...], expected: Sequence[int | None]) -> str:
    if fits((1, *found), expected):
        return "add the batch dimension: array[None]"
    for order, was, wanted in _LAYOUTS:
        for lead, index in ((found, ""), ((1, *found), "[None]")):
            if len(lead) == 4 and fits([lead[i] for i in order], expected):
                return f"the array looks like {was}, not {wanted}: array{index}.transpose{order}"
    same_rest = len(found) == len(expected) and fits(found[1:], expected[1:])
    if same_rest and expected and expected[0] is not None:
        return "use run_batch for several inputs at once"
    return "resize or pad the input as `preprocessing` in manifest.json says"
