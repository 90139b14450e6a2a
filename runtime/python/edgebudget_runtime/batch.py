"""Many inputs through segments: those that are sure enough leave, the rest close ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from edgebudget_runtime import inputs
from edgebudget_runtime.errors import EdgeBudgetError, UsageError
from edgebudget_runtime.inputs import Array
from edgebudget_runtime.manifest import Tensor
from edgebudget_runtime.planner import Planner, View
from edgebudget_runtime.policy import Ask, deadline
from edgebudget_runtime.walk import Segments, Wish

_CHUNKS = 8  # model batches that go together, so that the ranks can be closed


@dataclass(slots=True)
class Group:
    """Inputs that have come the same way: their numbers, and their tensors [n, ...]."""

    items: Array
    state: dict[str, Array]
    view: View
    ran: tuple[str, ...] = ()
    path: tuple[str, ...] = ()
    answered: tuple[str, ...] = ()


@dataclass(slots=True)
class Answers:
    """What a batch got, by number."""

    outputs: dict[str, dict[int, Array]]
    paths: list[tuple[str, ...]]
    confidences: list[float | None]
    ran: dict[str, int] = field(default_factory=dict)  # segment -> inputs that it ran for
    degraded: bool = False
    why: str = ""


class Batch:
    """Runs inputs [N, ...] segment by segment, as many at a time as the model takes."""

    def __init__(
        self,
        segments: Segments,
        planner: Planner,
        wish: Wish,
        size: int,
        count: int,
        max_batch: int = 1,
    ) -> None:
        """`size` is the model's own batch, which chunks are padded to; 1 to `max_batch` such."""
        self._segments, self._planner, self._wish = segments, planner, wish
        self._own, self._size = size, size * max_batch
        self.answers = Answers({n: {} for n in segments.outputs}, [()] * count, [None] * count)

    def go(self, given: Mapping[str, Array], view: View) -> Answers:
        """Answer every input of `given`.

        Raises:
            EdgeBudgetError: as `Way.go`.
        """
        count = len(self.answers.paths)
        together = self._size * _CHUNKS
        for start in range(0, count, together):
            stop = min(start + together, count)
            part = {k: a[start:stop] for k, a in given.items()}
            waiting = self._begin(np.arange(start, stop), part, view)
            while waiting:
                waiting.extend(self._step(waiting.pop(), part, start))
        return self.answers

    def _begin(self, items: Array, part: Mapping[str, Array], view: View) -> list[Group]:
        group = Group(items, dict(part), view)
        while True:
            ask = Ask(energy_mj=self._wish.energy_mj, fill=self._wish.fill)
            group.path = self._ask(group.view, ask)
            known = self._segments.failure(group.path)
            if known is None:
                return [group]
            group.view = self._without(group.view, *known)

    def _step(self, group: Group, part: Mapping[str, Array], start: int) -> Iterator[Group]:
        """Run one segment for a group; the groups that go on."""
        id = group.path[len(group.ran)]
        try:
            self._run(id, group)
        except EdgeBudgetError as e:
            if isinstance(e, UsageError) and not group.answered:
                raise
            self._say(id, e)
            if not group.answered:  # else the answers stand
                view = self._without(group.view, id, e)
                own = {k: a[group.items - start] for k, a in part.items()}
                yield from self._begin(group.items, own, view)
            return
        group.ran += (id,)
        self.answers.ran[id] = self.answers.ran.get(id, 0) + len(group.items)
        if id not in self._segments.answers:
            yield group
            return
        sure = self._segments.confidences(id, group.state)
        self._answer(group, sure)
        group.answered = group.ran
        if group.view.front.beyond.get(group.ran):
            yield from self._divide(group, sure)
        elif len(group.path) > len(group.ran):
            yield group

    def _run(self, id: str, group: Group) -> None:
        """Run a segment on chunks of the model's batch; the last chunk is padded."""
        names = [t.name for t in self._segments.by_id[id].inputs]
        made = [t.name for t in self._segments.by_id[id].outputs]
        parts: list[dict[str, Array]] = []
        for start in range(0, len(group.items), self._size):
            keep = min(self._size, len(group.items) - start)
            whole = -(-keep // self._own) * self._own
            chunk = chunked({n: group.state[n] for n in names}, start, whole)
            self._segments.run(id, chunk)
            parts.append({n: chunk[n][:keep] for n in made})
        for name in made:
            group.state[name] = np.concatenate([p[name] for p in parts])

    def _answer(self, group: Group, sure: Array | None) -> None:
        answers = self.answers
        for row, item in enumerate(group.items.tolist()):
            for name, rows in answers.outputs.items():
                rows[item] = group.state[name][row]
            answers.paths[item] = group.ran
            value = None if sure is None else float(sure[row])
            answers.confidences[item] = None if value == -np.inf else value

    def _divide(self, group: Group, sure: Array | None) -> Iterator[Group]:
        """Ask the policy for every input, and part those that go different ways."""
        ask = Ask(
            energy_mj=group.view.left_mj(self._wish.energy_mj, group.ran),
            ran=group.ran,
            chosen=group.view.front.at.get(group.path, -1),
            fill=self._wish.fill,
        )
        ways: dict[tuple[str, ...], list[int]] = {}
        if sure is None:
            ways[self._ask(group.view, ask)] = list(range(len(group.items)))
        else:
            for row, value in enumerate(sure.tolist()):
                asked = Ask(None, ask.energy_mj, ask.ran, ask.chosen, value, ask.fill)
                ways.setdefault(self._ask(group.view, asked), []).append(row)
        for path, rows in ways.items():
            if len(path) == len(group.ran):
                continue
            known = self._segments.failure(path[len(group.ran) :])
            if known is not None:
                self._say(*known)
                continue
            state = {k: a[rows] for k, a in group.state.items()}
            yield Group(group.items[rows], state, group.view, group.ran, path, group.answered)

    def _ask(self, view: View, ask: Ask) -> tuple[str, ...]:
        try:
            choice = view.decide(self._wish.policy, ask)
        except UsageError:
            if not self.answers.degraded:
                raise
            choice = view.decide(deadline, ask)  # what the policy insists on does not work
        if not self.answers.degraded and not ask.ran:
            self.answers.why = choice.why
        return view.front.options[choice.place].path

    def _without(self, view: View, id: str, error: EdgeBudgetError) -> View:
        self._say(id, error)
        left = self._planner.without(view.places, {id: error})
        if not left:
            raise error
        return self._planner.view(left)

    def _say(self, id: str, error: EdgeBudgetError) -> None:
        self.answers.degraded = True
        self.answers.why = f"{id} failed: [{error.code}] {error.what}"


def chunked(batch: Mapping[str, Array], start: int, size: int) -> dict[str, Array]:
    """`size` inputs from `start`; the last one is repeated where they run out."""
    parts = {k: a[start : start + size] for k, a in batch.items()}
    short = size - len(next(iter(parts.values())))
    if short <= 0:
        return parts
    return {k: np.concatenate([p, np.repeat(p[-1:], short, axis=0)]) for k, p in parts.items()}


def check_batch(batch: Mapping[str, Array], tensors: Sequence[Tensor], size: int | None) -> int:
    """How many inputs there are, each of them one that the model takes, `size` at a time.

    Raises:
        UsageError: EB171 to EB173.
    """
    counts = {len(a) if a.ndim else 0 for a in batch.values()}
    if len(counts) != 1 or 0 in counts:
        raise UsageError(
            "EB171",
            "the inputs of a batch do not have one common first dimension of 1 or more: "
            + ", ".join(f"{k} {list(a.shape)}" for k, a in batch.items()),
            hint="stack the inputs: [N, ...]",
        )
    (count,) = counts
    step = size or count
    for start in range(0, count, step):
        inputs.check(chunked(batch, start, step), tensors)
    return count
