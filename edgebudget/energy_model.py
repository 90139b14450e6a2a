"""Energy of what was not measured: E = sum MACs x e(type) + sum bytes x e(level) + static x time.

The coefficients come from a device's own measured joules (`fit`), or, for chips that nobody
measured, from published figures of a technology (`technology`), which are far less sure.
"""

from __future__ import annotations

import json
import math
import statistics
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from edgebudget_runtime import codec
from edgebudget_runtime.cost import Figure
from edgebudget_runtime.errors import ArtifactError, UsageError
from edgebudget_runtime.profile import write_whole
from edgebudget_runtime.profile_detail import percentile

SCHEMA = 1
_TIME = "seconds"
_BEYOND = 1.5  # times the largest, or the inverse of the smallest, work of the fit
_FOLDS = 10
_HUBER, _TURNS = 0.2, 20  # of an error beyond which a sample counts less; of weighing anew
_MOST_BYTES = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one inference does: MACs by type, bytes by the memory they come from, seconds."""

    macs: Mapping[str, float] = field(default_factory=dict)  # "float32", "int8", ...
    bytes: Mapping[str, float] = field(default_factory=dict)  # "dram", ...
    seconds: float = 0.0

    def features(self) -> dict[str, float]:
        """One number for each coefficient; nothing that is 0."""
        named = {f"mac {k}": v for k, v in self.macs.items()}
        named |= {f"byte {k}": v for k, v in self.bytes.items()}
        named[_TIME] = self.seconds
        if any(not 0 <= v < math.inf for v in named.values()):
            raise ValueError("work of 0 or more")
        return {k: v for k, v in named.items() if v > 0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Work that was measured. `group`: samples of one network are judged together."""

    work: Work
    joules: float
    group: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class EnergyModel:
    """Coefficients of one device, engine and version, and how far they were off."""

    device: str
    engine: str
    engine_version: str
    joules: Mapping[str, float]  # of one MAC, one byte, one second; by feature
    smallest: Mapping[str, float]  # of the fit, by feature
    largest: Mapping[str, float]
    median_error: float  # relative, on samples that were left out of the fit
    p90_error: float
    count: int
    folds: int
    judged_on: str = "cross-validated"  # what the two errors are of
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        if not all(0 <= x < math.inf for x in self.joules.values()):
            raise ValueError("coefficients of 0 or more")
        if not self.joules.keys() == self.smallest.keys() == self.largest.keys():
            raise ValueError("a range for each coefficient")

    def predict(self, work: Work, *, extrapolate: bool = False) -> Figure:
        """Modelled millijoules of one inference; `spread` is the median error.

        Args:
            work: What it does.
            extrapolate: Allow work far from what was fitted; the figure then says so, and its
                error is not known.

        Raises:
            UsageError: EB148 the work is of a kind, or far larger or smaller than any, that was
                never measured.
        """
        features = work.features()
        strange = [k for k in features if k not in self.joules]
        if strange:
            raise UsageError(
                "EB148",
                f"no {strange[0]} was measured on {self.device}",
                hint=f"measure some: known are {', '.join(self.joules)}",
            )
        far = [self._far(k, v) for k, v in features.items()]
        beyond = [text for text in far if text]
        if beyond and not extrapolate:
            raise UsageError(
                "EB148",
                f"{beyond[0]} on {self.device}",
                hint="measure such work and fit again",
            )
        value = 1e3 * sum(self.joules[k] * v for k, v in features.items())
        how = f"energy model of {self.count} measured samples, {self.error_words}"
        if beyond:
            how += f"; extrapolated, so that its error is not known: {beyond[0]}"
        return Figure(
            value=value,
            evidence="modelled",
            how=how,
            device=self.device,
            count=self.count,
            spread=None if beyond else value * self.median_error,
        )

    @property
    def error_words(self) -> str:
        """For the `how` of a figure."""
        error = f"median error {self.median_error:.1%}, 90 % within {self.p90_error:.1%}"
        return f"{error}, {self.judged_on}"

    def _far(self, feature: str, value: float) -> str:
        low, high = self.smallest[feature], self.largest[feature]
        if value > high * _BEYOND:
            return f"{feature} is {value / high:.2g} times the most that was measured"
        if value < low / _BEYOND:
            return f"{feature} is {value / low:.2g} times the least that was measured"
        return ""

    def encode(self) -> str:
        """Canonical JSON."""
        plain = codec.encode(EnergyModel, self)
        return json.dumps(plain, indent=1, sort_keys=True, allow_nan=False) + "\n"

    def save(self, file: Path) -> None:
        """Write it, whole or not at all.

        Raises:
            UsageError: EB108 it cannot be written.
        """
        if why := write_whole(file, self.encode().encode("ascii")):
            raise UsageError("EB108", f"{file} {why}", hint="name another file")


def read(file: Path) -> EnergyModel:
    """Read a model, of whatever engine.

    Raises:
        ArtifactError: EB587 it cannot be read.
    """
    try:
        data = file.read_bytes()[: _MOST_BYTES + 1]
        raw = json.loads(data.decode("utf-8"))
        if not isinstance(raw, dict) or raw.get("schema") != SCHEMA:
            raise ValueError(f"not of schema {SCHEMA}")
        model: EnergyModel = codec.decode(EnergyModel, raw)
    except (OSError, ValueError, RecursionError, ArtifactError) as e:
        why = e.what if isinstance(e, ArtifactError) else e
        raise ArtifactError(
            "EB587", f"{file} is no energy model: {why}", hint="fit it again"
        ) from None
    return model


def load(file: Path, *, engine: str, engine_version: str) -> EnergyModel:
    """Read a model for this engine and version.

    Raises:
        ArtifactError: EB587 it cannot be read, EB588 it was fitted for another engine or version.
    """
    model = read(file)
    theirs, ours = (model.engine, model.engine_version), (engine, engine_version)
    if theirs != ours:
        raise ArtifactError(
            "EB588",
            f"{file} was fitted for {' '.join(theirs)}, here is {' '.join(ours)}",
            hint="measure and fit again",
        )
    return model


def fit(samples: Sequence[Sample], *, device: str, engine: str, engine_version: str) -> EnergyModel:
    """Non-negative, robust least squares of measured joules on (MACs, bytes, time).

    Errors are relative, so that small networks count as much as large ones; those that the model
    states are of samples whose whole group was left out.

    Raises:
        UsageError: EB149 there are too few samples, or energies that are not positive.
    """
    import numpy as np

    rows = [s.work.features() for s in samples]
    names = sorted({k for row in rows for k in row})
    groups = sorted({s.group or f"#{i}" for i, s in enumerate(samples)})
    if len(samples) < 2 * len(names) or len(groups) < 3:
        raise UsageError(
            "EB149",
            f"{len(samples)} samples of {len(groups)} networks cannot tell {len(names)} "
            "coefficients",
            hint=f"measure at least {2 * len(names)}, of 3 networks or more",
        )
    joules = np.array([s.joules for s in samples])
    if not (np.isfinite(joules) & (joules > 0)).all():
        raise UsageError("EB149", "an energy is not positive", hint="leave such samples out")
    table = np.array([[row.get(k, 0.0) for k in names] for row in rows])
    of = np.array([groups.index(s.group or f"#{i}") % _FOLDS for i, s in enumerate(samples)])
    errors: list[float] = []
    for fold in sorted(set(of.tolist())):
        found = _solve(table[of != fold], joules[of != fold])
        off = np.abs(table[of == fold] @ found - joules[of == fold]) / joules[of == fold]
        errors += [float(x) for x in off]
    return EnergyModel(
        device=device,
        engine=engine,
        engine_version=engine_version,
        joules=dict(zip(names, (float(x) for x in _solve(table, joules)), strict=True)),
        smallest={k: min(row[k] for row in rows if k in row) for k in names},
        largest={k: max(row[k] for row in rows if k in row) for k in names},
        median_error=statistics.median(errors),
        p90_error=percentile(errors, 90),
        count=len(samples),
        folds=len(set(of.tolist())),
    )


def _solve(table: Any, joules: Any) -> Any:
    """Coefficients of 0 or more; columns are scaled, for MACs are billions and seconds are not.

    Errors are relative to the larger of what was measured and what is told: a meter that missed
    nearly all of one run would else outweigh all others. Large ones weigh less, by Huber's loss
    ("Robust Estimation of a Location Parameter", 1964).
    """
    import numpy as np
    from scipy.optimize import nnls

    larger, weight = joules, np.ones(len(joules))
    for _ in range(_TURNS):
        rows = weight / larger
        relative = table * rows[:, None]
        scale = np.linalg.norm(relative, axis=0)
        scale[scale == 0] = 1.0
        found = nnls(relative / scale, joules * rows)[0] / scale
        told = table @ found
        larger = np.maximum(joules, told)
        off = np.abs(told - joules) / larger
        weight = 1.0 / np.sqrt(np.maximum(1.0, off / _HUBER))
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Technology:
    """Published energies of one technology, for chips that nobody measured."""

    name: str
    source: str
    year: int
    checked: bool  # against the source's own table
    error: float  # relative, assumed
    mac_pj: Mapping[str, float]
    byte_pj: Mapping[str, tuple[float, ...]]  # the low and the high end

    def predict(self, work: Work, *, static_w: float | None = None) -> Figure:
        """Modelled millijoules of one inference, or unknown where the source lacks a number."""
        lacking = [k for k in work.macs if k not in self.mac_pj]
        lacking += [k for k in work.bytes if k not in self.byte_pj]
        if lacking:
            why = f"{self.source} gives no energy of {', '.join(lacking)} at {self.name}"
            return Figure(value=None, evidence="unknown", how=why)
        middle = {k: sum(ends) / len(ends) for k, ends in self.byte_pj.items()}
        picojoules = sum(v * self.mac_pj[k] for k, v in work.macs.items())
        picojoules += sum(v * middle[k] for k, v in work.bytes.items())
        value = picojoules * 1e-9 + (static_w or 0.0) * work.seconds * 1e3
        static = "static power left out" if static_w is None else f"{static_w:g} W static power"
        return Figure(
            value=value,
            evidence="modelled",
            how=f"{self.name} constants of {self.source}, {static}; not calibrated, an error of a "
            f"factor of {1 + self.error:g} is assumed",
            spread=value * self.error,
        )


def technology(name: str) -> Technology:
    """The constants of one technology, such as `45nm`.

    Raises:
        UsageError: EB148 no source is known for it.
    """
    text = files("edgebudget.energy").joinpath("technology.toml").read_text(encoding="utf-8")
    known = tomllib.loads(text)
    if name not in known:
        raise UsageError(
            "EB148", f"no energies are known for {name!r}", hint=f"one of {', '.join(known)}"
        )
    found: Technology = codec.decode(Technology, {"name": name, **known[name]})
    return found
