"""Data sets from `.npz` files and from the user's functions."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgebudget.datasets import Arrays, Items, Splits, arrange, as_array, misfit, not_finite
from edgebudget.program import TensorSpec
from edgebudget.safe_files import refuse_pickle
from edgebudget.user_code import UserFunction
from edgebudget.workload import Array, Dataset
from edgebudget_runtime.errors import ArtifactError, UsageError

_SPLITS = {
    "calibration": "calibration",
    "train": "train",
    "evaluation": "evaluation",
    "test": "evaluation",
    "val": "evaluation",
    "validation": "evaluation",
}
_LABELS = ("labels", "label", "targets")


def load_npz(path: Path, specs: Sequence[TensorSpec], seed: int) -> Splits:
    """Arrays of an `.npz` file, named like the model's inputs, plus `labels`.

    Names may start with `calibration_`, `train_` or `evaluation_` (`test_`); unprefixed arrays
    are the evaluation set beside those, or are divided if there are no others.

    Raises:
        UsageError: EB169, no such file.
        ArtifactError: EB541 corrupt, or object arrays; EB545 empty; EB548 names, lengths or shapes
            do not fit; EB549 NaN or Inf.
    """
    if not path.is_file():
        raise UsageError("EB169", f"no data file {path}", hint="check the path")
    groups: dict[str, dict[str, Array]] = {}
    for key, value in _read_npz(path).items():
        prefix, _, rest = key.partition("_")
        split = _SPLITS.get(prefix) if rest else None
        groups.setdefault(split or "", {})[rest if split else key] = value
    plain = groups.pop("", None)
    if plain is not None:
        if "evaluation" in groups:
            raise misfit(
                f"{path} has arrays with and without evaluation_ ({', '.join(plain)})",
                "name every array of a set alike",
            )
        groups["evaluation"] = plain
    made = {k: _arrays(f"{path.name}/{k}", v, specs) for k, v in groups.items()}
    return arrange(made, seed)


def load_function_data(function: UserFunction, specs: Sequence[TensorSpec], seed: int) -> Splits:
    """Data from the user's function: one set, or a dict of sets by split.

    A set is a sequence of (input, label) pairs (a torch Dataset will do), an object with
    `sample(i)`, or a pair of stacked arrays (inputs, labels). Several inputs go in a dict.

    Raises:
        UsageError: EB163, the function raised or returned something else.
        ArtifactError: EB545, a set is empty.
    """
    returned = function()
    if not isinstance(returned, Mapping) or not set(returned) <= set(_SPLITS):
        returned = {"evaluation": returned}
    made = {}
    for key, value in returned.items():
        if value is not None:
            made[_SPLITS[str(key)]] = _user_set(function, str(key), value, specs)
    if not made:
        raise ArtifactError("EB545", f"{function.where()}: no data", hint="return at least one set")
    return arrange(made, seed)


def _read_npz(path: Path) -> dict[str, Array]:
    refuse_pickle(path)
    try:
        with np.load(path, allow_pickle=False) as found:
            if not isinstance(found, np.lib.npyio.NpzFile):
                raise ValueError("not an .npz archive")
            arrays = {k: found[k] for k in found.files}
    except (ValueError, OSError, zipfile.BadZipFile, EOFError, KeyError) as e:
        objects = str(e).startswith("Object arrays")  # numpy says so of members only
        raise ArtifactError(
            "EB540" if objects else "EB541",
            f"{path}: refused: it holds object arrays, which are pickles"
            if objects
            else f"{path} is not a sound .npz file",
            hint="save plain arrays with numpy.savez(FILE, input=..., labels=...)",
        ) from e
    for key, value in arrays.items():
        if value.dtype.kind not in "fiub":
            raise misfit(f"{path}: {key} has type {value.dtype}", "save numbers")
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise not_finite(f"{path}: {key}")
    return arrays


def _arrays(name: str, found: Mapping[str, Array], specs: Sequence[TensorSpec]) -> Arrays:
    targets = next((found[k] for k in _LABELS if k in found), None)
    inputs = {k: v for k, v in found.items() if k not in _LABELS}
    if len(specs) == 1 and len(inputs) == 1:
        inputs = {specs[0].name: next(iter(inputs.values()))}
    missing = [s.name for s in specs if s.name not in inputs]
    if missing:
        raise misfit(
            f"{name}: no array for the model's input {missing[0]!r}, found {', '.join(found)}",
            f"name the arrays {', '.join(s.name for s in specs)} and labels",
        )
    lengths = {k: len(v) if v.ndim else 0 for k, v in inputs.items()}
    if targets is not None:
        lengths["labels"] = len(targets) if targets.ndim else 0
    if len(set(lengths.values())) != 1:
        raise misfit(
            f"{name}: arrays of different lengths: "
            + ", ".join(f"{k} {n}" for k, n in lengths.items()),
            "give every array one row per sample",
        )
    return Arrays(name, {s.name: inputs[s.name] for s in specs}, targets)


def _user_set(
    function: UserFunction, split: str, value: Any, specs: Sequence[TensorSpec]
) -> Dataset:
    name = f"{function.path.name}:{function.name}/{split}"
    if hasattr(value, "sample") and hasattr(value, "__len__"):
        return Items(name, value, value.sample, specs)
    if _stacked(value):
        inputs, labels = value
        named = inputs if isinstance(inputs, Mapping) else {specs[0].name: inputs}
        arrays = {str(k): as_array(v) for k, v in named.items()}
        if labels is not None:
            arrays["labels"] = as_array(labels)
        return _arrays(name, arrays, specs)
    if hasattr(value, "__getitem__") and hasattr(value, "__len__"):
        return Items(name, value, value.__getitem__, specs)
    raise UsageError(
        "EB163",
        f"{function.where()}: {function.name}() returned {type(value).__name__} for {split}",
        hint="return a dict of train, calibration, evaluation; each a list of (input, label)",
    )


def _stacked(value: Any) -> bool:
    """Whether `value` is a pair of arrays, rather than a list of two samples."""
    if not isinstance(value, tuple) or len(value) != 2:
        return False
    inputs, labels = value
    first = next(iter(inputs.values()), None) if isinstance(inputs, Mapping) else inputs
    return hasattr(first, "shape") and (labels is None or hasattr(labels, "shape"))
