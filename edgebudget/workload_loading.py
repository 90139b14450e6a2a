"""From what the user typed to a workload: the model, its data and its task."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgebudget import data_sources, datasets, image_folder, tasks
from edgebudget.datasets import Checked, Items, Splits
from edgebudget.load_model import LoadedModel, load_model
from edgebudget.preprocessing import preprocessing_for
from edgebudget.user_code import is_user_code, load_function
from edgebudget.workload import Data, Dataset, Workload
from edgebudget_runtime.errors import ArtifactError, UsageError

if TYPE_CHECKING:
    from edgebudget.workload import Task

_TEST_FOLDERS = ("test", "val", "validation")
_KINDS = ("builtin", "imagefolder", "npz")
Files = list[tuple[Path, int | None]]


@dataclass(frozen=True, slots=True)
class _Found:
    splits: Splits
    preprocessing: Mapping[str, Any]


def load_workload(
    model: str,
    *,
    weights: Path | None = None,
    data: str | None = None,
    task: str | None = None,
    input_shape: tuple[int, ...] | None = None,
    seed: int = 0,
) -> Workload:
    """Load everything a compile starts from.

    Args:
        model: A zoo name, `file.py:function`, `.pt2`, `.onnx`, a Hugging Face folder or id.
        weights: A `.safetensors` file, for a zoo or user-defined model.
        data: `builtin`, `imagefolder:DIR` (options after `?`), `npz:FILE`, `file.py:function`,
            or a folder or `.npz` file alone. None: the zoo's own data, if it brings any.
        task: `classification`, `regression`, `detection`, `agreement`, or the user's metric
            `file.py:function`. None: the zoo's task, or what labels and outputs suggest.
        input_shape: Batch included, for models that do not say it.
        seed: Of every draw made here.

    Returns:
        A workload; without data its `data` is empty. `notes` of its data sets, gathered by
        `notes`, say what was skipped or divided.

    Raises:
        UsageError: EB160-EB169.
        UnsupportedError: EB250-EB254.
        ArtifactError: EB540-EB549.
    """
    chosen = None if task is None else tasks.make(task)
    loaded = load_model(model, weights=weights, input_shape=input_shape, seed=seed)
    if chosen is None and loaded.entry is not None:
        chosen = tasks.make(loaded.entry.task)
    found = _load_data(loaded, data, chosen, seed)
    given = found.splits.data
    if chosen is None:
        chosen = tasks.infer(loaded.program, given, loaded.output_shapes)
    classes = _classes(loaded) if chosen.kind == "classification" else None

    def checked(dataset: Dataset | None, crops: bool = False) -> Dataset | None:
        if dataset is None:
            return None
        made = Checked(dataset, loaded.program.inputs, classes, not chosen.needs_reference, crops)
        _check_all_labels(made)
        return made

    sets = Data(
        checked(given.calibration), checked(given.train, crops=True), checked(given.evaluation)
    )
    for dataset in (sets.evaluation, sets.calibration):
        if dataset is not None:
            dataset.sample(0)  # a wrong shape or type is told now, not after the work
    return Workload(
        loaded.name,
        loaded.program,
        chosen,
        sets,
        found.preprocessing,
        loaded.digest,
        notes=_gathered(found.splits.notes, sets),
    )


def _gathered(own: Sequence[str], data: Data) -> tuple[str, ...]:
    """Notes on the data; of train only if it has been read already for calibration's sake."""
    each = [datasets.notes_of(d) for d in (data.calibration, data.evaluation)]
    return tuple(dict.fromkeys([*own, *(n for notes in each for n in notes)]))


def _load_data(model: LoadedModel, source: str | None, task: Task | None, seed: int) -> _Found:
    entry = model.entry
    if source is None or source == "builtin":
        if entry is not None and not entry.needs_data:
            return _Found(_zoo_data(model, None), model.preprocessing)
        if source == "builtin":
            raise UsageError(
                "EB169",
                f"{model.name} brings no data of its own",
                hint="give --data imagefolder:DIR, npz:FILE or file.py:function",
            )
        return _Found(Splits(Data()), model.preprocessing)
    if is_user_code(source):
        function = load_function(source, "data")
        splits = data_sources.load_function_data(function, model.program.inputs, seed)
        return _Found(splits, model.preprocessing)
    kind, place, query = _parsed(source)
    if kind == "npz":
        splits = data_sources.load_npz(Path(place), model.program.inputs, seed)
        return _Found(splits, model.preprocessing)
    root = Path(place)
    if not root.is_dir():
        raise UsageError("EB169", f"no folder {place}", hint="check the path")
    labelled = entry is not None and entry.task == "classification"
    alone = task is not None and task.needs_reference and not _has_class_folders(_parts(root))
    if entry is not None and not query and not (labelled and alone):
        _look_at(root, labelled)
        return _Found(_zoo_data(model, root), model.preprocessing)
    return _pictures(model, root, query, task, seed)


def _parsed(source: str) -> tuple[str, str, str]:
    """Kind, place and options of a data source."""
    kind, colon, place = source.partition(":")
    if not colon or (kind not in _KINDS and Path(source.partition("?")[0]).exists()):
        kind, place = "npz" if source.endswith(".npz") else "imagefolder", source
        if not Path(source.partition("?")[0]).exists():
            raise UsageError(
                "EB169",
                f"no data at {source!r}",
                hint="use builtin, imagefolder:DIR, npz:FILE, or file.py:function",
            )
    if kind not in _KINDS:
        close = difflib.get_close_matches(kind, _KINDS, n=1)
        raise UsageError(
            "EB169",
            f"unknown kind of data {kind!r}",
            hint=f"did you mean {close[0]}:{place}?" if close else f"one of {', '.join(_KINDS)}",
        )
    if kind == "npz":
        return kind, place, ""
    folder, _, query = place.partition("?")
    return kind, folder, query


def _zoo_data(model: LoadedModel, root: Path | None) -> Splits:
    specs = model.program.inputs

    def part(split: str) -> Items:
        try:
            found = model.entry.data(split, root)
        except ValueError as e:
            raise ArtifactError("EB545", str(e), hint=f"see the card of {model.name}") from e
        return Items(found.name, found, found.sample, specs)

    return Splits(Data(part("calibration"), part("train"), part("evaluation")))


def _look_at(root: Path, labelled: bool) -> None:
    """Refuse a folder without pictures, or without at least two classes where classes count."""
    if not image_folder.has_pictures(root):
        raise image_folder.empty(root, "no pictures in it")
    if labelled:
        for part in _parts(root).values():
            _require_classes(part, image_folder.class_folders(part))


def _parts(root: Path) -> dict[str, Path]:
    """The folders that hold train and evaluation pictures; one of both kinds may be missing."""
    found = {"train": root / "train"} if (root / "train").is_dir() else {}
    test = next((root / n for n in _TEST_FOLDERS if (root / n).is_dir()), None)
    if test is not None:
        found["evaluation"] = test
    return found or {"evaluation": root}


def _require_classes(folder: Path, classes: Sequence[Path]) -> None:
    if len(classes) < 2:
        found = f"only the class {classes[0].name!r}" if classes else "no class folders"
        raise ArtifactError(
            "EB546",
            f"{folder}: {found}, a classifier needs at least two classes",
            hint="one folder per class: DIR/<class>/*.jpg; or without labels: --task agreement",
        )


def _pictures(model: LoadedModel, root: Path, query: str, task: Task | None, seed: int) -> _Found:
    source = f"imagefolder:{root}"
    inputs = model.program.inputs
    if len(inputs) != 1:
        raise ArtifactError(
            "EB548",
            f"{source}: the model has {len(inputs)} inputs, pictures fill one",
            hint="give arrays instead: --data npz:FILE",
        )
    how = preprocessing_for(inputs[0], model.preprocessing, query, source)
    parts = _parts(root)
    labelled = _wants_classes(model, task, parts)
    _look_at(root, labelled)
    names = _class_names(parts) if labelled else ()
    if model.entry is not None and labelled and set(names) <= set(model.entry.classes):
        names = model.entry.classes
    count = _classes(model) if labelled else None
    if count is not None and len(names) > count:
        raise ArtifactError(
            "EB547",
            f"{root}: {len(names)} class folders, the model has {count} classes",
            hint="use data of the model's own classes, in alphabetical order",
        )
    files = {k: _files(p, names if labelled else None) for k, p in parts.items()}
    notes: tuple[str, ...] = ()

    def made(use: str, listed: Files, limit: int | None = None) -> image_folder.FolderDataset:
        name = f"{root.name}/{use}"
        return image_folder.FolderDataset(name, root, listed, how, inputs[0], limit=limit)

    if len(files) == 1:
        whole = next(iter(files.values()))
        share, rest = datasets.divide([label for _, label in whole], seed)
        notes = (datasets.divided_note(str(root), len(share), len(rest)),)
        files = {"train": [whole[i] for i in share], "evaluation": [whole[i] for i in rest]}
    if not files["train"]:
        only = Data(None, None, made("evaluation", files["evaluation"]))
        return _Found(Splits(only, notes), how.to_json())
    order = np.random.default_rng(seed).permutation(len(files["train"]))
    drawn = [files["train"][i] for i in order]  # unreadable ones are replaced by the next
    data = Data(
        made("calibration", drawn, datasets.CALIBRATION_COUNT),
        made("train", files["train"]),
        made("evaluation", files["evaluation"]),
    )
    return _Found(Splits(data, notes), how.to_json())


def _wants_classes(model: LoadedModel, task: Task | None, parts: Mapping[str, Path]) -> bool:
    """Whether folder names are labels: if the task says so, or could and there are folders."""
    if task is not None:
        return task.kind == "classification" or (
            not task.needs_reference and _has_class_folders(parts)
        )
    return _classes(model) is not None and _has_class_folders(parts)


def _has_class_folders(parts: Mapping[str, Path]) -> bool:
    return any(image_folder.class_folders(p) for p in parts.values())


def _class_names(parts: Mapping[str, Path]) -> tuple[str, ...]:
    """Class names in alphabetical order; evaluation may lack some of train's, not the reverse."""
    found = {k: [c.name for c in image_folder.class_folders(p)] for k, p in parts.items()}
    names = found.get("train", found.get("evaluation", []))
    extra = [n for n in found.get("evaluation", []) if n not in names]
    if extra:
        raise ArtifactError(
            "EB547",
            f"{parts['evaluation']}: class {extra[0]!r} is not among the {len(names)} of train",
            hint="use the same class folders in both",
        )
    return tuple(sorted(names))


def _files(folder: Path, names: Sequence[str] | None) -> Files:
    if names is None:
        return [(p, None) for p in image_folder.pictures_in(folder)]
    return [
        (path, names.index(part.name))
        for part in image_folder.class_folders(folder)
        for path in image_folder.pictures_in(part)
    ]


def _classes(model: LoadedModel) -> int | None:
    """Number of classes of the first output that looks like class scores [N, C], or None."""
    for shape in model.output_shapes.values():
        if len(shape) >= 2 and shape[1] > 1 and int(np.prod(shape[1:])) == shape[1]:
            return int(shape[1])
    return None


def _check_all_labels(dataset: Checked) -> None:
    """Labels kept in one array are all checked at once, before any work."""
    inner = dataset.inner
    while isinstance(inner, datasets.Subset):
        inner = inner.whole
    if dataset.classes is not None and isinstance(inner, datasets.Arrays):
        if inner.targets is not None:
            tasks.check_labels(inner.targets.reshape(-1), dataset.classes, inner.name)
