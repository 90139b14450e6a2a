"""How well the boxes of one detector match those of another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from edgebudget import metrics
from edgebudget.workload import Array, Quality, TaskKind
from edgebudget_runtime.errors import UnsupportedError

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class DetectionAgreement:
    """Boxes of the compressed model against those of the original, no labels needed.

    A box counts when the best score of its object classes passes `threshold`. Every box of the
    original takes its best IoU among the other model's boxes of the same class; a box whose best
    IoU is under `lost_below`, or that finds none, is lost and counts as IoU 0.
    Quality is the mean IoU over the original's boxes; the interval resamples pictures.
    Boxes [N, A, 4] are corners (x0, y0, x1, y1); scores are [N, A, C].
    """

    threshold: float = 0.7
    lost_below: float = 0.5
    kind: TaskKind = "detection"
    metric: str = "box_iou"
    needs_reference: bool = True

    def quality(
        self, outputs: Mapping[str, Array], targets: Mapping[str, Array] | Array
    ) -> Quality:
        """Score against the original's outputs.

        Raises:
            UnsupportedError: EB253, no scores and boxes among the outputs, or the original
                found no box at all.
        """
        assert isinstance(targets, Mapping), "this task is scored against reference outputs"
        names = find_outputs({k: v.shape for k, v in targets.items()})
        if names is None:
            raise not_a_detector({k: v.shape for k, v in targets.items()})
        # The original decides, because quantized scores need not sum to one exactly.
        background = _has_background(targets[names[0]])
        theirs = _boxes(targets, names, self.threshold, background)
        ours = _boxes(outputs, names, self.threshold, background)
        count = len(theirs)
        total, best, lost, spurious = (np.zeros(count) for _ in range(4))
        for i, (a, b) in enumerate(zip(theirs, ours, strict=True)):
            found = best_iou(a, b)
            kept = found >= self.lost_below
            total[i], best[i], lost[i] = len(found), found[kept].sum(), (~kept).sum()
            spurious[i] = (best_iou(b, a) < self.lost_below).sum()
        if total.sum() == 0:
            raise UnsupportedError(
                "EB253",
                f"the original finds no box above {self.threshold} in {count} pictures",
                hint="give pictures that show what the model detects",
            )
        value = float(best.sum() / total.sum())
        draws = metrics.resamples(count)
        with np.errstate(invalid="ignore"):
            spread = best[draws].sum(axis=1) / total[draws].sum(axis=1)
        low, high = metrics.percentile_interval(spread, value)
        others = {
            "matched": float(1 - lost.sum() / total.sum()),
            "boxes": float(total.sum()),
            "lost": float(lost.sum()),
            "spurious": float(spurious.sum()),
        }
        return Quality(self.metric, value, low, high, count, others)


def find_outputs(shapes: Mapping[str, Shape]) -> tuple[str, str] | None:
    """Names of the scores [*, A, C] and boxes [*, A, 4] outputs, or None if it is no detector."""
    flat = {k: s for k, s in shapes.items() if len(s) == 3}
    boxes = [k for k, s in flat.items() if s[2] == 4]
    named = [k for k in boxes if "box" in k.lower()]
    for box in named or boxes:
        scores = [k for k, s in flat.items() if k != box and s[1] == flat[box][1]]
        if scores:
            preferred = [k for k in scores if "score" in k.lower() or "conf" in k.lower()]
            return (preferred or scores)[0], box
    return None


def not_a_detector(shapes: Mapping[str, Shape]) -> UnsupportedError:
    """The error for outputs without scores and boxes."""
    found = ", ".join(f"{k} {list(s)}" for k, s in shapes.items())
    return UnsupportedError(
        "EB253",
        f"no scores [N, A, C] and boxes [N, A, 4] among the outputs: {found}",
        hint="use --task agreement, or your own metric: --task file.py:function",
    )


def best_iou(boxes: Array, among: Array) -> Array:
    """For each row (class, x0, y0, x1, y1) its best IoU among rows of the same class, or 0."""
    if len(boxes) == 0 or len(among) == 0:
        return np.zeros(len(boxes))
    a, b = boxes[:, None, 1:], among[None, :, 1:]
    low, high = np.maximum(a[..., :2], b[..., :2]), np.minimum(a[..., 2:], b[..., 2:])
    shared = np.clip(high - low, 0, None).prod(axis=-1)
    union = _area(a) + _area(b) - shared
    iou = np.where(union > 0, shared / np.where(union > 0, union, 1.0), 0.0)
    iou = np.where(boxes[:, None, 0] == among[None, :, 0], iou, 0.0)
    found: Array = iou.max(axis=1)
    return found


def _area(boxes: Array) -> Array:
    area: Array = np.clip(boxes[..., 2:] - boxes[..., :2], 0, None).prod(axis=-1)
    return area


def _has_background(scores: Array) -> bool:
    """Whether scores are a softmax over classes, whose first one is then the background."""
    if scores.shape[2] < 2:
        return False
    return bool((np.abs(scores.sum(axis=2, dtype=np.float64) - 1) < 1e-2).all())


def _boxes(
    outputs: Mapping[str, Array], names: tuple[str, str], threshold: float, background: bool
) -> list[Array]:
    """Per picture, rows (class, x0, y0, x1, y1) of the boxes whose score passes."""
    scores, boxes = (outputs[n].astype(np.float64) for n in names)
    scores = scores[:, :, 1:] if background else scores
    best, label = scores.max(axis=2), scores.argmax(axis=2)
    passed = best > threshold
    rows = np.concatenate([label[..., None].astype(np.float64), boxes], axis=2)
    return [r[p] for r, p in zip(rows, passed, strict=True)]
