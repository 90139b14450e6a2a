"""The Pareto set of sub-networks: not dominated, not noise, and few."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from edgebudget.pareto import Point, pareto
from edgebudget.workload import Array

_POINTS = st.lists(
    st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=12
)


def made(rows: list[tuple[int, int, int]]) -> list[Point]:
    return [Point(f"p{i}", {"macs": a, "bytes": b}, q / 10) for i, (a, b, q) in enumerate(rows)]


@settings(max_examples=60, deadline=None)
@given(rows=_POINTS, limit=st.integers(1, 5))
def test_keeps_no_dominated_point_and_both_ends(
    rows: list[tuple[int, int, int]], limit: int
) -> None:
    points = {p.id: p for p in made(rows)}
    front = pareto(list(points.values()), limit)
    kept = [points[i] for i in front.kept]
    assert set(front.kept) | set(front.dropped) == set(points)
    assert not set(front.kept) & set(front.dropped)
    assert len(kept) <= max(limit, 1)
    for p in kept:
        for q in points.values():
            no_worse = q.quality >= p.quality and all(q.costs[k] <= v for k, v in p.costs.items())
            assert not no_worse or (q.quality == p.quality and q.costs == p.costs)
    assert max(p.quality for p in kept) == max(p.quality for p in points.values())
    if limit > 1:
        cheapest = min(p.costs["macs"] for p in points.values())
        assert min(p.costs["macs"] for p in kept) == cheapest


def test_a_gain_within_the_noise_is_not_worth_a_cost() -> None:
    rng = np.random.default_rng(0)
    cheap = (rng.random(1000) < 0.8).astype(float)
    lucky = cheap.copy()
    flipped = rng.permutation(1000)[:41]
    lucky[flipped] = 1 - lucky[flipped]
    better = cheap.copy()
    better[np.flatnonzero(cheap == 0)[:60]] = 1
    best = better.copy()
    best[np.flatnonzero(better == 0)[:40]] = 1

    def point(name: str, macs: float, scores: Array) -> Point:
        return Point(name, {"macs": macs}, float(scores.mean()), scores)

    if lucky.mean() <= cheap.mean():
        lucky[np.flatnonzero(lucky == 0)[:1]] = 1
    given_ = [
        point("cheap", 1, cheap), point("lucky", 2, lucky),
        point("better", 3, better), point("best", 4, best),
    ]  # fmt: skip
    front = pareto(given_)
    assert front.kept == ("cheap", "better", "best")
    assert "cheap" in front.dropped["lucky"]


def test_the_best_stays_even_if_only_by_chance() -> None:
    points = [Point("a", {"macs": 1}, 0.80, error=0.02), Point("b", {"macs": 2}, 0.81, error=0.02)]
    assert pareto(points).kept == ("a", "b")


def test_thinning_keeps_the_knees() -> None:
    # A staircase with two clear knees (2 and 8) among points that hardly differ from them.
    rows = [(1, 0.1), (2, 0.60), (2.1, 0.605), (4, 0.61), (8, 0.90), (8.2, 0.905), (16, 0.91)]
    points = [Point(str(c), {"macs": c}, q) for c, q in rows]
    assert pareto(points, 4).kept in {("1", "2", "8", "16"), ("1", "2", "8.2", "16")}
