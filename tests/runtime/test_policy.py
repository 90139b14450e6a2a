"""Choices are the best that fits, never refuse to answer, and say what they break."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgebudget_runtime import policy as p
from edgebudget_runtime.cost import Cost
from edgebudget_runtime.elastic import OperatingPoint
from edgebudget_runtime.errors import UsageError
from edgebudget_runtime.latency_bound import Latencies

# A chain with three exits, and a network of its own between the second and the third.
OPTIONS = (
    p.Option("exit3", ("s0", "s1", "s2"), 0.90, 30.0, 9.0),
    p.Option("exit1", ("s0",), 0.70, 10.0, 3.0),
    p.Option("small", ("n",), 0.85, 22.0, 7.0),
    p.Option("exit2", ("s0", "s1"), 0.80, 20.0, 6.0),
)
FRONT = p.prepare(OPTIONS)


@dataclass(frozen=True)
class Table:
    """Bounds that are given, segment by segment."""

    front: p.Front
    ms: Mapping[str, float]
    slowdown: float = 1.0

    @property
    def whole_ms(self) -> Sequence[float]:
        return [self.rest_ms(i, 0) for i in range(len(self.front.options))]

    @property
    def reach_ms(self) -> Sequence[float]:
        whole = self.whole_ms
        return [min(whole[i:]) for i in range(len(whole))]

    def rest_ms(self, option: int, done: int) -> float:
        return sum(self.ms[s] for s in self.front.options[option].path[done:])


BOUNDS = Table(FRONT, {"s0": 3.0, "s1": 3.0, "s2": 3.0, "n": 7.0})


def ran(choice: p.Choice) -> str:
    return FRONT.options[choice.place].id


def place(id: str) -> int:
    return FRONT.index[id]


@pytest.mark.parametrize(
    ("ask", "id", "breaks"),
    [
        (p.Ask(), "exit3", ()),
        (p.Ask(latency_ms=9.0), "exit3", ()),
        (p.Ask(latency_ms=8.0), "small", ()),
        (p.Ask(latency_ms=6.5), "exit2", ()),
        (p.Ask(latency_ms=1.0), "exit1", ("latency_ms",)),
        (p.Ask(latency_ms=-5.0), "exit1", ("latency_ms",)),
        (p.Ask(energy_mj=8.0), "small", ()),
        (p.Ask(latency_ms=8.0, energy_mj=6.0), "exit2", ()),
        (p.Ask(latency_ms=8.0, energy_mj=1.0), "exit1", ("energy_mj",)),
        (p.Ask(latency_ms=1.0, energy_mj=1.0), "exit1", ("latency_ms", "energy_mj")),
    ],
)
def test_the_best_that_fits_or_the_cheapest(ask: p.Ask, id: str, breaks: tuple[str, ...]) -> None:
    for policy in (p.best_within, p.deadline):
        choice = p.decide(policy, FRONT, ask, BOUNDS)
        assert (ran(choice), choice.breaks) == (id, breaks)


def test_a_slowdown_shrinks_what_fits() -> None:
    slow = Table(FRONT, BOUNDS.ms, slowdown=2.0)
    assert ran(p.best_within(FRONT, p.Ask(latency_ms=13.0), slow)) == "exit2"


options = st.lists(
    st.tuples(
        st.none() | st.integers(0, 5),
        st.floats(1, 100),
        st.none() | st.floats(0.1, 9),
        st.floats(0.1, 9) | st.just(math.inf),
    ),
    min_size=1,
    max_size=12,
)
limits = st.none() | st.floats(-1, 12)


@given(options, limits, limits)
def test_bisection_finds_what_a_search_finds(
    drawn: list[tuple[int | None, float, float | None, float]],
    latency_ms: float | None,
    energy_mj: float | None,
) -> None:
    made = [p.Option(str(i), (str(i),), q, m, e) for i, (q, m, e, _) in enumerate(drawn)]
    front = p.prepare(made)
    bounds = Table(front, {str(i): ms for i, (_, _, _, ms) in enumerate(drawn)})
    ask = p.Ask(latency_ms=latency_ms, energy_mj=energy_mj)
    choice = p.best_within(front, ask, bounds)
    fitting = [
        i
        for i, option in enumerate(front.options)
        if (latency_ms is None or bounds.ms[option.id] <= latency_ms)
        and (energy_mj is None or (option.energy_mj is not None and option.energy_mj <= energy_mj))
    ]
    assert bool(choice.breaks) == (not fitting)
    if fitting:
        qualities = [front.options[i].quality for i in fitting]
        known = [q for q in qualities if q is not None]
        assert front.options[choice.place].quality == (max(known) if known else None)


def test_unknown_energy_fits_no_energy_limit() -> None:
    front = p.prepare([p.Option("a", ("a",), 0.5, 1.0, None)])
    bounds = Table(front, {"a": 1.0})
    assert p.best_within(front, p.Ask(energy_mj=1e9), bounds).breaks == ("energy_mj",)
    assert p.best_within(front, p.Ask(latency_ms=1.0), bounds).breaks == ()


@pytest.mark.parametrize(
    ("done", "left_ms", "id"),
    [
        (("s0",), 6.0, "exit3"),
        (("s0",), 5.0, "exit2"),
        (("s0",), 2.0, "exit1"),
        (("s0", "s1"), 3.0, "exit3"),
        (("s0", "s1"), 2.9, "exit2"),
        (("s0", "s1"), -1.0, "exit2"),
        (("s0", "s1", "s2"), 99.0, "exit3"),
        (("n",), 99.0, "small"),
    ],
)
def test_a_deadline_is_replanned_after_every_answer(
    done: tuple[str, ...], left_ms: float, id: str
) -> None:
    ask = p.Ask(latency_ms=left_ms, ran=done, chosen=place("exit2"))
    choice = p.decide(p.deadline, FRONT, ask, BOUNDS)
    assert ran(choice) == id
    assert choice.breaks == ()


def test_energy_already_spent_is_not_counted_twice() -> None:
    ask = p.Ask(energy_mj=3.5, ran=("s0",), chosen=place("exit1"))
    assert ran(p.deadline(FRONT, ask, BOUNDS)) == "exit2"


def test_a_chain_without_an_answer_yet_goes_on_to_the_nearest() -> None:
    front = p.prepare(
        [p.Option("b", ("a", "b"), 0.5, 2.0), p.Option("c", ("a", "b", "c"), 0.6, 3.0)]
    )
    bounds = Table(front, {"a": 1.0, "b": 1.0, "c": 1.0})
    choice = p.deadline(front, p.Ask(latency_ms=0.5, ran=("a",), chosen=1), bounds)
    assert front.options[choice.place].id == "b"
    assert choice.breaks == ("latency_ms",)


def test_a_deeper_answer_that_is_no_better_is_not_run() -> None:
    front = p.prepare([p.Option("a", ("a",), 0.6, 1.0), p.Option("worse", ("a", "b"), 0.5, 2.0)])
    bounds = Table(front, {"a": 1.0, "b": 1.0})
    choice = p.deadline(front, p.Ask(latency_ms=99.0, ran=("a",), chosen=1), bounds)
    assert front.options[choice.place].id == "a"


def point(**thresholds: float) -> OperatingPoint:
    return OperatingPoint("p", ("s0", "s1", "s2"), thresholds, {}, Cost(), None, None)


@pytest.mark.parametrize(
    ("done", "confidence", "left_ms", "id"),
    [
        ((), None, None, "exit1"),
        (("s0",), 0.95, None, "exit1"),
        (("s0",), 0.85, None, "exit2"),
        (("s0", "s1"), 0.99, None, "exit3"),  # no threshold there
        (("s0",), 0.1, 2.0, "exit1"),  # not sure, and no time
        ((), None, 2.0, "exit1"),
        (("s0",), None, None, "exit2"),
    ],
)
def test_thresholds(
    done: tuple[str, ...], confidence: float | None, left_ms: float | None, id: str
) -> None:
    policy = p.Thresholds(point(s0=0.9))
    ask = p.Ask(latency_ms=left_ms, ran=done, confidence=confidence)
    choice = p.decide(policy, FRONT, ask, BOUNDS)
    assert ran(choice) == id
    assert choice.breaks == (("latency_ms",) if not done and left_ms else ())


def test_pacing_follows_the_fill() -> None:
    found = [ran(p.paced(FRONT, p.Ask(fill=f), BOUNDS)) for f in (0.0, 0.49, 0.5, 1.0)]
    # exit2 lies below the line from exit1 to small.
    assert [FRONT.options[i].id for i in FRONT.paced] == ["exit1", "small", "exit3"]
    assert found == ["exit1", "small", "small", "exit3"]
    late = p.paced(FRONT, p.Ask(latency_ms=1.0, fill=1.0), BOUNDS)
    assert (ran(late), late.breaks) == ("exit1", ("latency_ms",))
    going = p.Ask(ran=("s0",), chosen=place("exit1"), fill=0.0)
    assert ran(p.paced(FRONT, going, BOUNDS)) == "exit1"


@given(st.floats(3.0, 9.0))
def test_pacing_settles_at_the_income_on_neighbours_of_the_hull(income: float) -> None:
    capacity = level = 400.0
    spent: list[str] = []
    for _ in range(2000):
        level = min(level + income, capacity)
        choice = p.paced(FRONT, p.Ask(energy_mj=level, fill=level / capacity), BOUNDS)
        spent.append(ran(choice))
        level -= FRONT.energy_mj[choice.place]
        assert level >= 0
    last = spent[-500:]
    mean = sum(FRONT.energy_mj[place(i)] for i in last) / len(last)
    assert mean == pytest.approx(income, rel=0.02)
    assert set(last) in [{"exit1"}, {"exit1", "small"}, {"small"}, {"small", "exit3"}, {"exit3"}]


def test_fixed_says_what_it_breaks() -> None:
    choice = p.decide(p.Fixed("small"), FRONT, p.Ask(latency_ms=2.0, energy_mj=7.0), BOUNDS)
    assert (ran(choice), choice.breaks) == ("small", ("latency_ms",))
    with pytest.raises(UsageError, match="EB180"):
        p.decide(p.Fixed("none"), FRONT, p.Ask(), BOUNDS)


@pytest.mark.parametrize("answer", [p.Choice(-1), p.Choice(99), p.Choice(0), None])
def test_a_users_policy_is_not_believed_blindly(answer: p.Choice | None) -> None:
    def policy(front: p.Front, ask: p.Ask, bounds: p.Bounds) -> p.Choice:
        return answer  # type: ignore[return-value]

    with pytest.raises(UsageError, match="EB181"):
        p.decide(policy, FRONT, p.Ask(ran=("n",), chosen=2), BOUNDS)


def test_measured_latencies_are_bounds() -> None:
    samples = {"s0": [3.0] * 200, "s1": [3.0] * 200, "s2": [3.0] * 200, "n": [7.0] * 200}
    measured = Latencies([o.path for o in FRONT.options], samples)
    for left in (1.0, 3.0, 6.0, 7.5, 9.0, 50.0):
        ask = p.Ask(latency_ms=left)
        assert p.deadline(FRONT, ask, measured) == p.deadline(FRONT, ask, BOUNDS)
