"""The cheapest set of edges that separates two vertices of a directed graph.

Shortest augmenting paths, as in "Theoretical Improvements in Algorithmic Efficiency for Network
Flow Problems", Edmonds and Karp, 1972.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from itertools import pairwise


class Network:
    """A directed graph with a whole-number capacity on every edge."""

    def __init__(self) -> None:
        self._room: dict[Hashable, dict[Hashable, int]] = {}  # what an edge can still take

    def add(self, start: Hashable, end: Hashable, capacity: int) -> None:
        """Add an edge; parallel edges add up."""
        edges = self._room.setdefault(start, {})
        edges[end] = edges.get(end, 0) + capacity
        self._room.setdefault(end, {}).setdefault(start, 0)

    def cut(self, source: Hashable, sink: Hashable) -> tuple[int, set[Hashable]]:
        """The cost of the cheapest cut, and the vertices on the source's side of it.

        Of several cheapest cuts it is the one nearest the source. The network is used up.
        """
        for vertex in (source, sink):
            self._room.setdefault(vertex, {})
        total = 0
        while True:
            before = self._reach(source, sink)
            if sink not in before:
                return total, set(before)
            path = [sink]
            while path[-1] != source:
                path.append(before[path[-1]])
            edges = [(a, b) for b, a in pairwise(path)]
            amount = min(self._room[a][b] for a, b in edges)
            for a, b in edges:
                self._room[a][b] -= amount
                self._room[b][a] += amount
            total += amount

    def _reach(self, source: Hashable, sink: Hashable) -> dict[Hashable, Hashable]:
        """What can still be reached, each vertex with the one before it on a shortest path."""
        before: dict[Hashable, Hashable] = {source: source}
        queue = deque([source])
        while queue and sink not in before:
            vertex = queue.popleft()
            for end, room in self._room[vertex].items():
                if room > 0 and end not in before:
                    before[end] = vertex
                    queue.append(end)
        return before
