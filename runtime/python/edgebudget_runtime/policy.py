"""Which sub-network answers an input: pure functions of options, an ask, and latency bounds.

A policy is asked before the first segment, and again after every segment that gives an answer.
It names the sub-network to run to its end; naming the one whose path has just run means: stop.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from edgebudget_runtime.cost import Figure, Resource
from edgebudget_runtime.elastic import OperatingPoint
from edgebudget_runtime.errors import UsageError
from edgebudget_runtime.manifest import Manifest


@dataclass(frozen=True, slots=True)
class Option:
    """One sub-network. Unknown energy fits no energy limit; unknown quality ranks lowest."""

    id: str
    path: tuple[str, ...]
    quality: float | None
    macs: float
    energy_mj: float | None = None


class Bounds(Protocol):
    """What paths may take on this device, in the order of `Front.options`.

    `whole_ms` and `reach_ms` are to be multiplied by `slowdown`. `reach_ms[i]` is the least of
    `whole_ms[i:]`, so that it never falls: the Pareto front, to be searched by bisection.
    """

    @property
    def slowdown(self) -> float: ...
    @property
    def whole_ms(self) -> Sequence[float]: ...
    @property
    def reach_ms(self) -> Sequence[float]: ...
    def rest_ms(self, option: int, done: int) -> float:
        """Bound on what is left of a path after `done` segments, before the slowdown."""
        ...


@dataclass(frozen=True, slots=True)
class Front:
    """Options sorted by quality, prepared once. Build it with `prepare`."""

    options: tuple[Option, ...]  # ascending quality; of equals the cheapest last
    index: Mapping[str, int]  # id -> place in `options`
    at: Mapping[tuple[str, ...], int]  # path -> place
    beyond: Mapping[tuple[str, ...], tuple[int, ...]]  # started path -> places worth going on to
    energy_mj: tuple[float, ...]  # infinite where unknown
    energy_reach_mj: tuple[float, ...]  # the least of `energy_mj[i:]`
    paced: tuple[int, ...]  # upper convex hull of quality over energy, cheapest first
    thriftiest: tuple[int, ...]  # all places, by energy
    smallest: int  # the place with the fewest MACs


@dataclass(frozen=True, slots=True)
class Ask:
    """What one input may still take, and what has run for it. None: no limit."""

    latency_ms: float | None = None  # from now on
    energy_mj: float | None = None  # from now on
    ran: tuple[str, ...] = ()
    chosen: int = -1  # place of the option that is being run; -1 before the first decision
    confidence: float | None = None  # of the last answer, as its exit's signal
    fill: float | None = None  # of the energy store, 0 to 1


@dataclass(frozen=True, slots=True)
class Choice:
    """The option to run to its end, the limits it is expected to break, and the reason."""

    place: int
    breaks: tuple[Resource, ...] = ()
    why: str = ""


Policy = Callable[[Front, Ask, Bounds], Choice]


def options(manifest: Manifest, energy: Mapping[str, Figure] | None = None) -> tuple[Option, ...]:
    """The sub-networks of an artifact, and the exits of its operating points.

    `energy` (sub-network -> figure, see `profile.path_energy`) replaces the manifest's own.
    """
    found: dict[tuple[str, ...], Option] = {}
    macs = {s.id: s.macs for s in manifest.segments}
    for sub in manifest.subnetworks:
        figure = (energy or {}).get(sub.id, sub.cost.energy_mj)
        counted = sub.cost.macs.value
        found[sub.path] = Option(
            sub.id,
            sub.path,
            None if sub.quality is None else sub.quality.value,
            sum(macs[s] for s in sub.path) if counted is None else counted,
            figure.value,
        )
    exits = {e.segment for e in manifest.exits}
    for point in manifest.operating_points:
        for k, segment in enumerate(point.path):
            path = point.path[: k + 1]
            if path not in found and (segment in exits or path == point.path):
                found[path] = Option("+".join(path), path, None, sum(macs[s] for s in path))
    return tuple(found.values())


def prepare(options: Sequence[Option]) -> Front:
    """Sort the options and note what leads where."""
    unknown = -math.inf

    def rank(option: Option) -> tuple[float, float]:
        quality = unknown if option.quality is None else option.quality
        # More work is better where nothing is known, and worse between equals.
        return quality, option.macs if quality == unknown else -option.macs

    ordered = tuple(sorted(options, key=rank))
    at = {o.path: i for i, o in enumerate(ordered)}
    starts = {o.path[:k] for o in ordered for k in range(len(o.path) + 1)}
    beyond = {
        start: tuple(
            i
            for i, o in enumerate(ordered)
            if len(o.path) > len(start) and o.path[: len(start)] == start and i > at.get(start, -1)
        )
        for start in starts
    }
    energy = tuple(math.inf if o.energy_mj is None else o.energy_mj for o in ordered)
    reach = list(energy)
    for i in range(len(reach) - 2, -1, -1):
        reach[i] = min(reach[i], reach[i + 1])
    return Front(
        options=ordered,
        index={o.id: i for i, o in enumerate(ordered)},
        at=at,
        beyond=beyond,
        energy_mj=energy,
        energy_reach_mj=tuple(reach),
        paced=_hull(ordered),
        thriftiest=tuple(sorted(range(len(ordered)), key=lambda i: (energy[i], ordered[i].macs))),
        smallest=min(range(len(ordered)), key=lambda i: ordered[i].macs, default=-1),
    )


def best_within(front: Front, ask: Ask, bounds: Bounds) -> Choice:
    """The best option whose bounds fit, decided once. Where none fits: the cheapest."""
    if ask.ran and ask.chosen >= 0:
        return Choice(ask.chosen, why="decided at the start")
    left_ms = _left(ask.latency_ms) / bounds.slowdown
    left_mj = _left(ask.energy_mj)
    place = min(
        bisect_right(bounds.reach_ms, left_ms), bisect_right(front.energy_reach_mj, left_mj)
    )
    place -= 1
    whole_ms, energy_mj = bounds.whole_ms, front.energy_mj
    while place >= 0:
        if whole_ms[place] <= left_ms and energy_mj[place] <= left_mj:
            return Choice(place, why="the best that fits")
        place -= 1
    return _cheapest(front, bounds, left_ms, left_mj)


def deadline(front: Front, ask: Ask, bounds: Bounds) -> Choice:
    """As `best_within`, then after every answer: the best that still fits in what is left.

    Runs are mostly faster than their bounds, and the time they leave goes to a deeper answer.
    """
    if not ask.ran:
        return best_within(front, ask, bounds)
    return _go_on(front, ask, bounds, front.beyond.get(ask.ran, ()))


def paced(front: Front, ask: Ask, bounds: Bounds) -> Choice:
    """Spend as much on an input as the fill of the energy store allows, within its limits.

    A full store buys the best answer and an empty one the cheapest, in even steps along the
    convex hull of quality over energy. The store then settles where as much is spent as comes
    in, on two neighbours of the hull, which no other mix of the same mean energy beats.
    """
    if ask.fill is None or not front.paced:
        return deadline(front, ask, bounds)
    if ask.ran:
        ahead = front.beyond.get(ask.ran, ())
        return _go_on(front, ask, bounds, tuple(i for i in ahead if i <= ask.chosen))
    steps = len(front.paced)
    step = min(max(int(ask.fill * steps), 0), steps - 1)
    allowed = min(front.energy_mj[front.paced[step]], _left(ask.energy_mj))
    choice = best_within(front, Ask(ask.latency_ms, allowed), bounds)
    if not choice.breaks:
        return choice
    rest_ms, rest_mj = bounds.whole_ms[choice.place], front.energy_mj[choice.place]
    return Choice(choice.place, _breaks(ask, bounds, rest_ms, rest_mj), choice.why)


@dataclass(frozen=True, slots=True)
class Fixed:
    """Always the same sub-network, whatever it breaks."""

    id: str

    def __call__(self, front: Front, ask: Ask, bounds: Bounds) -> Choice:
        """The option with this id.

        Raises:
            UsageError: EB180 there is none.
        """
        place = front.index.get(self.id)
        if place is None:
            raise UsageError(
                "EB180",
                f"there is no sub-network {self.id!r}",
                hint=f"one of {', '.join(sorted(front.index))}",
            )
        if ask.latency_ms is None and ask.energy_mj is None:
            return Choice(place, why="fixed")
        rest_ms = bounds.rest_ms(place, len(ask.ran))
        return Choice(place, _breaks(ask, bounds, rest_ms, _rest_mj(front, ask, place)), "fixed")


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Leave the chain of an operating point as soon as an answer is sure enough.

    Limits on one input hold too: the chain ends at the last answer that fits them.
    """

    point: OperatingPoint
    _steps: tuple[tuple[str, ...], ...] = field(init=False)

    def __post_init__(self) -> None:
        path = self.point.path
        steps = tuple(path[: k + 1] for k in range(len(path)))
        object.__setattr__(self, "_steps", steps)

    def __call__(self, front: Front, ask: Ask, bounds: Bounds) -> Choice:
        """Stop, or go on to the next exit."""
        here = front.at.get(ask.ran)
        if here is not None and ask.confidence is not None:
            threshold = self.point.thresholds.get(ask.ran[-1])
            if threshold is not None and ask.confidence >= threshold:
                return Choice(here, why="sure enough")
        # Only the next exit: whether to go further is asked again there.
        for step in self._steps[len(ask.ran) :]:
            place = front.at.get(step)
            if place is not None:
                return _go_on(front, ask, bounds, (place,))
        return _go_on(front, ask, bounds, ())


def named(name: str, manifest: Manifest) -> Policy:
    """A policy as users write it: best, deadline, paced, fixed:ID or point:ID.

    Raises:
        UsageError: EB180 there is no such policy, sub-network or operating point.
    """
    plain: dict[str, Policy] = {"best": best_within, "deadline": deadline, "paced": paced}
    kind, _, id = name.partition(":")
    subs = [s.id for s in manifest.subnetworks]
    points = {p.id: p for p in manifest.operating_points}
    if name in plain:
        return plain[name]
    if kind == "fixed" and id in subs:
        return Fixed(id)
    if kind == "point" and id in points:
        return Thresholds(points[id])
    known = [*plain, *(f"fixed:{s}" for s in subs), *(f"point:{p}" for p in points)]
    raise UsageError("EB180", f"no policy {name!r}", hint=f"one of {', '.join(known)}")


def decide(policy: Policy, front: Front, ask: Ask, bounds: Bounds) -> Choice:
    """Ask a policy, and refuse a choice that cannot be run.

    Raises:
        UsageError: EB181 the choice is not one of the options that go on from what has run.
    """
    choice = policy(front, ask, bounds)
    if isinstance(choice, Choice) and 0 <= choice.place < len(front.options):
        path = front.options[choice.place].path
        if path[: len(ask.ran)] == ask.ran:
            return choice
    raise UsageError(
        "EB181",
        f"the policy chose {choice!r}, which does not go on from {'+'.join(ask.ran) or 'nothing'}",
        hint="return a Choice whose `place` is in front.beyond[ask.ran] or is front.at[ask.ran]",
    )


def _left(limit: float | None) -> float:
    return math.inf if limit is None else limit


def _go_on(front: Front, ask: Ask, bounds: Bounds, ahead: Sequence[int]) -> Choice:
    """The best of `ahead` (ascending quality) that fits, or stop, or the least late one."""
    if ahead and ask.latency_ms is None and ask.energy_mj is None:
        return Choice(ahead[-1], why="still fits")
    done = len(ask.ran)
    here = front.at.get(ask.ran)
    left_ms = _left(ask.latency_ms) / bounds.slowdown
    left_mj = _left(ask.energy_mj)
    for place in reversed(ahead):
        if bounds.rest_ms(place, done) <= left_ms and _rest_mj(front, ask, place) <= left_mj:
            return Choice(place, why="still fits")
    if here is not None:
        return Choice(here, why="nothing better fits" if ahead else "nothing better")
    if not ahead:
        raise UsageError(
            "EB181",
            f"no sub-network begins with {'+'.join(ask.ran) or 'nothing'}",
            hint="run the segments of one sub-network in order",
        )
    place = min(ahead, key=lambda i: (bounds.rest_ms(i, done), front.options[i].macs))
    rest_ms, rest_mj = bounds.rest_ms(place, done), _rest_mj(front, ask, place)
    return Choice(place, _breaks(ask, bounds, rest_ms, rest_mj), "nothing fits: the nearest answer")


def _rest_mj(front: Front, ask: Ask, place: int) -> float:
    """Energy of what is left of a path; of all of it where the part that ran is not known."""
    here = front.at.get(ask.ran)
    spent = 0.0 if here is None else front.energy_mj[here]
    return front.energy_mj[place] - (spent if spent < math.inf else 0.0)


def _cheapest(front: Front, bounds: Bounds, left_ms: float, left_mj: float) -> Choice:
    """No option keeps both limits: keep the deadline if one can, at the least energy."""
    whole_ms = bounds.whole_ms  # other threads may renew it meanwhile
    if bounds.reach_ms[0] <= left_ms:
        place = next((i for i in front.thriftiest if whole_ms[i] <= left_ms), -1)
        if place >= 0:
            return Choice(place, ("energy_mj",), "nothing fits: the least energy in time")
    place = min(range(len(whole_ms)), key=whole_ms.__getitem__)
    if whole_ms[place] == math.inf:
        place = front.smallest
    late: tuple[Resource, ...] = ("latency_ms",)
    if front.energy_mj[place] > left_mj:
        late = ("latency_ms", "energy_mj")
    return Choice(place, late, "nothing fits: the fastest")


def _breaks(ask: Ask, bounds: Bounds, rest_ms: float, rest_mj: float) -> tuple[Resource, ...]:
    found: list[Resource] = []
    if rest_ms * bounds.slowdown > _left(ask.latency_ms):
        found.append("latency_ms")
    if rest_mj > _left(ask.energy_mj):
        found.append("energy_mj")
    return tuple(found)


def _hull(ordered: Sequence[Option]) -> tuple[int, ...]:
    """Places on the upper convex hull of quality over energy, from the cheapest to the best."""
    points = sorted(
        (o.energy_mj, o.quality, i)
        for i, o in enumerate(ordered)
        if o.energy_mj is not None and o.quality is not None
    )
    hull: list[tuple[float, float, int]] = []
    for point in points:
        if hull and point[1] <= hull[-1][1]:
            continue  # dearer and no better
        if hull and point[0] == hull[-1][0]:
            hull.pop()
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return tuple(i for _, _, i in hull)


def _slope(a: tuple[float, float, int], b: tuple[float, float, int]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])
