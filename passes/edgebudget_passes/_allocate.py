"""Choose a width for every group so that the network meets a bound at least cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Price = Callable[[Sequence[int]], int]
_SWEEPS = 20


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
    level = [len(x.widths) - 1 for x in ladders]
    while _priced(ladders, price, level) > bound:
        move = _cheapest(ladders, price, level, bound)
        if move is None:
            return None
        level[move[0]] = move[1]
    for _ in range(_SWEEPS):
        raised = _raise(ladders, price, level, bound)
        if not raised and not _swap(ladders, price, level, bound):
            break
    return tuple(x.widths[i] for x, i in zip(ladders, level, strict=True))


def _priced(ladders: Sequence[Ladder], price: Price, level: Sequence[int]) -> int:
    return price([x.widths[i] for x, i in zip(ladders, level, strict=True)])


def _cheapest(
    ladders: Sequence[Ladder], price: Price, level: list[int], bound: int
) -> tuple[int, int] | None:
    now = _priced(ladders, price, level)
    best: tuple[float, int, int] | None = None
    for g, ladder in enumerate(ladders):
        for lower in range(level[g]):
            trial = [*level[:g], lower, *level[g + 1 :]]
            # Savings beyond the bound are worth nothing.
            saved = min(now - _priced(ladders, price, trial), now - bound)
            if saved <= 0:
                continue
            rate = (ladder.costs[lower] - ladder.costs[level[g]]) / saved
            if best is None or (rate, -saved) < (best[0], 0):
                best = (rate, g, lower)
    return None if best is None else (best[1], best[2])


def _raise(ladders: Sequence[Ladder], price: Price, level: list[int], bound: int) -> bool:
    """Raise groups while the bound holds, the most relief for its price first."""
    moved = False
    while True:
        now = _priced(ladders, price, level)
        best: tuple[float, int] | None = None
        for g, ladder in enumerate(ladders):
            if level[g] + 1 >= len(ladder.widths):
                continue
            trial = [*level[:g], level[g] + 1, *level[g + 1 :]]
            cost = _priced(ladders, price, trial)
            if cost > bound:
                continue
            relief = ladder.costs[level[g]] - ladder.costs[level[g] + 1]
            rate = relief / max(1, cost - now)
            if best is None or rate > best[0]:
                best = (rate, g)
        if best is None:
            return moved
        level[best[1]] += 1
        moved = True


def _swap(ladders: Sequence[Ladder], price: Price, level: list[int], bound: int) -> bool:
    """The best pair of one group up and one down that costs less in sum and keeps the bound."""
    best: tuple[float, int, int] | None = None
    for up, high in enumerate(ladders):
        if level[up] + 1 >= len(high.widths):
            continue
        relief = high.costs[level[up]] - high.costs[level[up] + 1]
        for down, low in enumerate(ladders):
            if down == up or level[down] == 0:
                continue
            gain = relief - (low.costs[level[down] - 1] - low.costs[level[down]])
            if gain <= 1e-12 or (best is not None and gain <= best[0]):
                continue
            trial = list(level)
            trial[up] += 1
            trial[down] -= 1
            if _priced(ladders, price, trial) <= bound:
                best = (gain, up, down)
    if best is None:
        return False
    level[best[1]] += 1
    level[best[2]] -= 1
    return True
