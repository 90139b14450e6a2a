"""Where a network can answer early: borders of its blocks that one tensor crosses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from edgebudget import graph
from edgebudget.export import call, quiet
from edgebudget_passes._exit_graph import (
    Layout,
    Narrow,
    TailOp,
    Traced,
    layout,
    shape,
    tail,
    token,
)
from edgebudget_passes._exit_network import Tap, TappedNetwork, watching

if TYPE_CHECKING:
    from torch.fx import Node

    from edgebudget.program import Program

_SHARES = (0.02, 0.9)  # of the MACs: earlier there is nothing to read, later nothing to save
_MOST_PLACES = 12
_FEW_BLOCKS = 3


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor that a head can read.

    `shape` is without the batch; `macs` counts all before it, for the batch of the program;
    `token` is the position of the sequence that the model itself answers from, if it has one.
    """

    tap: Tap
    shape: tuple[int, ...]
    layout: Layout
    macs: int
    token: int | None = None

    @property
    def label(self) -> str:
        """What a person calls it."""
        side = "before" if self.tap.side == "in" else "after"
        again = f", call {self.tap.call + 1}" if self.tap.call else ""
        return f"{side} {self.tap.module}{again}"

    @property
    def channels(self) -> int:
        """Size of the dimension that a linear layer reads."""
        return self.shape[0] if self.layout == "map" else self.shape[-1]


@dataclass(frozen=True, slots=True)
class Survey:
    """Where exits may go, and what an answer looks like."""

    places: tuple[Place, ...]  # in depth order
    last: Place | None  # the deepest of the same kind, which the final head reads
    macs: int
    answer: tuple[int, ...]  # shape of one answer, without the batch
    tail: tuple[TailOp, ...]


def survey(program: Program) -> Survey | str:
    """Find the places, or say why the network cannot have exits.

    Raises:
        UnsupportedError: EB220, EB222 the module cannot be captured, EB211 to EB214 or counted.
    """
    if len(program.outputs) != 1:
        return f"it has {len(program.outputs)} outputs; a network with one answer can have exits"
    batch = program.inputs[0].shape[0]
    try:
        once, twice = (_shapes(program, k * batch) for k in (1, 2))
    except Exception as e:  # user code
        lines = str(e).strip().splitlines() or [type(e).__name__]
        return f"it does not run on shapes of twice the batch: {lines[0][:200]}"
    taps = [
        tap
        for tap, found in once.items()
        if len(found) > 1 and twice.get(tap) == (2 * batch, *found[1:]) and found[0] == batch
    ]
    names = [s.name for s in program.inputs]
    tapped = TappedNetwork(program.body, names, program.outputs[0], taps)
    outputs = (program.outputs[0], *(f"tap{i}" for i in range(len(taps))))
    traced = Traced(replace(program, body=tapped, outputs=outputs))
    answer, *caught = traced.outputs
    refused = _refuse(answer, batch)
    ending = tail(traced, answer)
    if refused or isinstance(ending, str):
        return refused or str(ending)
    total = traced.cost([answer])
    at: dict[Node, Tap] = {}
    for tap, node in zip(taps, caught, strict=True):
        if node not in at or _rank(tap) <= _rank(at[node]):  # of equals the latest in execution
            at[node] = tap
    every = [_place(traced, n, at[n.node], answer) for n in _borders(traced, answer, at)]
    low, high = (share * total for share in _SHARES)
    inner = [p for p in every if low <= p.macs <= high]
    blocks = [p for p in inner if p.tap.side == "out" and _holds_layers(program.body, p.tap)]
    chosen = blocks if len(blocks) >= _FEW_BLOCKS else inner
    last = next((p for p in reversed(every) if p.layout != "vector"), None)
    if not chosen:
        return "nowhere inside does all that follows depend on one tensor of a module"
    return Survey(tuple(_thinned(chosen, total)), last, total, shape(answer)[1:], ending)


def _shapes(program: Program, batch: int) -> dict[Tap, tuple[int, ...]]:
    """Shapes of all float tensors between modules."""
    body: nn.Module = program.body
    specs = [replace(s, shape=(batch, *s.shape[1:])) for s in program.inputs]

    def run(tensors: list[Tensor]) -> dict[Tap, tuple[int, ...]]:
        with watching(body, None) as caught:
            call(body, [s.name for s in specs], tensors)
        return {k: tuple(v.shape) for k, v in caught.items() if v.is_floating_point()}

    with quiet(), torch.no_grad():
        try:
            with FakeTensorMode(allow_non_fake_inputs=True):
                return run([torch.zeros(s.shape, dtype=getattr(torch, s.dtype)) for s in specs])
        except Exception:  # code that looks at values, as that of attention masks does
            return run([torch.from_numpy(v) for v in graph.probe(specs).values()])


def _refuse(answer: Node, batch: int) -> str:
    """Why an answer of this kind cannot be given early; "" if it can."""
    value = answer.meta["val"]
    if not value.is_floating_point():
        return f"it answers in {str(value.dtype).removeprefix('torch.')}, which nothing can learn"
    found = shape(answer)
    if not found or found[0] != batch or any(d != 1 for d in found[2:]):
        return (
            f"it gives {list(found)}: an exit gives one answer per input, a number or class scores"
        )
    return ""


def _borders(traced: Traced, answer: Node, at: dict[Node, Tap]) -> list[Narrow]:
    """The last narrow tensor that can be tapped before each new layer that multiplies."""
    last: dict[int, Narrow] = {}
    for narrow in traced.narrows(answer):
        before = last.get(narrow.macs)
        pooled = before is not None and _spread(before.node) and not _spread(narrow.node)
        if narrow.node in at and 2 <= len(shape(narrow.node)) <= 4 and not pooled:
            last[narrow.macs] = narrow
    return [last[macs] for macs in sorted(last)]


def _spread(node: Node) -> bool:
    """Whether a tensor has positions beside channels."""
    return sum(d > 1 for d in shape(node)[1:]) > 1


def _place(traced: Traced, narrow: Narrow, tap: Tap, answer: Node) -> Place:
    found, kind = shape(narrow.node)[1:], layout(narrow.node)
    at = token(traced, answer, found[0]) if kind == "tokens" else None
    return Place(tap, found, kind, narrow.macs, at)


def _rank(tap: Tap) -> tuple[bool, int]:
    """The end of the outermost module names a tensor best."""
    return tap.side == "in", tap.module.count(".")


def _holds_layers(body: nn.Module, tap: Tap) -> bool:
    return any(True for _ in body.get_submodule(tap.module).children())


def _thinned(places: Sequence[Place], total: int) -> list[Place]:
    """At most a dozen, spread evenly over the cost."""
    if len(places) <= _MOST_PLACES:
        return list(places)
    wanted = [total * (k + 1) / (_MOST_PLACES + 1) for k in range(_MOST_PLACES)]
    nearest = {
        min(range(len(places)), key=[abs(p.macs - m) for p in places].__getitem__) for m in wanted
    }
    return [places[i] for i in sorted(nearest)]
