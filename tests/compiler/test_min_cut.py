"""Minimum cuts, against every possible cut of small graphs."""

from __future__ import annotations

from itertools import chain, combinations

from hypothesis import given, settings
from hypothesis import strategies as st

from edgebudget.min_cut import Network

EDGE = st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 9))


@given(st.lists(EDGE, max_size=20))
@settings(deadline=None, derandomize=True)
def test_no_cut_is_cheaper_and_none_as_cheap_is_nearer_the_source(
    edges: list[tuple[int, int, int]],
) -> None:
    network = Network()
    for a, b, capacity in edges:
        network.add(a, b, capacity)
    cost, side = network.cut(0, 5)

    def price(inside: set[int]) -> int:
        return sum(c for a, b, c in edges if a in inside and b not in inside)

    others = chain.from_iterable(combinations([1, 2, 3, 4], n) for n in range(5))
    prices = {frozenset({0, *o}): price({0, *o}) for o in others}
    assert cost == min(prices.values())
    best = [s for s, p in prices.items() if p == cost]
    assert side == frozenset.intersection(*best)
