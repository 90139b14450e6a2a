"""Fit a predictor of latency, and of energy, to what a calibration saw.

The engine's clock adds a time to each kernel that an unprofiled run does not have; it and the floor
of a run are what makes the sums of kernels meet the networks' own times. Regressors then see the
corrected times. Where an engine tells the time of whole runs alone, `predictor_totals` fits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from edgebudget import energy_model
from edgebudget.energy_model import Sample
from edgebudget.kernels import FEATURES, Kernel, Observation, by_kind, matrix, work_of
from edgebudget.predictor import Errors, Predictor, Regressor, Trees
from edgebudget.predictor_totals import fit_totals
from edgebudget_runtime.errors import TargetError

if TYPE_CHECKING:
    from edgebudget.energy_model import EnergyModel
    from edgebudget.workload import Array
    from edgebudget_runtime.device_id import Device

_FOLDS = 4
_LEAST_US = 0.1  # what is left of a kernel that takes less than the clock shows
_RIDGE = 1.0
_POWER_LAW = 8  # kernels of a kind that a regressor of its own needs
_BOOSTED = 60  # and that trees need
_CLIPPED = 4.0  # median deviations beyond which a residual is a disturbed run
_TREES: Mapping[str, Any] = {
    "n_estimators": 50,
    "max_depth": 3,
    "learning_rate": 0.2,
    "min_samples_leaf": 4,
    "subsample": 0.7,
    "random_state": 0,
}
_SHARINGS = 3  # turns of sharing runs out to their kernels
_MOST_LEFT = 10.0  # times what laws say, or a tenth: beyond it, a run tells nothing of kernels
_METERED = 24  # runs whose energy must be known
_CHAIN = "c"  # what the names of chains begin with
_USUAL_US = 5.0  # shorter kernels weigh less: their error hardly shows in a network


def fit(device: Device, seen: Mapping[str, Observation]) -> Predictor:
    """A predictor from every network's observation, with its cross-validated error.

    `seen` is by unit name, "12f" and "12q": both forms of a network are left out together. Chains,
    "c12f", are no networks as people have them: they are always fitted on, never predicted.

    Raises:
        TargetError: EB651, there is too little to fit.
    """
    names = sorted(n for n in seen if not n.startswith(_CHAIN))
    if len(names) < 2 * _FOLDS:
        raise TargetError(
            "EB651",
            f"{len(names)} networks were timed, too few to fit a predictor",
            hint="run `edgebudget calibrate` again",
        )
    chains = [seen[n] for n in sorted(seen) if n.startswith(_CHAIN)]
    observations = [seen[n] for n in names]
    numbers = np.array([int(n[:-1]) for n in names])
    shuffled = np.random.default_rng(0).permutation(int(numbers.max()) + 1)
    fold = shuffled[numbers] % _FOLDS
    predicted, energies = np.empty(len(observations)), np.full(len(observations), np.nan)
    for k in range(_FOLDS):
        left_in = [*(o for o, f in zip(observations, fold, strict=True) if f != k), *chains]
        partial, model = _fitted(device, left_in), _energy(device, left_in)
        for i in np.flatnonzero(fold == k):
            kernels = observations[i].kernels
            predicted[i] = partial.milliseconds(kernels)
            if model is not None and observations[i].energy_mj is not None:
                work = work_of(kernels, float(predicted[i]))
                energies[i] = model.predict(work, extrapolate=True).value
    actual = np.array([o.total_ms for o in observations])
    energy = None if np.isnan(energies).all() else _energy(device, [*observations, *chains])
    if energy is not None:
        energy = _judged(energy, energies, observations)
    whole = _fitted(device, [*observations, *chains])
    return dataclasses.replace(whole, errors=errors_of(predicted, actual), energy=energy)


def _energy(device: Device, observations: Sequence[Observation]) -> EnergyModel | None:
    """Of the runs whose energy a counter told; None where those are too few."""
    samples = [
        Sample(work=work_of(o.kernels, o.total_ms), joules=o.energy_mj / 1e3)
        for o in observations
        if o.energy_mj is not None
    ]
    if len(samples) < _METERED:
        return None
    engine, version = device.engine, device.engine_version
    return energy_model.fit(samples, device=device.cpu, engine=engine, engine_version=version)


def _judged(
    model: EnergyModel, predicted: Array, observations: Sequence[Observation]
) -> EnergyModel:
    """With the error of predictions [N] from predicted times, nan where nothing was measured."""
    told = ~np.isnan(predicted)
    actual = np.array([o.energy_mj or np.nan for o in observations])[told]
    off = np.abs(predicted[told] - actual) / actual
    median, p90 = (round(float(np.percentile(off, q)), 4) for q in (50, 90))
    return dataclasses.replace(
        model, median_error=median, p90_error=p90, folds=_FOLDS, count=len(off)
    )


def errors_of(predicted: Array, actual: Array) -> Errors:
    """How far predictions [N] are from what was measured, relatively, and in order."""
    from scipy.stats import spearmanr

    relative = np.abs(predicted - actual) / actual
    return Errors(
        len(actual),
        round(float(np.median(relative)), 4),
        round(float(np.percentile(relative, 90)), 4),
        round(float(spearmanr(predicted, actual).statistic), 4),
    )


def _fitted(device: Device, observations: Sequence[Observation]) -> Predictor:
    unknown = Errors(0, 0.0, 0.0, 0.0)
    if not all(o.kernel_us for o in observations):
        floor, each_us, laws = fit_totals(observations)
        first = Predictor(
            device=device, errors=unknown, floor_us=floor, each_us=each_us, regressors=laws
        )
        return dataclasses.replace(first, regressors=_refined(observations, first))
    floor, each = _overheads(observations)
    kernels = [k for o in observations for k in o.kernels]
    us = np.array([u for o in observations for u in o.kernel_us])
    us = np.maximum(us - each, _LEAST_US)
    kinds = np.array([k.kind for k in kernels])
    x = matrix(kernels)
    found = dict[str, Regressor]()
    for kind in sorted(set(kinds)):
        rows = kinds == kind
        if rows.sum() >= _POWER_LAW:
            found[str(kind)] = _regressor(x[rows], us[rows])
    for name, rows in _groups(kernels).items():
        if name not in found and rows.any():
            found[name] = _regressor(x[rows], us[rows])
    return Predictor(device=device, errors=unknown, floor_us=floor, each_us=0.0, regressors=found)


def _groups(kernels: Sequence[Kernel]) -> dict[str, Array]:
    """Kernels that stand in for kinds seen too rarely: by what their kinds begin with, and all."""
    starts = {k.kind.split(".", 1)[0] for k in kernels}
    found = {
        s: np.array([k.kind == s or k.kind.startswith(f"{s}.") for k in kernels]) for s in starts
    }
    moving = np.array([k.macs == 0 for k in kernels])
    found["*"] = moving if moving.sum() >= _POWER_LAW else np.ones(len(kernels), bool)
    return found


def _overheads(observations: Sequence[Observation]) -> tuple[float, float]:
    """Microseconds of a run's floor, and that the clock adds to each kernel.

    Least squares of relative errors, networks that were disturbed weighing less.
    """
    total = np.array([o.total_ms * 1e3 for o in observations])
    kernels = np.array([sum(o.kernel_us) for o in observations])
    parts = np.stack([np.ones_like(total), [-float(len(o.kernels)) for o in observations]], axis=1)
    weight = 1.0 / total
    for _ in range(10):
        found = np.linalg.lstsq(parts * weight[:, None], (total - kernels) * weight, rcond=None)[0]
        off = np.abs(kernels + parts @ found - total) / total
        weight = 1.0 / total / np.maximum(1.0, off / 0.03)
    return max(0.0, float(found[0])), float(found[1])


def _regressor(x: Array, us: Array) -> Regressor:
    y = np.log(us)
    weight = np.clip(us / _USUAL_US, 0.1, 1.0)
    mean, spread = x.mean(axis=0), x.std(axis=0)
    spread[spread < 1e-9] = np.inf  # a feature that does not vary says nothing
    z = (x - mean) / spread
    centre = float(np.average(y, weights=weight))
    gram = (z * weight[:, None]).T @ z + _RIDGE * np.eye(FEATURES)
    slope = np.linalg.solve(gram, (z * weight[:, None]).T @ (y - centre)) / spread
    intercept = float(centre - mean @ slope)
    left = y - intercept - x @ slope
    intercept += float(np.average(left, weights=weight))
    trees = Trees()
    if len(y) >= _BOOSTED:
        trees = _boosted(x, y - intercept - x @ slope, weight)
    return Regressor(
        len(y),
        intercept,
        tuple(float(v) for v in slope),
        float(y.min()),
        float(y.max()),
        trees,
    )


def _refined(observations: Sequence[Observation], first: Predictor) -> dict[str, Regressor]:
    """Trees on what power laws leave of whole runs, each kernel taking its part of what is left.

    A run tells most about the kind that most of it is: in a chain, the kernel's own time.
    """
    runs = [dict.fromkeys(o.kernels) for o in observations]  # equal kernels are one sample
    kernels = [k for run in runs for k in run]
    often = np.array([o.kernels.count(k) for o, run in zip(observations, runs, strict=True)
                      for k in run], float)  # fmt: skip
    at = np.repeat(np.arange(len(runs)), [len(r) for r in runs])
    start = np.array([first.floor_us + first.each_us * len(o.kernels) for o in observations])
    total = np.array([o.total_ms * 1e3 for o in observations])
    found, x, kinds = first.regressors, matrix(kernels), by_kind(kernels)
    refined = dict(found)
    for _ in range(_SHARINGS):
        us = np.empty(len(kernels))
        for kind, rows in kinds.items():
            us[rows] = refined[kind].microseconds(x[rows])
        sums = np.bincount(at, us * often)
        left = np.log(np.clip((total - start) / sums, 1 / _MOST_LEFT, _MOST_LEFT))[at]
        for kind, rows in kinds.items():
            if len(rows) < _BOOSTED:
                continue
            law = found[kind].intercept + x[rows] @ np.array(found[kind].weights)
            own = np.bincount(at[rows], (us * often)[rows], len(runs)) / (sums + start)
            trees = _boosted(x[rows], np.log(us[rows]) + left[rows] - law, own[at[rows]])
            refined[kind] = dataclasses.replace(found[kind], trees=trees)
    return refined


def _boosted(x: Array, left: Array, weight: Array) -> Trees:
    from sklearn.ensemble import GradientBoostingRegressor

    limit = _CLIPPED * float(np.median(np.abs(left - np.median(left)))) + 0.05
    left = np.clip(left, np.median(left) - limit, np.median(left) + limit)
    model = GradientBoostingRegressor(**_TREES).fit(x, left, sample_weight=weight)
    roots: list[int] = []
    feature: list[int] = []
    children: list[tuple[int, int]] = []
    threshold: list[float] = []
    value: list[float] = []
    start = float(model.init_.constant_.item())  # the first tree carries it
    for (estimator,) in model.estimators_:
        tree, base = estimator.tree_, len(feature)
        roots.append(base)
        for i in range(tree.node_count):
            inner = tree.children_left[i] >= 0
            feature.append(int(tree.feature[i]) if inner else -1)
            threshold.append(_short(tree.threshold[i]) if inner else 0.0)
            left_right = (base + int(tree.children_left[i]), base + int(tree.children_right[i]))
            children.append(left_right if inner else (0, 0))
            leaf = model.learning_rate * float(tree.value[i].item()) + start
            value.append(0.0 if inner else _short(leaf))
        start = 0.0
    return Trees(
        tuple(roots),
        tuple(feature),
        tuple(threshold),
        tuple(x for x, _ in children),
        tuple(x for _, x in children),
        tuple(value),
    )


def _short(value: float) -> float:
    """Enough digits, and files that are a third of the size."""
    return float(f"{value:.4g}")
