"""Kinds of data sets, how they are divided, and how every sample is checked."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from edgebudget.program import TensorSpec
from edgebudget.tasks import check_labels
from edgebudget.workload import Array, Data, Dataset, Sample
from edgebudget_runtime.errors import ArtifactError, EdgeBudgetError

CALIBRATION_COUNT = 512
CALIBRATION_SHARE = 0.2  # of a single set that has to serve for both uses


@dataclass(frozen=True, slots=True)
class Splits:
    """Data before checking, and what a person should know about how it came to be."""

    data: Data
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Arrays:
    """Samples stacked in arrays [N, ...]."""

    name: str
    inputs: Mapping[str, Array]
    targets: Array | None = None

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    def sample(self, index: int) -> Sample:
        """Row `index` of every array."""
        target = None if self.targets is None else np.asarray(self.targets[index])
        return Sample({k: v[index] for k, v in self.inputs.items()}, target)

    def digest(self) -> str:
        """SHA-256 over names, types, shapes and values."""
        return _digest(self.sample(i) for i in range(len(self)))


class Items:
    """Any numbered things: `read(index)` gives (inputs, label), a `Sample`, or inputs alone."""

    def __init__(
        self, name: str, items: Any, read: Callable[[int], Any], specs: Sequence[TensorSpec]
    ) -> None:
        self.name = name
        self._items, self._read_item, self._specs = items, read, specs

    def __len__(self) -> int:
        with _one_line(self.name):
            return len(self._items)

    @property
    def skipped(self) -> int:
        """How many samples the source left out, where it says so."""
        return int(getattr(self._items, "skipped", 0))

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should know about these samples."""
        return (f"{self.name}: skipped {self.skipped} unreadable pictures",) if self.skipped else ()

    def sample(self, index: int) -> Sample:
        """Item `index` as arrays."""
        with _one_line(self.name):
            item = self._read_item(index)
        if isinstance(item, Sample):
            return item
        inputs, label = item if isinstance(item, (tuple, list)) and len(item) == 2 else (item, None)
        if not isinstance(inputs, Mapping):
            inputs = {self._specs[0].name: inputs}
        arrays = {str(k): as_array(v) for k, v in inputs.items()}
        return Sample(arrays, None if label is None else as_array(label))

    def digest(self) -> str:
        """The source's own digest, or SHA-256 over all samples."""
        own = getattr(self._items, "digest", None)
        if own is not None:
            with _one_line(self.name):
                return str(own())
        return self._digest

    @cached_property
    def _digest(self) -> str:
        return _digest(self.sample(i) for i in range(len(self)))


@dataclass(frozen=True)
class Subset:
    """Some samples of a set, in the order of `indices`."""

    name: str
    whole: Dataset
    indices: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def notes(self) -> tuple[str, ...]:
        """The notes of the whole set."""
        return notes_of(self.whole)

    def sample(self, index: int) -> Sample:
        """Sample `indices[index]` of the whole."""
        return self.whole.sample(self.indices[index])

    def digest(self) -> str:
        """SHA-256 over the whole's digest and the indices."""
        return hashlib.sha256(f"{self.whole.digest()}{self.indices}".encode()).hexdigest()


@dataclass(frozen=True)
class Checked:
    """A set whose every sample is checked against the model's inputs when it is read.

    Floats of another width are converted. `classes` is the number of classes, for labels of a
    classifier, else None. `crops` allows pictures [C, h, w] smaller than the model's input.
    """

    inner: Dataset
    specs: tuple[TensorSpec, ...]
    classes: int | None = None
    labelled: bool = True
    crops: bool = False

    @property
    def name(self) -> str:
        """The inner name."""
        return self.inner.name

    @property
    def skipped(self) -> int:
        """How many samples could not be read and were left out."""
        return int(getattr(self.inner, "skipped", 0))

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should know about these samples."""
        return notes_of(self.inner)

    def __len__(self) -> int:
        return len(self.inner)

    def sample(self, index: int) -> Sample:
        """Sample `index`.

        Raises:
            ArtifactError: EB547 label, EB548 shape, type or layout, EB549 NaN or Inf.
        """
        found = self.inner.sample(index)
        where = f"{self.name}, sample {index}"
        inputs = {s.name: _fit(found.inputs, s, where, self.crops) for s in self.specs}
        target = found.target if self.labelled else None
        if target is not None and target.dtype.kind == "f" and not np.isfinite(target).all():
            raise not_finite(f"{where}: the label")
        if self.classes is not None and target is not None:
            check_labels(target.reshape(-1), self.classes, where)
            target = target.astype(np.int64)
        return Sample(inputs, target)

    def digest(self) -> str:
        """The inner digest."""
        return self.inner.digest()


def notes_of(dataset: Dataset | None) -> tuple[str, ...]:
    """What a person should know about a set."""
    return tuple(getattr(dataset, "notes", ()))


def arrange(given: Mapping[str, Dataset], seed: int) -> Splits:
    """Make calibration, train and evaluation of the sets there are.

    A single set is divided into calibration and train (20 %) and evaluation (80 %), class by
    class. Calibration is otherwise drawn from train, never from evaluation.
    """
    for dataset in given.values():
        if len(dataset) == 0:
            raise ArtifactError("EB545", f"{dataset.name}: no sample", hint="give some data")
    calibration, train = given.get("calibration"), given.get("train")
    evaluation = given.get("evaluation")
    if len(given) == 1 and calibration is None:
        return _divide(next(iter(given.values())), seed)
    if calibration is None and train is not None:
        picked = draw(len(train), CALIBRATION_COUNT, seed)
        calibration = Subset(f"{train.name} (calibration)", train, picked)
    if calibration is None:
        return Splits(Data(None, None, evaluation), ("there is no data to calibrate on",))
    return Splits(Data(calibration, train, evaluation))


def draw(total: int, count: int, seed: int) -> tuple[int, ...]:
    """`count` different indices below `total`, in order; all of them where there are fewer."""
    order = np.random.default_rng(seed).permutation(total)[:count]
    return tuple(sorted(int(i) for i in order))


def divide(labels: Sequence[int | None], seed: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Indices of the calibration share and of the rest, disjoint, in proportion by label."""
    rng = np.random.default_rng(seed)
    groups: dict[int | None, list[int]] = {}
    for index, label in enumerate(labels):
        groups.setdefault(label, []).append(index)
    share: list[int] = []
    for label in sorted(groups, key=lambda k: (k is None, k)):
        members = rng.permutation(groups[label])
        share.extend(int(i) for i in members[: round(CALIBRATION_SHARE * len(members))])
    if not share and len(labels) > 1:
        share = [int(rng.integers(len(labels)))]
    taken = set(share)
    return tuple(sorted(share)), tuple(i for i in range(len(labels)) if i not in taken)


def divided_note(name: str, share: int, rest: int) -> str:
    """The sentence that tells a user that one set was divided."""
    return f"{name}: divided into {share} samples for calibration and {rest} for evaluation"


def _divide(whole: Dataset, seed: int) -> Splits:
    share, rest = divide([_class_of(whole.sample(i).target) for i in range(len(whole))], seed)
    note = divided_note(whole.name, len(share), len(rest))
    evaluation = Subset(f"{whole.name} (evaluation)", whole, rest)
    if not share:
        return Splits(Data(None, None, evaluation), (note,))
    train = Subset(f"{whole.name} (train)", whole, share)
    picked = tuple(share[i] for i in draw(len(share), CALIBRATION_COUNT, seed))
    return Splits(
        Data(Subset(f"{whole.name} (calibration)", whole, picked), train, evaluation), (note,)
    )


def _class_of(target: Array | None) -> int | None:
    if target is None or target.dtype.kind not in "iub" or target.size != 1:
        return None
    return int(target.reshape(-1)[0])


def as_array(value: Any) -> Array:
    """A numpy array of a tensor, a picture or a number; floats of Python become float32."""
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    found = np.asarray(value)
    return found.astype(np.float32) if found.dtype == np.float64 else found


def _fit(inputs: Mapping[str, Array], spec: TensorSpec, where: str, crops: bool = False) -> Array:
    value = inputs.get(spec.name)
    if value is None and len(inputs) == 1:
        value = next(iter(inputs.values()))
    if value is None:
        raise misfit(
            f"{where}: no input {spec.name!r}, found {', '.join(inputs)}",
            "name the inputs as the model does",
        )
    if value.shape != spec.shape[1:] and not (crops and _is_crop(value.shape, spec.shape[1:])):
        raise _wrong_shape(value.shape, spec, where)
    kind = np.dtype(spec.dtype)
    if value.dtype != kind and not (value.dtype.kind == kind.kind == "f"):
        raise misfit(
            f"{where}: input {spec.name!r} is {value.dtype}, the model wants {kind}",
            "scale and convert it as the model was trained",
        )
    value = value.astype(kind, copy=False)
    if kind.kind == "f" and not np.isfinite(value).all():
        raise not_finite(f"{where}: input {spec.name!r}")
    return value


def _is_crop(found: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    """Whether a picture [C, h, w] could be a part of a larger one [C, H, W]."""
    if len(found) != 3 or found[0] != whole[0]:
        return False
    return 0 < found[1] <= whole[1] and 0 < found[2] <= whole[2]


def _wrong_shape(found: tuple[int, ...], spec: TensorSpec, where: str) -> ArtifactError:
    wanted = spec.shape[1:]
    ours, theirs = _layout(found), _layout(wanted)
    hint = "resize or reshape the data to the model's input"
    moves = {(2, 0, 1): "channels first", (1, 2, 0): "channels last"}
    move = next((m for m in moves if len(found) == 3 and _moved(found, m) == wanted), None)
    if move is not None:
        axes = ", ".join(str(i) for i in (0, *(i + 1 for i in move)))
        hint = f"the model takes {moves[move]}: transpose({axes}) of the stacked samples"
    elif found == spec.shape:
        hint = "leave the batch dimension out of samples"
    return misfit(
        f"{where}: input {spec.name!r} is {ours}{list(found)}, the model wants "
        f"{theirs}{list(wanted)}",
        hint,
    )


def _moved(shape: tuple[int, ...], axes: tuple[int, int, int]) -> tuple[int, ...]:
    return tuple(shape[i] for i in axes)


def _layout(shape: tuple[int, ...]) -> str:
    if len(shape) != 3:
        return ""
    if shape[0] in {1, 3}:
        return "NCHW "
    return "NHWC " if shape[2] in {1, 3} else ""


def _digest(samples: Iterable[Sample]) -> str:
    sha = hashlib.sha256()
    for sample in samples:
        for name, value in sorted(sample.inputs.items()):
            _update(sha, name, value)
        if sample.target is not None:
            _update(sha, "", sample.target)
    return sha.hexdigest()


def _update(sha: Any, name: str, value: Array) -> None:
    sha.update(f"{name}\0{value.dtype}\0{value.shape}\0".encode())
    sha.update(np.ascontiguousarray(value).tobytes())


@contextmanager
def _one_line(name: str) -> Iterator[None]:
    """Turn what data code raises into one line; zoo data says ValueError for bad folders."""
    try:
        yield
    except EdgeBudgetError:
        raise
    except Exception as e:
        first = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise ArtifactError("EB545", f"{name}: {first}", hint="mend the data") from e


def misfit(what: str, hint: str) -> ArtifactError:
    """The error for data that does not fit the model."""
    return ArtifactError("EB548", what, hint=hint)


def not_finite(what: str) -> ArtifactError:
    """The error for NaN and Inf."""
    return ArtifactError("EB549", f"{what} holds NaN or Inf", hint="clean the data first")
