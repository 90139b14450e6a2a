"""What a runner may choose from: options, their bounds here, and parts of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate

import numpy as np

from edgebudget_runtime import policy as policies
from edgebudget_runtime.cost import UNKNOWN, Cost, Figure, counted
from edgebudget_runtime.inputs import Array, fits
from edgebudget_runtime.latency_bound import Latencies
from edgebudget_runtime.manifest import Manifest, Segment, Tensor
from edgebudget_runtime.policy import Ask, Bounds, Choice, Front, Policy

_VIEWS = 64  # parts of the options that are kept prepared


@dataclass(frozen=True, slots=True)
class View:
    """Some of the options, and bounds in their order."""

    front: Front
    bounds: Bounds
    places: tuple[int, ...]  # in the planner's front

    def decide(self, policy: Policy, ask: Ask) -> Choice:
        """Ask the policy. Of a single option there is nothing to choose.

        Raises:
            UsageError: EB180, EB181 the policy's choice cannot be run.
        """
        if len(self.places) == 1:
            return Choice(0)
        return policies.decide(policy, self.front, ask, self.bounds)

    def left_mj(self, energy_mj: float | None, ran: tuple[str, ...]) -> float | None:
        """What an energy limit leaves after `ran`, where that is known."""
        here = self.front.at.get(ran)
        spent = None if here is None else self.front.options[here].energy_mj
        return energy_mj if energy_mj is None or spent is None else energy_mj - spent


class Planner:
    """Built once from a manifest, and again when a profile is learnt. For many threads."""

    def __init__(
        self,
        manifest: Manifest,
        *,
        usual: Mapping[str, Sequence[float]] | None = None,
        energy: Mapping[str, Figure] | None = None,
        on_drift: Callable[[float], None] | None = None,
    ) -> None:
        self.front = policies.prepare(policies.options(manifest, energy))
        paths = [o.path for o in self.front.options]
        self.latencies = Latencies(paths, usual, on_drift=on_drift)
        self.learnt = usual is not None
        self._segments = {s.id: s for s in manifest.segments}
        self._costs = _costs(manifest, energy)
        self.whole = View(self.front, self.latencies, tuple(range(len(paths))))
        first = manifest.subnetworks[0].path
        order = [first, *(p for p in paths if p != first)]
        self.takes: dict[tuple[Tensor, ...], tuple[int, ...]] = {}  # inputs -> places
        for path in order:
            taken = free_inputs([self._segments[s] for s in path])
            self.takes[taken] = (*self.takes.get(taken, ()), self.front.at[path])
        self._part = lru_cache(maxsize=_VIEWS)(self._make)

    def view(self, places: Sequence[int]) -> View:
        """These options alone."""
        kept = tuple(sorted(places))
        return self.whole if len(kept) == len(self.front.options) else self._part(kept)

    def accepting(
        self, given: Mapping[str, Array], *, rows: bool = False
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """The inputs that `given` has the shapes of, and the options that take them.

        `rows`: the first dimension counts inputs. Where no shapes fit: the first sub-network's.
        """
        if len(self.takes) == 1:
            return next(iter(self.takes.items()))
        skip = 1 if rows else 0
        shapes = {k: np.shape(a)[skip:] for k, a in given.items()}
        for tensors, places in self.takes.items():
            names = {t.name for t in tensors}
            if names == shapes.keys() and all(
                fits(shapes[t.name], t.shape[skip:]) for t in tensors
            ):
                return tensors, places
        return next(iter(self.takes.items()))

    def within_macs(self, places: Sequence[int], macs: float) -> tuple[int, ...]:
        """Options of at most `macs`, or else the cheapest one."""
        options = self.front.options
        kept = tuple(i for i in places if options[i].macs <= macs)
        return kept or (min(places, key=lambda i: options[i].macs),)

    def without(self, places: Sequence[int], avoid: Mapping[str, object]) -> tuple[int, ...]:
        """Options that use none of these segments."""
        options = self.front.options
        return tuple(i for i in places if avoid.keys().isdisjoint(options[i].path))

    def spent(self, ran: tuple[str, ...]) -> tuple[Figure, Figure]:
        """MACs and energy of segments that ran for one input, unknown where nobody counted."""
        cost = self._costs.get(ran)
        if cost is not None:
            return cost.macs, cost.energy_mj
        macs = [self._segments[s].macs for s in ran]
        known = all(m > 0 for m in macs)
        return (
            counted(sum(macs), "counted on the segments that ran") if known else UNKNOWN
        ), UNKNOWN

    def mean_spent(
        self, ran: Mapping[str, int], paths: Sequence[tuple[str, ...]]
    ) -> tuple[Figure, Figure]:
        """The same as means over a batch: how often each segment ran, and the path of each input.

        Energy is unknown where beginnings had to be given up.
        """
        macs, energy = self.spent(paths[0])
        if len(set(paths)) == 1 and all(n == len(paths) for n in ran.values()):
            return macs, energy
        total = [n * self._segments[s].macs for s, n in ran.items()]
        how = "mean of a batch, counted on the segments that ran"
        mean = counted(sum(total) / len(paths), how) if all(t > 0 for t in total) else UNKNOWN
        found = [self.spent(path)[1].value for path in paths]
        known = [v for v in found if v is not None]
        if len(known) < len(found) or sum(ran.values()) != sum(map(len, paths)):
            return mean, UNKNOWN
        value = sum(known) / len(known)
        return mean, replace(energy, value=value, how=f"mean of a batch, {energy.how}", spread=None)

    def name(self, path: tuple[str, ...]) -> str:
        """The option with this path."""
        place = self.front.at.get(path)
        return "+".join(path) if place is None else self.front.options[place].id

    def _make(self, places: tuple[int, ...]) -> View:
        front = policies.prepare([self.front.options[i] for i in places])
        own = tuple(self.front.at[o.path] for o in front.options)
        return View(front, _Part(self.latencies, own), own)


class _Part:
    """The bounds of some options."""

    __slots__ = ("_all", "_places")

    def __init__(self, bounds: Bounds, places: tuple[int, ...]) -> None:
        self._all, self._places = bounds, places

    @property
    def slowdown(self) -> float:
        return self._all.slowdown

    @property
    def whole_ms(self) -> Sequence[float]:
        whole = self._all.whole_ms
        return [whole[i] for i in self._places]

    @property
    def reach_ms(self) -> Sequence[float]:
        return list(accumulate(reversed(self.whole_ms), min))[::-1]

    def rest_ms(self, option: int, done: int) -> float:
        return self._all.rest_ms(self._places[option], done)


def free_inputs(path: Sequence[Segment]) -> tuple[Tensor, ...]:
    """What a path takes from outside: inputs that no earlier segment gives."""
    made: set[str] = set()
    free: dict[str, Tensor] = {}
    for segment in path:
        for tensor in segment.inputs:
            if tensor.name not in made:
                free.setdefault(tensor.name, tensor)
        made.update(t.name for t in segment.outputs)
    return tuple(free.values())


def _costs(manifest: Manifest, energy: Mapping[str, Figure] | None) -> dict[tuple[str, ...], Cost]:
    given = energy or {}
    return {
        s.path: Cost(macs=s.cost.macs, energy_mj=given.get(s.id, s.cost.energy_mj))
        for s in manifest.subnetworks
    }
