"""Fill in the energies that nothing measured, from a model of energy, and say so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgebudget_runtime.cost import Figure
from edgebudget_runtime.errors import UsageError
from edgebudget_runtime.manifest import Manifest
from edgebudget_runtime.profile import Profile

if TYPE_CHECKING:
    from edgebudget.energy_model import Work

Predict = Callable[["Work"], Figure]


def check(source: str) -> None:
    """Complain about a source before anything is measured for it.

    Raises:
        UsageError: EB148 it is no known technology.
        ArtifactError: EB587 the file cannot be read.
    """
    from edgebudget import energy_model

    if _is_file(source):
        energy_model.read(Path(source))
    else:
        energy_model.technology(source)


def predictor(source: str, *, engine: str, engine_version: str) -> Predict:
    """What a fitted model's file, or the name of a technology such as `7nm`, predicts.

    Raises:
        UsageError: EB148 it is neither.
        ArtifactError: EB587 the file cannot be read, EB588 it is of another engine or version.
    """
    from edgebudget import energy_model

    if _is_file(source):
        path = Path(source)
        return energy_model.load(path, engine=engine, engine_version=engine_version).predict
    return energy_model.technology(source).predict


def fill(found: Profile, folder: Path, manifest: Manifest, predict: Predict) -> Profile:
    """The profile with a modelled energy for every path whose energy nothing measured.

    A path of which the model knows nothing alike stays unknown; the reason is noted.

    Raises:
        UnsupportedError: EB210 to EB215 something in a graph has no known cost.
    """
    import onnx

    from edgebudget.work import work_of

    detail = found.detail
    assert detail is not None
    energy: dict[str, Figure] = dict(found.energy)
    notes: list[str] = []
    for sub in manifest.subnetworks:
        times = detail.paths.get(sub.id)
        if sub.id in energy or times is None:
            continue
        models = [onnx.load_model(str(folder / manifest.segment(s).file)) for s in sub.path]
        try:
            figure = predict(work_of(models, times.p50_ms / 1e3))
        except UsageError as e:
            notes.append(f"energy of {sub.id} stays unknown: {e.what}")
            continue
        if figure.value is None:
            notes.append(f"energy of {sub.id} stays unknown: {figure.how}")
        else:
            energy[sub.id] = figure
    return replace(found, energy=energy, detail=replace(detail, notes=(*detail.notes, *notes)))


def _is_file(source: str) -> bool:
    return Path(source).suffix == ".json" or Path(source).is_file()
