"""Integer arithmetic after training: int8 weights, 8- or 16-bit activations, calibrated.

Every choice (ranges, weight clipping, bias correction, mixed precision) is kept only if the
quantized graph's own outputs come nearer to the float graph's on calibration samples that set
no range.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from edgebudget.events import Said
from edgebudget.program import Context, Note, Pass, PassResult, Program
from edgebudget.quant_graph import MAC_OPS, Graph, prepare
from edgebudget.ranges import collect
from edgebudget_passes import _assign, _bias_correct, _label_bias, _recipes
from edgebudget_passes._held_back import Judge, Split, decibel, split
from edgebudget_passes._recipes import Bench
from edgebudget_passes._search import Found, Search
from edgebudget_runtime.errors import UsageError

if TYPE_CHECKING:
    from edgebudget_passes._assign import Assignment

_RANGE_WORK = 2e12  # multiply-accumulates spent on ranges; a large picture needs few samples
_CORRECTION_WORK = 4e11
_CORRECTED = 64  # samples that estimate the mean error of each layer
_OUTPUT_ERROR = 0.1  # 20 dB
_BOX_ERROR = 0.0028  # 51 dB: boxes near the threshold must stay on their side of it


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of this pass.

    `max_output_error` is the RMS of the outputs' error over the RMS of their variation, on
    held-back samples: above it, layers that hurt stay float (or get 16-bit activations) until
    it is met; 0 means 0.1, for detectors 0.0028. `keep_float` and `sixteen_bit` are node names,
    `*` allowed. `label_bias` may fit a classifier's output bias to the calibration labels.
    """

    bits: int = 8
    range_method: str = "auto"  # auto, minmax, wide, percentile, mse
    samples: int = 512
    per_channel: bool = True
    bias_correct: bool = True
    label_bias: str = "auto"  # auto, off
    mixed: str = "auto"  # auto, off
    max_output_error: float = 0.0
    keep_float: tuple[str, ...] = ()
    sixteen_bit: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Names:
    """Nodes the caller wants in float, and with 16-bit activations."""

    keep_float: frozenset[str]
    wide: frozenset[str]


def run(program: Program, config: Config, ctx: Context) -> PassResult:
    """Quantize a float graph with static shapes for `ctx.target`.

    Raises:
        UsageError: EB130 no calibration data, EB131 a setting that does not exist, EB132 a
            node name that matches nothing, EB133 16 bits on a target without them.
        UnsupportedError: EB230, the operator set is too old; EB231, the graph is quantized
            already.
        ArtifactError: EB520 or EB521, NaN or infinity in data or weights.
    """
    if not ctx.target.integers:
        why = f"{ctx.target.name} computes in {ctx.target.activation_dtypes[0]}"
        return PassResult(program, declined=(Note("graph", "not quantized", why),))
    _check(config, ctx)
    graph = prepare(program.body, wide="uint16" in ctx.target.activation_dtypes)
    chosen = _names(config, graph)
    assignment = _assign.assign(graph, ctx.target, chosen.keep_float, chosen.wide)
    if not any(graph.has_weight(n) for n in graph.nodes if n.name in assignment.dtypes):
        why = "no node with stored weights that this target runs in integers"
        return PassResult(program, declined=(Note("graph", "not quantized", why),))
    found = _quantize(graph, config, ctx, assignment, chosen)
    finer = {note.where for note in found.finer}
    declined = [
        Note(n, "stays float", why)
        for n, why in found.assignment.declined.items()
        if n not in finer and graph.by_name[n].op_type in MAC_OPS
    ]
    body = replace(program, body=found.model)
    return PassResult(body, (_summary(graph, found), *found.notes), (*found.finer, *declined))


def _summary(graph: Graph, found: Found) -> Note:
    dtypes = found.assignment.dtypes
    total = sum(graph.macs(n) for n in graph.nodes)
    narrow, wide = (
        sum(graph.macs(n) for n in graph.nodes if dtypes.get(n.name) == d)
        for d in ("uint8", "uint16")
    )
    layers = sum(graph.has_weight(n) for n in graph.nodes if n.name in dtypes)
    what = f"{layers} layers with int8 weights, {len(dtypes)} integer nodes"
    share = 100.0 / max(1, total)
    why = f"{narrow * share:.1f} % of multiply-accumulates on 8-bit activations"
    return Note("graph", what, why + (f", {wide * share:.1f} % on 16-bit" if wide else ""))


def _quantize(
    graph: Graph, config: Config, ctx: Context, assignment: Assignment, chosen: _Names
) -> Found:
    data = ctx.data.calibration
    parts = split(data, _affordable(graph, config.samples, _RANGE_WORK), ctx.rng)
    assert data is not None  # split has refused its absence
    stats = collect(
        graph.model, data, parts.ranges, _recipes.watched(graph, assignment), emit=ctx.emit
    )
    bench = Bench(graph, stats, config.per_channel, ctx.target.family)
    few = parts.ranges[: _affordable(graph, _CORRECTED, _CORRECTION_WORK)]
    search = Search(
        bench,
        Judge(graph.model, data, parts.judge, ctx.emit, exact=ctx.target.exact),
        ctx.target,
        ctx.emit,
        lambda plan: _bias_correct.shifts(graph, plan, data, few, ctx.emit, ctx.target.exact),
        ctx.deadline,
    )
    found = search.plain(assignment, _ranges(config, ctx), bias_correct=config.bias_correct)
    allowed = _allowed(config, ctx)
    finer = ctx.target.float_fallback or "uint16" in ctx.target.activation_dtypes
    if config.mixed == "auto" and finer and found.error > allowed:
        found = search.mixed(found, chosen.keep_float, chosen.wide, allowed)
    if found.error > allowed:
        ctx.emit(Said("warning", _missed(found.error, allowed)))
    if config.label_bias == "auto" and ctx.task.kind == "classification":
        found = _with_label_bias(bench, found, parts, ctx)
    return found


def _with_label_bias(bench: Bench, found: Found, parts: Split, ctx: Context) -> Found:
    node, data = _label_bias.last_layer(bench.graph, found.assignment), ctx.data.calibration
    drawn = (*parts.ranges, *(i for i in parts.judge if i not in parts.ranges))
    if node is None or data is None or len(drawn) < _label_bias.LEAST:
        return found
    wanted = _label_bias.labels(data, drawn, bench.graph.channels(node))
    if wanted is None:
        return found
    scores = _label_bias.logits(found.model, data, drawn, ctx.emit, ctx.target.exact)
    better, note = _label_bias.judge(scores, wanted)
    found = replace(found, notes=(*found.notes, note))
    if not better:
        return found
    shift = _label_bias.fit(scores, wanted)
    shifts = dict(found.recipe.bias_shift)
    shifts[node.name] = shifts.get(node.name, 0.0) + shift
    recipe = replace(found.recipe, bias_shift=shifts)
    return replace(found, recipe=recipe, model=bench.build(found.assignment, recipe))


def _allowed(config: Config, ctx: Context) -> float:
    """Noise-to-signal power ratio that the outputs may have."""
    default = _BOX_ERROR if ctx.task.kind == "detection" else _OUTPUT_ERROR
    return (config.max_output_error or default) ** 2


def _missed(error: float, allowed: float) -> str:
    return (
        f"quantize_int8: held-back SQNR is {decibel(error):.1f} dB, {decibel(allowed):.1f} dB "
        "was wanted"
    )


def _ranges(config: Config, ctx: Context) -> tuple[str, ...]:
    if config.range_method == "auto":
        # What a detector looks for is rare: the values that matter may not be in the samples,
        # and an error over all boxes cannot see that they were clipped.
        return ("wide",) if ctx.task.kind == "detection" else _recipes.RANGES
    if config.range_method == "percentile":
        return tuple(r for r in _recipes.RANGES if r[0].isdigit())
    return (config.range_method,)


def _affordable(graph: Graph, samples: int, work: float) -> int:
    """At most `samples`, fewer where one costs much (the count is the same on every machine)."""
    macs = sum(graph.macs(n) for n in graph.nodes)
    return max(4, min(samples, int(work / max(1, macs))))


def _check(config: Config, ctx: Context) -> None:
    options: tuple[tuple[str, object, tuple[object, ...]], ...] = (
        ("bits", config.bits, (8, 16)),
        ("range_method", config.range_method, ("auto", "minmax", "wide", "percentile", "mse")),
        ("label_bias", config.label_bias, ("auto", "off")),
        ("mixed", config.mixed, ("auto", "off")),
    )
    for name, value, known in options:
        if value not in known:
            raise UsageError(
                "EB131",
                f"quantize_int8: {name} = {value!r} does not exist",
                hint=f"one of {', '.join(map(str, known))}",
            )
    if config.samples < 2 or config.max_output_error < 0:
        raise UsageError(
            "EB131",
            f"quantize_int8: samples = {config.samples}, max_output_error = "
            f"{config.max_output_error}",
            hint="at least 2 samples, and an error of 0 (automatic) or more",
        )
    if (config.bits == 16 or config.sixteen_bit) and "uint16" not in ctx.target.activation_dtypes:
        raise UsageError(
            "EB133",
            f"target {ctx.target.name} has no 16-bit activations",
            hint=f"it has {', '.join(ctx.target.activation_dtypes)}",
        )


def _names(config: Config, graph: Graph) -> _Names:
    for pattern in (*config.keep_float, *config.sixteen_bit):
        if not _assign.named((pattern,), graph):
            raise UsageError(
                "EB132",
                f"quantize_int8: no node is called {pattern!r}",
                hint="see node names with `edgebudget inspect`",
            )
    wide = _assign.named(config.sixteen_bit, graph)
    if config.bits == 16:
        wide = frozenset(graph.by_name)
    return _Names(_assign.named(config.keep_float, graph), wide)


PASS = Pass(
    "quantize_int8",
    run,
    Config,
    "graph",
    "integer weights and activations, calibrated on real samples",
    version=4,
)
