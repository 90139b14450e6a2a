"""Operating points: figures of the evaluation set, and the rule that the runtime follows."""

from __future__ import annotations

import numpy as np
import pytest

from edgebudget.evaluate import Predictions
from edgebudget.exit_signals import area, choose_signal, margin
from edgebudget.operating_points import Answers, Promise, mean_cost, solve_points
from edgebudget.tasks import Classification, Regression
from edgebudget.workload import Array
from edgebudget_runtime.confidence import signal
from edgebudget_runtime.cost import Cost, Figure, counted

PATH = ("s0", "s1", "s2")
COSTS = tuple(
    Cost(macs=counted(c, "counted"), size_bytes=counted(10 * c, "bytes")) for c in (10, 40, 100)
)


def drawn(count: int, seed: int) -> tuple[Predictions, ...]:
    """Scores of three exits for ten classes; deeper ones know more."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, count)
    noise = rng.normal(size=(count, 10)) * rng.gamma(2.0, 0.8, (count, 1))
    found = []
    for strength in (1.8, 2.8, 3.4):
        scores = noise + 0.5 * rng.normal(size=(count, 10))
        scores[np.arange(count), labels] += strength
        found.append(Predictions({"scores": (2 * scores).astype(np.float32)}, labels))
    return tuple(found)


def answers(held: int = 800, evaluation: int = 1500) -> Answers:
    return Answers(PATH, "scores", COSTS, drawn(held, 1), drawn(evaluation, 2))


def hits(predictions: Predictions) -> Array:
    assert predictions.labels is not None
    right: Array = predictions.outputs["scores"].argmax(axis=1) == predictions.labels
    return right


def test_figures_are_what_the_rule_gives_on_the_evaluation_set() -> None:
    given = answers()
    found = solve_points(given, Classification())
    assert given.evaluation is not None
    assert len(found.points) >= 5
    exits = {e.segment: e for e in found.exits}
    for point in found.points:
        ends = np.full(1500, len(point.path) - 1)
        for k in reversed(range(len(point.path) - 1)):
            threshold = point.thresholds.get(point.path[k])
            if threshold is not None:
                e = exits[point.path[k]]
                scores = given.evaluation[k].outputs["scores"]
                ends[signal(scores, e.signal, e.temperature) >= threshold] = k
        macs = np.array([10.0, 40.0, 100.0])[ends]
        assert point.mean_cost.macs.value == pytest.approx(macs.mean())
        assert point.mean_cost.macs.evidence == "measured"
        assert point.mean_cost.macs.count == 1500
        assert point.mean_cost.size_bytes == COSTS[len(point.path) - 1].size_bytes
        assert sum(point.shares.values()) == pytest.approx(1.0)
        assert point.shares[point.path[0]] == pytest.approx((ends == 0).mean())
        right = np.stack([hits(p) for p in given.evaluation])[ends, np.arange(1500)]
        assert point.quality is not None
        assert point.quality.value == pytest.approx(right.mean())
        assert "evaluation" in point.quality.how
    costs = [p.mean_cost.macs.value or 0.0 for p in found.points]
    assert costs == sorted(costs)


def test_points_beat_mixing_exits_at_random() -> None:
    given = answers()
    assert given.evaluation is not None
    single = [float(hits(p).mean()) for p in given.evaluation]
    for point in solve_points(given, Classification()).points:
        assert point.quality is not None
        at = point.mean_cost.macs.value
        assert at is not None
        assert point.quality.value > np.interp(at, [10, 40, 100], single)


def test_a_promise_rests_on_samples_of_its_own() -> None:
    found = solve_points(answers(2000), Classification(), promise=Promise(0.03, 0.9))
    assert found.certified in found.points
    assert found.certified is not None
    certificate = found.certified.certificate
    assert certificate is not None
    assert (certificate.max_drop, certificate.confidence, certificate.count) == (0.03, 0.9, 1000)
    assert all(f.count == 1000 for f in found.fitted)
    assert "the whole chain" in certificate.how
    assert [p for p in found.points if p.certificate] == [found.certified]


def test_the_same_samples_give_the_same_points() -> None:
    promise = Promise(0.1, 0.9)
    first, again = (
        solve_points(answers(300, 300), Classification(), promise=promise) for _ in range(2)
    )
    assert first == again


def test_a_task_without_right_and_wrong_declines() -> None:
    each = tuple(Predictions({"scores": np.zeros((4, 1))}, np.zeros(4)) for _ in PATH)
    found = solve_points(Answers(PATH, "scores", COSTS, each, each), Regression())
    assert found.points == ()
    assert found.exits == ()
    assert "srcc" in found.declined
    unlabelled = tuple(Predictions(p.outputs, None) for p in drawn(10, 0))
    given = Answers(PATH, "scores", COSTS, unlabelled, None)
    assert "labels" in solve_points(given, Classification()).declined


def test_without_evaluation_data_figures_say_so() -> None:
    given = Answers(PATH, "scores", COSTS, drawn(500, 1), None)
    for point in solve_points(given, Classification()).points:
        assert point.quality is not None
        assert "solved on" in point.quality.how
        assert point.mean_cost.macs.count == 500


def test_mean_cost_is_no_surer_than_its_weakest_part() -> None:
    def cost(ms: float | None, evidence: str) -> Cost:
        figure = Figure(value=ms, evidence=evidence)  # type: ignore[arg-type]
        return Cost(macs=counted(1, "x"), latency_ms=figure)

    ends = np.array([0, 1, 1, 1])
    mixed = mean_cost([cost(1.0, "measured"), cost(3.0, "modelled")], ends, "here")
    assert (mixed.latency_ms.value, mixed.latency_ms.evidence) == (2.5, "modelled")
    unknown = mean_cost([cost(1.0, "measured"), cost(None, "unknown")], ends, "here")
    assert unknown.latency_ms.value is None
    assert unknown.energy_mj.value is None


def test_area_prefers_signals_that_find_what_the_whole_gets_right() -> None:
    rng = np.random.default_rng(0)
    here, whole = (rng.random((2, 500)) < [[0.6], [0.9]]).astype(float)
    oracle = area(here - whole, here, whole)
    blind = area(np.zeros(500), here, whole)
    assert oracle > area(rng.random(500), here, whole)
    assert blind == pytest.approx((here.mean() + whole.mean()) / 2)
    assert area(np.arange(500.0), here, whole) == pytest.approx(
        area(np.arange(500.0) * 3 - 1, here, whole)
    )


def test_chooses_the_signal_of_larger_area() -> None:
    rng = np.random.default_rng(1)
    scores = rng.normal(size=(600, 4))
    shifted = scores + 10 * rng.random((600, 1))  # energy then tells of the shift alone
    right = signal(scores, "max_softmax", 1.0) > rng.random(600)
    correct = np.stack([right, np.ones(600)]).astype(float)
    chosen = choose_signal([shifted, shifted], [1.0, 1.0], correct)
    assert chosen.signal == "max_softmax"
    assert chosen.areas["max_softmax"] > chosen.areas["energy"]
    right = signal(shifted, "energy", 1.0) > 10 * rng.random(600)
    correct = np.stack([right, np.ones(600)]).astype(float)
    assert choose_signal([shifted, shifted], [1.0, 1.0], correct).signal == "energy"


def test_margin_is_the_gap_of_the_two_best() -> None:
    scores = np.log([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1]])
    assert margin(scores, 1.0) == pytest.approx([0.2, 0.7])
