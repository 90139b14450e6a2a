"""Choose a width for every group so that the network meets a bound at least cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

Price = Callable[[Sequence[int]], int]
_SWEEPS = 20


@runtime_checkable
class _Incremental(Protocol):
    """A price that also tells what changing a few groups adds, without looking at the rest."""

    def change(self, widths: Sequence[int], moves: Mapping[int, int]) -> int: ...


@dataclass(frozen=True, slots=True)
class Ladder:
    """The widths a group may take, ascending, and what each costs (0 at full width)."""

    widths: tuple[int, ...]
    costs: tuple[float, ...]


def step_of(size: int, multiple: int, floor: int = 4) -> int:
    """The rounding of a group of `size` channels: `multiple`, halved while it leaves no choice.

    A group of 16 rounded to 8 has two widths only, which is too coarse to solve for a bound; it
    gets steps of 4. Below `floor` the arithmetic of every engine here wastes what is saved.
    """
    step = max(1, multiple)
    while size < 4 * step and step > floor:
        step //= 2
    return step


def widths_of(size: int, multiple: int) -> tuple[int, ...]:
    """All widths that a group may take, ascending; the full one is always among them."""
    step = step_of(size, multiple)
    return (*range(step, size, step), size)


def monotone(costs: Sequence[float]) -> tuple[float, ...]:
    """Costs that never fall when width falls, 0 at full width: measurements are noisy."""
    result: list[float] = []
    worst = 0.0
    for cost in reversed(costs):
        worst = max(worst, cost)
        result.append(worst)
    return tuple(reversed(result))


def solve(ladders: Sequence[Ladder], price: Price, bound: int) -> tuple[int, ...] | None:
    """Widths with price(widths) <= bound and a small sum of costs; None where no widths fit.

    Goes down the steepest saving per cost first, over all lower widths and not only the next, then
    improves by raising one group while lowering another, and last spends what is left over.
    """
    state = _State(ladders, price)
    while state.now > bound:
        move = _cheapest(state, bound)
        if move is None:
            return None
        state.move({move[0]: move[1]})
    for _ in range(_SWEEPS):
        raised = _raise(state, bound)
        if not raised and not _swap(state, bound):
            break
    return tuple(state.widths)


class _State:
    """The rung of every group, the widths these are, and what they cost."""

    def __init__(self, ladders: Sequence[Ladder], price: Price) -> None:
        self.ladders = ladders
        self.level = [len(x.widths) - 1 for x in ladders]
        self.widths = [x.widths[-1] for x in ladders]
        self.now = price(self.widths)
        self._price = price
        self._change = price.change if isinstance(price, _Incremental) else self._difference

    def priced(self, rungs: Mapping[int, int]) -> int:
        """What it would cost with some groups on other rungs."""
        return self.now + self._change(self.widths, self._moved(rungs))

    def move(self, rungs: Mapping[int, int]) -> None:
        """Put some groups on other rungs."""
        for g, width in self._moved(rungs).items():
            self.level[g], self.widths[g] = rungs[g], width
        self.now = self._price(self.widths)

    def _moved(self, rungs: Mapping[int, int]) -> dict[int, int]:
        return {g: self.ladders[g].widths[rung] for g, rung in rungs.items()}

    def _difference(self, widths: Sequence[int], moves: Mapping[int, int]) -> int:
        after = [moves.get(g, w) for g, w in enumerate(widths)]
        return self._price(after) - self.now


def _cheapest(state: _State, bound: int) -> tuple[int, int] | None:
    best: tuple[float, int, int] | None = None
    for g, ladder in enumerate(state.ladders):
        for lower in range(state.level[g]):
            # Savings beyond the bound are worth nothing.
            saved = min(state.now - state.priced({g: lower}), state.now - bound)
            if saved <= 0:
                continue
            rate = (ladder.costs[lower] - ladder.costs[state.level[g]]) / saved
            if best is None or (rate, -saved) < (best[0], 0):
                best = (rate, g, lower)
    return None if best is None else (best[1], best[2])


def _raise(state: _State, bound: int) -> bool:
    """Raise groups while the bound holds, the most relief for its price first."""
    moved = False
    while True:
        best: tuple[float, int] | None = None
        for g, ladder in enumerate(state.ladders):
            rung = state.level[g]
            if rung + 1 >= len(ladder.widths):
                continue
            cost = state.priced({g: rung + 1})
            if cost > bound:
                continue
            relief = ladder.costs[rung] - ladder.costs[rung + 1]
            rate = relief / max(1, cost - state.now)
            if best is None or rate > best[0]:
                best = (rate, g)
        if best is None:
            return moved
        state.move({best[1]: state.level[best[1]] + 1})
        moved = True


def _swap(state: _State, bound: int) -> bool:
    """The best pair of one group up and one down that costs less in sum and keeps the bound."""
    level = state.level
    best: tuple[float, int, int] | None = None
    for up, high in enumerate(state.ladders):
        if level[up] + 1 >= len(high.widths):
            continue
        relief = high.costs[level[up]] - high.costs[level[up] + 1]
        for down, low in enumerate(state.ladders):
            if down == up or level[down] == 0:
                continue
            gain = relief - (low.costs[level[down] - 1] - low.costs[level[down]])
            if gain <= 1e-12 or (best is not None and gain <= best[0]):
                continue
            if state.priced({up: level[up] + 1, down: level[down] - 1}) <= bound:
                best = (gain, up, down)
    if best is None:
        return False
    state.move({best[1]: level[best[1]] + 1, best[2]: level[best[2]] - 1})
    return True
