"""Fit a classifier's output bias to the labels of the calibration samples.

A model met by data unlike its training data answers some classes too often; one number per
class mends that at no cost in the artifact. It is done only on clear evidence.

Source: bias-corrected softmax calibration, "Maximum Likelihood with Bias-Corrected Calibration
is Hard-To-Beat at Label Shift Adaptation", Alexandari et al., 2020.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from edgebudget import graph as graphs
from edgebudget.program import Note
from edgebudget.ranges import run_over

if TYPE_CHECKING:
    import onnx

    from edgebudget.events import Emit
    from edgebudget.quant_graph import Graph
    from edgebudget.workload import Array, Dataset
    from edgebudget_passes._assign import Assignment

_SIGMAS = 2.0  # standard errors by which the held-back likelihood must improve
_FOLDS = 4
LEAST = 256  # samples below which nothing is fitted


def last_layer(graph: Graph, assignment: Assignment) -> onnx.NodeProto | None:
    """The integer Gemm whose sums [N, classes] are the graph's only output, or None."""
    if len(graph.outputs) != 1:
        return None
    node = graph.producer.get(next(iter(graph.outputs)))
    if node is None or node.op_type != "Gemm" or node.name not in assignment.dtypes:
        return None
    plain = graphs.attributes(node).get("beta", 1.0) == 1.0  # else a shift would be scaled
    return node if plain and graph.has_weight(node) else None


def labels(dataset: Dataset, indices: Sequence[int], classes: int) -> Array | None:
    """Class numbers of samples, or None when a sample has none."""
    found = [dataset.sample(i).target for i in indices]
    if any(t is None or t.size != 1 or t.dtype.kind not in "iu" for t in found):
        return None
    numbers = np.array([int(t.reshape(())) for t in found if t is not None])
    return numbers if numbers.min() >= 0 and numbers.max() < classes else None


def logits(
    model: onnx.ModelProto, dataset: Dataset, indices: Sequence[int], emit: Emit, exact: bool
) -> Array:
    """The model's only output on some samples, [samples, classes]; `exact` is the target's."""
    found = run_over(model, dataset, indices, emit=emit, work="class biases", exact=exact)
    parts = [o for _, o in found]
    rows = np.concatenate([next(iter(o.values())) for o in parts])
    return rows[: len(indices)].astype(np.float64)


def fit(scores: Array, wanted: Array) -> Array:
    """Bias [classes], in units of the scores, of greatest posterior under a unit Gaussian prior.

    A temperature is fitted with it and then dropped: it moves no answer.
    """
    from scipy.optimize import minimize

    count, classes = scores.shape
    truth = np.eye(classes)[wanted]

    def loss(x: Array) -> tuple[float, Array]:
        bias, sharpness = x[:-1], math.exp(x[-1])
        z = scores * sharpness + bias
        z = z - z.max(axis=1, keepdims=True)
        log_p = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
        gap = (np.exp(log_p) - truth) / count
        slope = np.append(gap.sum(axis=0) + bias / count, (gap * scores).sum() * sharpness)
        value = -(log_p * truth).sum() / count + np.square(bias).sum() / (2 * count)
        return float(value), slope

    best = minimize(loss, np.zeros(classes + 1), jac=True, method="L-BFGS-B").x
    shift: Array = (best[:-1] - best[:-1].mean()) / math.exp(best[-1])
    return shift.astype(np.float32)


def judge(scores: Array, wanted: Array) -> tuple[bool, Note]:
    """Whether fitting clearly helps samples that it has not seen: likelihood and top-1.

    Every sample is judged once, by what was fitted without its quarter of the samples.
    """
    folds = np.arange(len(wanted)) % _FOLDS
    gains, right = np.empty(len(wanted)), np.zeros((2, len(wanted)), bool)
    for fold in range(_FOLDS):
        held, rest = folds == fold, folds != fold
        shift = fit(scores[rest], wanted[rest])
        sharpness = _sharpness(scores[rest], wanted[rest])
        moved = scores[held] + shift
        before, after = (_nll(s * sharpness, wanted[held]) for s in (scores[held], moved))
        gains[held] = before - after
        right[0, held], right[1, held] = (
            s.argmax(axis=1) == wanted[held] for s in (scores[held], moved)
        )
    error = float(gains.std(ddof=1)) / math.sqrt(len(gains))
    top1 = right.mean(axis=1)
    ok = float(gains.mean()) > _SIGMAS * error and bool(top1[1] >= top1[0])
    why = (
        f"held-back likelihood {gains.mean():+.3f} +- {error:.3f} nats, "
        f"top-1 {top1[0]:.3f} -> {top1[1]:.3f} on {len(wanted)} labelled samples"
    )
    return ok, Note("class biases", "fitted to labels" if ok else "left as they were", why)


def _sharpness(scores: Array, wanted: Array) -> float:
    grid = np.geomspace(0.1, 3.0, 35)
    return float(min(grid, key=lambda t: float(_nll(scores * t, wanted).mean())))


def _nll(z: Array, wanted: Array) -> Array:
    z = z - z.max(axis=1, keepdims=True)
    loss: Array = np.log(np.exp(z).sum(axis=1)) - z[np.arange(len(wanted)), wanted]
    return loss
