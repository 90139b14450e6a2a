"""Fit kernels' times to whole runs, where an engine does not tell its kernels' times.

Each kernel's time is a power law of its sizes, whose exponents are those of all kernels, plus what
its family (convolutions in float and in integers) and its kind (depthwise ones) add; these are held
small, so that a kind seen a few times borrows from the others. To that comes what starting any
kernel takes. All are fitted at once to the logarithms of the runs' times, with Huber's loss:
"Robust Estimation of a Location Parameter", 1964.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgebudget.kernels import Observation, matrix
from edgebudget.predictor import Regressor

if TYPE_CHECKING:
    from edgebudget.workload import Array

_RIDGE, _FAMILY_RIDGE, _KIND_RIDGE = 1e-3, 0.03, 0.3  # of slopes that all, families, kinds have
_HUBER = 0.3  # of a logarithm, beyond which a run counts as disturbed
_LOWEST, _HIGHEST = -12.0, 16.0  # logarithms of a kernel's microseconds
_FIRST = 0.5  # of the shortest run, and of the least that a kernel took: the fit begins there
_TURNS = 500


def fit_totals(observations: Sequence[Observation]) -> tuple[float, float, dict[str, Regressor]]:
    """Microseconds of a run's floor and of starting a kernel; a regressor for every kind, and "*".

    `observations` hold each run's time in ms and its kernels; their `kernel_us` are not looked at.
    """
    from scipy.optimize import minimize

    problem = _Problem(observations)
    found = minimize(
        problem.loss, problem.start(), jac=True, method="L-BFGS-B", options={"maxiter": _TURNS}
    )
    return problem.read(np.asarray(found.x))


@dataclass(frozen=True, slots=True)
class _Slopes:
    """Parts of one vector: slopes of all kernels, added by family and by kind; two logarithms."""

    base: Array  # [columns]
    family: Array  # [families, columns]
    kind: Array  # [kinds, columns]
    floor: float
    each: float


class _Problem:
    def __init__(self, observations: Sequence[Observation]) -> None:
        kernels = [k for o in observations for k in o.kernels]
        self._runs = len(observations)
        self._count = np.array([len(o.kernels) for o in observations])
        self._run = np.repeat(np.arange(self._runs), self._count)
        features = matrix(kernels)
        self._mean, self._spread = features.mean(axis=0), features.std(axis=0)
        self._spread[self._spread < 1e-9] = np.inf  # a feature that does not vary says nothing
        scaled = (features - self._mean) / self._spread
        self._x = np.concatenate([np.ones((len(kernels), 1)), scaled], axis=1)
        self._kinds = sorted({k.kind for k in kernels})
        self._families = sorted({_family(k) for k in self._kinds})
        self._kind = np.array([self._kinds.index(k.kind) for k in kernels])
        self._family = np.array([self._families.index(_family(k.kind)) for k in kernels])
        self._total = np.log([o.total_ms * 1e3 for o in observations])

    def start(self) -> Array:
        """The shortest run is half its floor; every kernel takes as long, whatever it is."""
        columns = self._x.shape[1]
        first = np.zeros(columns * (1 + len(self._families) + len(self._kinds)) + 2)
        shortest = np.exp(self._total.min())
        least = np.log((np.exp(self._total) - _FIRST * shortest) / self._count).min()
        first[0] = first[-1] = least + np.log(_FIRST)
        first[-2] = np.log(_FIRST * shortest)
        return first

    def loss(self, vector: Array) -> tuple[float, Array]:
        """Huber's loss of the logarithms and the ridges, and their gradient."""
        at = self._parts(vector)
        slopes = at.base + at.family[self._family] + at.kind[self._kind]
        times = np.exp(np.clip((self._x * slopes).sum(axis=1), _LOWEST, _HIGHEST))
        floor, each_us = np.exp(at.floor), np.exp(at.each)
        sums = np.bincount(self._run, times, self._runs) + floor + each_us * self._count
        off = np.log(sums) - self._total
        far = np.abs(off) > _HUBER
        loss = np.where(far, _HUBER * (np.abs(off) - _HUBER / 2), off * off / 2).sum()
        pull = np.where(far, _HUBER * np.sign(off), off) / sums
        each = self._x * (pull[self._run] * times)[:, None]
        base, family, kind = each.sum(axis=0), np.zeros_like(at.family), np.zeros_like(at.kind)
        np.add.at(family, self._family, each)
        np.add.at(kind, self._kind, each)
        base[1:] += 2 * _RIDGE * at.base[1:]
        loss += _RIDGE * (at.base[1:] ** 2).sum()
        loss += _FAMILY_RIDGE * (at.family**2).sum() + _KIND_RIDGE * (at.kind**2).sum()
        family += 2 * _FAMILY_RIDGE * at.family
        kind += 2 * _KIND_RIDGE * at.kind
        ends = [(pull * floor).sum(), (pull * each_us * self._count).sum()]
        parts = [base, family.ravel(), kind.ravel(), ends]
        return float(loss), np.concatenate(parts)

    def read(self, vector: Array) -> tuple[float, float, dict[str, Regressor]]:
        """What a vector stands for, as `fit_totals` gives it."""
        at = self._parts(vector)
        found = {"*": self._regressor(at.base, np.ones(len(self._x), bool))}
        for i, kind in enumerate(self._kinds):
            family = self._families.index(_family(kind))
            slopes = at.base + at.family[family] + at.kind[i]
            found[kind] = self._regressor(slopes, self._kind == i)
        return float(np.exp(at.floor)), float(np.exp(at.each)), found

    def _regressor(self, slopes: Array, rows: Array) -> Regressor:
        logs = self._x[rows] @ slopes
        weights = slopes[1:] / self._spread
        return Regressor(
            int(rows.sum()),
            float(slopes[0] - weights @ self._mean),
            tuple(float(w) for w in weights),
            float(np.clip(logs.min(), _LOWEST, _HIGHEST)),
            float(np.clip(logs.max(), _LOWEST, _HIGHEST)),
        )

    def _parts(self, vector: Array) -> _Slopes:
        columns = self._x.shape[1]
        rows = vector[:-2].reshape(-1, columns)
        many = len(self._families)
        return _Slopes(rows[0], rows[1 : 1 + many], rows[1 + many :], *vector[-2:].tolist())


def _family(kind: str) -> str:
    """What a kind is without its form: "Conv" for "QConv.dw"; all portable kernels are one."""
    return kind.split(".", 1)[0].removeprefix("Q")
