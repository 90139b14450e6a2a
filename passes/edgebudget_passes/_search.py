"""Find the best quantized form of one graph, step by step, each step judged on held-back data."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from edgebudget.program import Note
from edgebudget_passes import _assign, _sensitivity
from edgebudget_passes._held_back import decibel
from edgebudget_passes._recipes import Recipe

if TYPE_CHECKING:
    import onnx

    from edgebudget.events import Emit
    from edgebudget.qdq import Plan
    from edgebudget.target import TargetSpec
    from edgebudget.workload import Array
    from edgebudget_passes._assign import Assignment
    from edgebudget_passes._held_back import Judge
    from edgebudget_passes._recipes import Bench

_ROUNDS = 5  # of mixed precision, each allowing less noise than the one before


@dataclass(frozen=True, slots=True)
class Found:
    """A quantized model, how it was made, and its held-back noise-to-signal power ratio."""

    assignment: Assignment
    recipe: Recipe
    model: onnx.ModelProto
    error: float
    notes: tuple[Note, ...] = ()
    finer: tuple[Note, ...] = ()  # nodes that mixed precision kept out of 8 bits


@dataclass(frozen=True, slots=True)
class Search:
    """What every step looks at. `correct` measures bias shifts for a plan."""

    bench: Bench
    judge: Judge
    target: TargetSpec
    emit: Emit
    correct: Callable[[Plan], Mapping[str, Array]]
    deadline: float | None = None

    def plain(self, assignment: Assignment, names: tuple[str, ...], *, bias_correct: bool) -> Found:
        """Choose ranges, then weight clipping, then bias correction."""
        tried = [self._made(assignment, Recipe(name)) for name in names]
        best = min(tried, key=lambda f: f.error)
        heard = ", ".join(f"{f.recipe.ranges} {decibel(f.error):.1f}" for f in tried)
        note = Note("activations", f"ranges: {best.recipe.ranges}", f"held-back SQNR dB: {heard}")
        best = replace(best, notes=(note,))
        if not self._late():
            clipped = replace(best.recipe, clip_weights=True)
            best = self._kept(best, clipped, "weights", "clipped for least squared error")
        return self._corrected(best) if bias_correct else best

    def mixed(
        self, start: Found, keep_float: frozenset[str], wide: frozenset[str], allowed: float
    ) -> Found:
        """Keep the cheapest set of layers finer than 8 bits so that the noise is `allowed`."""
        finer_is_float = self.target.family == "cpu"
        found = _sensitivity.measure(
            self.bench, self.judge, start.assignment, start.recipe, self.emit
        )
        best, budget, chosen = start, allowed, []
        for _ in range(_ROUNDS):
            heads = _sensitivity.choose(found, budget)
            nodes = frozenset().union(*(found[h].nodes for h in heads))
            assignment = _assign.assign(
                self.bench.graph,
                self.target,
                keep_float | nodes if finer_is_float else keep_float,
                wide if finer_is_float else wide | nodes,
            )
            tried = self._made(assignment, start.recipe)
            if tried.error < best.error:
                best, chosen = tried, heads
            if tried.error <= allowed or len(heads) == len(found) or self._late():
                break
            budget *= 0.5 * min(1.0, allowed / tried.error)
        return _accounted(start, best, found, chosen, finer_is_float, allowed)

    def _corrected(self, found: Found) -> Found:
        if self._late():
            return found
        shift = self.correct(self.bench.plan(found.assignment, found.recipe))
        recipe = replace(found.recipe, bias_shift=shift)
        return self._kept(found, recipe, "biases", "mean rounding error taken out")

    def _made(self, assignment: Assignment, recipe: Recipe) -> Found:
        model = self.bench.build(assignment, recipe)
        return Found(assignment, recipe, model, self.judge.error(model))

    def _kept(self, best: Found, recipe: Recipe, where: str, what: str) -> Found:
        """The better of `best` and the same with `recipe`; the note says which."""
        tried = self._made(best.assignment, recipe)
        verdict = f"held-back SQNR {decibel(best.error):.1f} -> {decibel(tried.error):.1f} dB"
        if tried.error < best.error:
            return replace(tried, notes=(*best.notes, Note(where, what, verdict)))
        return replace(best, notes=(*best.notes, Note(where, f"not {what}", verdict)))

    def _late(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline


def _accounted(
    start: Found,
    best: Found,
    found: Mapping[str, _sensitivity.Group],
    chosen: list[str],
    finer_is_float: bool,
    allowed: float,
) -> Found:
    """`best` with what `mixed` did in its notes."""
    kind = "float" if finer_is_float else "16-bit activations"
    total = sum(g.macs for g in found.values())
    share = sum(found[h].macs for h in chosen) / max(1, total)
    note = Note(
        "precision",
        f"{len(chosen)} of {len(found)} groups in {kind}",
        f"{share:.0%} of multiply-accumulates; held-back SQNR {decibel(start.error):.1f} -> "
        f"{decibel(best.error):.1f} dB, wanted {decibel(allowed):.1f}",
    )
    finer = tuple(
        Note(h, kind, f"alone in 8 bits it leaves {decibel(found[h].noise):.1f} dB") for h in chosen
    )
    return replace(best, notes=(*start.notes, note), finer=finer)
