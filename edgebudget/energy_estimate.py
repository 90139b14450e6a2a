"""Energies: those that a target tells, and those that a model says where nothing measured any."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgebudget.target import TellsEnergy
from edgebudget_runtime.cost import UNKNOWN, Figure
from edgebudget_runtime.errors import UsageError
from edgebudget_runtime.manifest import Manifest
from edgebudget_runtime.profile import Profile

if TYPE_CHECKING:
    from edgebudget.energy_model import Work
    from edgebudget.target import Target
    from edgebudget.workload import Array

Predict = Callable[["Work"], Figure]
_OPTION = "energy_model"
_RUNS = 50  # of a latency that was not known


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


def offer(target: Target, source: str) -> None:
    """Let a model tell the energies that nothing measures for this target.

    Raises:
        UsageError: EB148 it is no known technology.
        ArtifactError: EB587 the file cannot be read, EB588 it is of another engine or version.
    """
    check(source)
    spec = target.spec
    if _is_file(source):
        predictor(source, engine=spec.engine, engine_version=target.available().version)
        source = str(Path(source).resolve())
    tells = spec.tells if "energy_mj" in spec.tells else (*spec.tells, "energy_mj")
    target.spec = replace(spec, tells=tells, options={**spec.options, _OPTION: source})


def energy_of(
    target: Target, file: Path, inputs: Mapping[str, Array], latency: Figure | None = None
) -> Figure:
    """Energy of one input in mJ beyond idle power: as the target tells it, else by the model.

    `latency` of the file is asked of the target where it is not given.

    Raises:
        UnsupportedError: EB210 to EB215 something in a graph has no known cost.
    """
    found = target.energy(file, inputs) if isinstance(target, TellsEnergy) else UNKNOWN
    source = target.spec.options.get(_OPTION)
    if found.value is not None or source is None:
        return found
    from edgebudget.segment_graph import read_graph
    from edgebudget.work import work_of

    if latency is None:
        latency = target.latency(file, inputs, _RUNS)
    if latency.value is None and _is_file(source):
        return replace(UNKNOWN, how=f"the energy model needs a latency: {latency.how}")
    version = target.available().version
    predict = predictor(source, engine=target.spec.engine, engine_version=version)
    try:
        return predict(work_of([read_graph(file)], (latency.value or 0.0) / 1e3))
    except UsageError as e:
        return replace(UNKNOWN, how=e.what)


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
    from edgebudget.segment_graph import read_segment_graph
    from edgebudget.work import work_of

    detail = found.detail
    assert detail is not None
    energy: dict[str, Figure] = dict(found.energy)
    notes: list[str] = []
    for sub in manifest.subnetworks:
        times = detail.paths.get(sub.id)
        if sub.id in energy or times is None:
            continue
        models = [read_segment_graph(folder, manifest.segment(s)) for s in sub.path]
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
