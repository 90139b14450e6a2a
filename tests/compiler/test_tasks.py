"""Tasks: values, intervals, choice, and refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgebudget import tasks
from edgebudget.datasets import Arrays
from edgebudget.detection import DetectionAgreement, best_iou
from edgebudget.program import Program, TensorSpec
from edgebudget.workload import Array, Data, Quality
from edgebudget_runtime.errors import ArtifactError, EdgeBudgetError, UnsupportedError, UsageError

RNG = np.random.default_rng(3)
SCORES = np.array([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]], np.float32)
BOX = np.array([[0.1, 0.1, 0.5, 0.5], [0.6, 0.6, 0.9, 0.9], [0.0, 0.0, 0.2, 0.2]], np.float32)


def detector(scores: Array, boxes: Array) -> dict[str, Array]:
    return {"scores": scores[None], "boxes": boxes[None]}


def test_top1_counts_hits_inside_its_interval() -> None:
    found = tasks.Classification().quality({"out": np.eye(7)[[0, 1, 2, 3]]}, np.array([0, 1, 2, 6]))
    assert (found.value, found.count) == (0.75, 4)
    assert found.low < 0.75 < found.high
    assert found.others["top5"] == 0.75  # ties go to the low classes


@pytest.mark.parametrize("labels", [[0, 1, 2], [0, -1, 1]])
def test_labels_outside_the_classes_are_refused(labels: list[int]) -> None:
    with pytest.raises(ArtifactError, match=r"EB547.*classes 0 to 1"):
        tasks.Classification().quality({"out": SCORES}, np.array(labels))


def test_labels_that_are_no_class_numbers_are_refused() -> None:
    with pytest.raises(ArtifactError, match=r"EB547.*0\.5"):
        tasks.Classification().quality({"out": SCORES}, np.array([0.0, 0.5, 1.0]))


@settings(max_examples=15, deadline=None)
@given(st.integers(3, 40), st.integers(0, 2**31))
def test_regression_values_lie_in_their_intervals(count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    y = rng.normal(size=count)
    found = tasks.Regression().quality({"out": (y + rng.normal(size=count))[:, None]}, y)
    assert found.low <= found.value <= found.high
    for name in ("plcc", "krcc", "mae", "rmse"):
        others = found.others
        assert others[f"{name}_low"] <= others[name] <= others[f"{name}_high"]
    assert found.others["mae"] <= found.others["rmse"]


def test_an_output_without_ranks_scores_nothing_and_equal_labels_are_refused() -> None:
    y = np.arange(5.0)
    found = tasks.Regression().quality({"out": np.ones(5)}, y)
    assert found.value == 0.0
    assert "plcc" not in found.others
    with pytest.raises(UnsupportedError, match="EB254"):
        tasks.Regression().quality({"out": y}, np.ones(5))


def test_outputs_of_another_kind_are_refused_with_their_shapes() -> None:
    with pytest.raises(UnsupportedError, match=r"EB254.*map \[2, 8, 8\]"):
        tasks.Regression().quality({"map": np.zeros((2, 8, 8))}, np.arange(2.0))
    with pytest.raises(UnsupportedError, match=r"EB254.*\[N, C\]"):
        tasks.Classification().quality({"map": np.zeros((2, 8, 8))}, np.arange(2))


def test_equal_boxes_agree_entirely_and_a_lost_one_counts_zero() -> None:
    task = DetectionAgreement()
    reference = detector(SCORES, BOX)  # boxes 0 and (at 0.7, not above) none of 2
    same = task.quality(reference, reference)
    assert (same.value, same.low, same.high) == (1.0, 1.0, 1.0)
    assert (same.others["boxes"], same.others["lost"], same.others["spurious"]) == (1, 0, 0)
    gone = task.quality(detector(np.array([[0.5, 0.5]] * 3, np.float32), BOX), reference)
    assert (gone.value, gone.others["lost"], gone.others["matched"]) == (0.0, 1, 0.0)


def test_shifted_boxes_count_their_overlap_and_new_ones_are_spurious() -> None:
    scores = np.array([[0.1, 0.9], [0.8, 0.2], [0.1, 0.9]], np.float32)
    shifted = BOX + np.array([0.1, 0, 0.1, 0], np.float32)
    found = DetectionAgreement().quality(detector(scores, shifted), detector(SCORES, BOX))
    assert found.value == pytest.approx(0.6, abs=1e-6)  # 0.12 / (0.16 + 0.16 - 0.12)
    assert found.others["spurious"] == 1


def test_scores_quantized_off_their_sum_still_drop_the_background() -> None:
    coarse = np.array([[0.1, 0.95], [0.98, 0.2], [0.3, 0.6]], np.float32)
    found = DetectionAgreement().quality(detector(coarse, BOX), detector(SCORES, BOX))
    assert (found.value, found.others["spurious"]) == (1.0, 0)


def test_boxes_of_another_class_do_not_match() -> None:
    a = np.array([[0, 0.0, 0, 1, 1]])
    assert best_iou(a, a)[0] == 1.0
    assert best_iou(a, np.array([[1, 0.0, 0, 1, 1]]))[0] == 0.0


def test_a_detector_that_finds_nothing_cannot_be_compared() -> None:
    nothing = detector(np.array([[0.9, 0.1]] * 3, np.float32), BOX)
    with pytest.raises(UnsupportedError, match=r"EB253.*no box above 0\.7"):
        DetectionAgreement().quality(nothing, nothing)
    with pytest.raises(UnsupportedError, match=r"EB253.*logits \[2, 5\]"):
        DetectionAgreement().quality({}, {"logits": np.zeros((2, 5))})


def test_agreement_is_one_for_equal_outputs_only() -> None:
    outputs = {"a": RNG.normal(size=(6, 4)), "b": RNG.normal(size=(6, 2, 2))}
    assert tasks.Agreement().quality(outputs, outputs).value == 1.0
    noisy = {k: v + 0.1 * RNG.normal(size=v.shape) for k, v in outputs.items()}
    found = tasks.Agreement().quality(noisy, outputs)
    assert found.low <= found.value <= found.high
    assert 0.8 < found.value < 1
    assert found.others["worst"] <= found.value


def custom(folder: Path, body: str) -> Quality:
    file = folder / "mine.py"
    file.write_text(f"import numpy as np\n\ndef metric(outputs, labels):\n    {body}\n")
    task = tasks.make(f"{file}:metric")
    return task.quality({"out": np.arange(20.0)}, np.arange(20.0) % 3)


def test_the_users_metric_gets_arrays_and_an_interval(tmp_path: Path) -> None:
    found = custom(tmp_path, "return {'hits': np.mean(outputs > 4), 'most': outputs.max()}")
    assert (found.metric, found.value, found.count) == ("hits", 0.75, 20)
    assert found.low < 0.75 < found.high
    assert found.others == {"most": 19.0}


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("return 'good'", r"mine\.py:3: metric\(\) returned 'good'"),
        ("return float('nan')", "returned nan"),
        ("return outputs / labels.missing", r"mine\.py:4: metric\(\) raised AttributeError"),
    ],
)
def test_a_metric_that_fails_is_one_line(tmp_path: Path, body: str, what: str) -> None:
    with pytest.raises(UsageError, match=f"EB163.*{what}"):
        custom(tmp_path, body)


def test_a_misspelt_task_gets_a_suggestion() -> None:
    with pytest.raises(UsageError, match=r"EB168(.|\n)*did you mean classification"):
        tasks.make("clasification")


@pytest.mark.parametrize(
    ("labels", "shapes", "metric"),
    [
        (np.zeros(3, np.int64), {"o": (1, 5)}, "top1"),
        (np.zeros(3, np.float32), {"o": (1, 1)}, "srcc"),
        (None, {"s": (1, 9, 2), "b": (1, 9, 4)}, "box_iou"),
        (None, {"o": (1, 5)}, "fidelity"),
    ],
)
def test_labels_and_outputs_suggest_the_task(
    labels: Array | None, shapes: dict[str, tuple[int, ...]], metric: str
) -> None:
    program = Program("module", None, (TensorSpec("x", (1, 2)),), tuple(shapes))
    data = Data(evaluation=Arrays("d", {"x": np.zeros((3, 2), np.float32)}, labels))
    assert tasks.infer(program, data, shapes).metric == metric


def test_every_refusal_has_a_hint() -> None:
    with pytest.raises(EdgeBudgetError) as caught:
        tasks.make("nothing-like-it")
    assert caught.value.hint
