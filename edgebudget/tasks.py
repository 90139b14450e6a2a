"""What counts as a good answer: the tasks, and how one is chosen."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgebudget import detection, metrics
from edgebudget.user_code import UserFunction, is_user_code, load_function
from edgebudget.workload import Array, Quality, TaskKind
from edgebudget_runtime.errors import ArtifactError, UnsupportedError, UsageError

if TYPE_CHECKING:
    from edgebudget.program import Program
    from edgebudget.workload import Data, Dataset, Task

Shape = tuple[int, ...]
NAMES = ("classification", "regression", "detection", "agreement")
_FOLDS = 10
_T_QUANTILE = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # 1 to 9 degrees


@dataclass(frozen=True, slots=True)
class Classification:
    """Share of pictures whose label scores best (top-1); top-5 and NLL beside it."""

    kind: TaskKind = "classification"
    metric: str = "top1"
    needs_reference: bool = False

    def quality(
        self, outputs: Mapping[str, Array], targets: Mapping[str, Array] | Array
    ) -> Quality:
        """Score [N, C] (the first such output) against integer labels [N].

        Raises:
            UnsupportedError: EB254, there is no [N, C] output.
            ArtifactError: EB547, a label is not one of the C classes.
        """
        given = _labels(targets).reshape(-1)
        scores = class_scores(outputs)
        check_labels(given, scores.shape[1], "the data")
        labels = given.astype(np.int64)
        right = metrics.hits_at(scores, labels, 1)
        hits, count = int(right.sum()), len(labels)
        low, high = metrics.wilson(hits, count)
        logged = metrics.log_probabilities(scores)
        others = {"nll": float(-logged[np.arange(count), labels].mean())}
        if scores.shape[1] > 5:
            others["top5"] = float(metrics.hits_at(scores, labels, 5).mean())
        return Quality(self.metric, hits / count, low, high, count, others)


@dataclass(frozen=True, slots=True)
class Regression:
    """Rank correlation with the labels (SRCC); PLCC raw and fitted, KRCC, MAE, RMSE beside it.

    Intervals of the other metrics are `<metric>_low` and `<metric>_high`. A model whose outputs
    are all equal ranks nothing and scores 0. A metric that is not defined is left out.
    """

    kind: TaskKind = "regression"
    metric: str = "srcc"
    needs_reference: bool = False

    def quality(
        self, outputs: Mapping[str, Array], targets: Mapping[str, Array] | Array
    ) -> Quality:
        """Score one number per sample (the first output of N values) against labels [N].

        Raises:
            UnsupportedError: EB254, no such output, or all labels are equal.
        """
        y = _labels(targets).reshape(-1).astype(np.float64)
        x = one_number(outputs, len(y))
        if len(y) < 2 or np.ptp(y) == 0:
            raise UnsupportedError(
                "EB254",
                f"SRCC is not defined for {len(y)} samples whose labels are all equal",
                hint="give samples of different quality",
            )
        value = float(metrics.spearman(x, y)) if np.ptp(x) > 0 else 0.0
        draws = metrics.resamples(len(y))
        low, high = metrics.percentile_interval(metrics.spearman(x[draws], y[draws]), value)
        return Quality(self.metric, value, low, high, len(y), _regression_others(x, y, draws))


def _regression_others(x: Array, y: Array, draws: Array) -> dict[str, float]:
    error = x - y
    fitted = metrics.fit_logistic(x, y)
    xs, ys, errors = x[draws], y[draws], error[draws]
    found: dict[str, tuple[float, Array]] = {
        "plcc": (float(metrics.pearson(x, y)), metrics.pearson(xs, ys)),
        "mae": (float(np.abs(error).mean()), np.abs(errors).mean(axis=1)),
        "rmse": (float(np.sqrt((error**2).mean())), np.sqrt((errors**2).mean(axis=1))),
        "krcc": (metrics.kendall(x, y), metrics.one_at_a_time(metrics.kendall, x, y)),
    }
    if fitted is not None:
        some = draws[: metrics.SLOW_RESAMPLES]
        mapped = float(metrics.plcc_logistic(x, y, fitted))
        found["plcc_logistic"] = (mapped, metrics.refitted_plcc(x, y, some, fitted))
    others: dict[str, float] = {}
    for name, (value, values) in found.items():
        if np.isfinite(value):
            others[name] = value
            low, high = metrics.percentile_interval(values, value)
            others[f"{name}_low"], others[f"{name}_high"] = low, high
    return others


@dataclass(frozen=True, slots=True)
class Agreement:
    """Closeness to the original's outputs: 1 - noise power / signal power, mean over samples.

    0.99 is a signal-to-quantization-noise ratio of 20 dB. Several outputs count alike.
    """

    kind: TaskKind = "custom"
    metric: str = "fidelity"
    needs_reference: bool = True

    def quality(
        self, outputs: Mapping[str, Array], targets: Mapping[str, Array] | Array
    ) -> Quality:
        """Score against the original's outputs, name by name."""
        assert isinstance(targets, Mapping), "this task is scored against reference outputs"
        each = np.mean([metrics.fidelity(outputs[k], v) for k, v in targets.items()], axis=0)
        angle = np.mean([metrics.cosine(outputs[k], v) for k, v in targets.items()])
        value = float(each.mean())
        spread = each[metrics.resamples(len(each))].mean(axis=1)
        low, high = metrics.percentile_interval(spread, value)
        others = {"cosine": float(angle), "worst": float(each.min())}
        return Quality(self.metric, value, low, high, len(each), others)


@dataclass(frozen=True, slots=True)
class Custom:
    """The user's own `function(outputs, targets)`; higher must be better.

    It gets arrays [N, ...] (outputs in a dict by name unless there is one) and returns a float,
    or a dict whose first entry is the quality. The interval comes from calling it again on
    tenths of the set (batch means with Student's t).
    """

    function: UserFunction
    metric: str
    kind: TaskKind = "custom"
    needs_reference: bool = False

    def quality(
        self, outputs: Mapping[str, Array], targets: Mapping[str, Array] | Array
    ) -> Quality:
        """Score all samples.

        Raises:
            UsageError: EB163, the function raised or returned something else than numbers.
        """
        labels = _labels(targets)
        count = len(labels)
        metric, value, others = self._call(outputs, labels)
        folds = min(_FOLDS, count)
        parts = np.array_split(np.arange(count), folds)
        half = 0.0
        if folds > 1:
            values = [
                self._call({k: v[i] for k, v in outputs.items()}, labels[i])[1] for i in parts
            ]
            half = _T_QUANTILE[folds - 2] * float(np.std(values, ddof=1)) / float(np.sqrt(folds))
        return Quality(metric, value, value - half, value + half, count, others)

    def _call(
        self, outputs: Mapping[str, Array], labels: Array
    ) -> tuple[str, float, dict[str, float]]:
        given: Any = next(iter(outputs.values())) if len(outputs) == 1 else dict(outputs)
        answer = self.function(given, labels)
        named = dict(answer) if isinstance(answer, Mapping) else {self.metric: answer}
        try:
            numbers = {str(k): float(v) for k, v in named.items()}
        except (TypeError, ValueError):
            numbers = {}
        if not numbers or not all(np.isfinite(v) for v in numbers.values()):
            raise UsageError(
                "EB163",
                f"{self.function.where()}: {self.function.name}() returned {answer!r}",
                hint="a metric returns a finite float, or a dict of them, the quality first",
            )
        first = next(iter(numbers))
        return first, numbers.pop(first), numbers


def make(name: str) -> Task:
    """The task called `name`, or the user's own metric `file.py:function`.

    Raises:
        UsageError: EB168 no such task; EB161, EB162 the user's file.
    """
    if is_user_code(name):
        function = load_function(name, "metric")
        return Custom(function, function.name)
    made: dict[str, Task] = {
        "classification": Classification(),
        "regression": Regression(),
        "detection": detection.DetectionAgreement(),
        "agreement": Agreement(),
    }
    if name not in made:
        close = difflib.get_close_matches(name, NAMES, n=1)
        raise UsageError(
            "EB168",
            f"no task is called {name!r}",
            hint=f"did you mean {close[0]}?"
            if close
            else f"one of {', '.join(NAMES)}, or file.py:function",
        )
    return made[name]


def infer(program: Program, data: Data, output_shapes: Mapping[str, Shape]) -> Task:
    """The task that the labels and output shapes suggest.

    Integer labels mean classification, float labels regression; without labels the answers are
    compared with the original's: boxes if the outputs look like a detector's, else everything.
    """
    target = _first_target(data)
    if target is not None and target.size == 1:
        return Classification() if target.dtype.kind in "iub" else Regression()
    shapes = {k: output_shapes[k] for k in program.outputs}
    return detection.DetectionAgreement() if detection.find_outputs(shapes) else Agreement()


def class_scores(outputs: Mapping[str, Array]) -> Array:
    """The first output of shape [N, C] (or [N, C, 1, 1]), as [N, C].

    Raises:
        UnsupportedError: EB254.
    """
    for value in outputs.values():
        if value.ndim >= 2 and value.shape[1] > 1 and value[0].size == value.shape[1]:
            return value.reshape(value.shape[:2])
    raise _wrong_outputs("class scores [N, C]", outputs)


def one_number(outputs: Mapping[str, Array], count: int) -> Array:
    """The first output with one number per sample, as float64 [N].

    Raises:
        UnsupportedError: EB254.
    """
    for value in outputs.values():
        if value.size == count:
            return value.reshape(-1).astype(np.float64)
    raise _wrong_outputs(f"{count} numbers", outputs)


def check_labels(labels: Array, classes: int, where: str) -> None:
    """Refuse labels outside the model's classes.

    Raises:
        ArtifactError: EB547.
    """
    bad = labels[(labels < 0) | (labels >= classes) | (labels != np.floor(labels))]
    if len(bad):
        raise ArtifactError(
            "EB547",
            f"{where}: label {bad[0]:g} of {len(bad)} samples, the model has classes 0 to "
            f"{classes - 1}",
            hint="use data of the model's own classes, numbered from 0",
        )


def _first_target(data: Data) -> Array | None:
    sets: tuple[Dataset | None, ...] = (data.evaluation, data.calibration, data.train)
    given = next((d for d in sets if d is not None and len(d)), None)
    return None if given is None else given.sample(0).target


def _labels(targets: Mapping[str, Array] | Array) -> Array:
    assert not isinstance(targets, Mapping), "this task is scored against labels"
    return np.asarray(targets)


def _wrong_outputs(wanted: str, outputs: Mapping[str, Array]) -> UnsupportedError:
    found = ", ".join(f"{k} {list(v.shape)}" for k, v in outputs.items())
    return UnsupportedError(
        "EB254",
        f"the task wants {wanted}, the model gives {found}",
        hint="choose another --task, or your own metric: --task file.py:function",
    )
