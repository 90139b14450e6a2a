"""Integer arithmetic after training: int8 weights, 8- or 16-bit activations, calibrated.

Every choice (ranges, weight clipping, bias correction, mixed precision) is kept only if the
quantized graph's own outputs come nearer to the float graph's on calibration samples that set
no range.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from edgebudget.program import Context, Note, Pass, PassResult, Program
from edgebudget.quant_graph import Graph, prepare
from edgebudget.ranges import collect
from edgebudget_passes import _assign, _recipes
from edgebudget_passes._held_back import Judge, Split, decibel, split
from edgebudget_passes._recipes import Bench, Recipe
from edgebudget_runtime.errors import UsageError

if TYPE_CHECKING:
    import onnx

    from edgebudget_passes._assign import Assignment

_WORK = 2e12  # multiply-accumulates spent on ranges; a large picture needs few samples


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of this pass.

    `max_output_error` is the RMS of the outputs' error over the RMS of their variation, on
    held-back samples: above it, layers that hurt stay float (or get 16-bit activations) until
    it is met. `keep_float` and `sixteen_bit` are node names, `*` allowed.
    """

    bits: int = 8
    range_method: str = "auto"  # auto, minmax, percentile, mse
    samples: int = 512
    per_channel: bool = True
    bias_correct: bool = True
    mixed: str = "auto"  # auto, off
    max_output_error: float = 0.2
    keep_float: tuple[str, ...] = ()
    sixteen_bit: tuple[str, ...] = ()


def run(program: Program, config: Config, ctx: Context) -> PassResult:
    """Quantize a float graph with static shapes for `ctx.target`.

    Raises:
        UsageError: EB130 no calibration data, EB131 a setting that does not exist, EB132 a
            node name that matches nothing, EB133 16 bits on a target without them.
        ArtifactError: EB520 or EB521, NaN or infinity in data or weights.
    """
    _check(config, ctx)
    graph = prepare(program.body)
    wide = _assign.named(config.sixteen_bit, graph)
    if config.bits == 16:
        wide = frozenset(n.name for n in graph.nodes)
    kept = _assign.named(config.keep_float, graph)
    _check_names(config, graph)
    assignment = _assign.assign(graph, ctx.target, kept, wide)
    if not any(graph.has_weight(n) for n in graph.nodes if n.name in assignment.dtypes):
        why = "it has no node with stored weights that this target runs in integers"
        return PassResult(program, declined=(Note("graph", "not quantized", why),))
    parts = split(ctx.data.calibration, _samples(graph, config), ctx.rng)
    model, notes = _quantize(graph, config, ctx, assignment, parts)
    done = replace(program, body=model)
    declined = [Note(n, "stays float", why) for n, why in assignment.declined.items()]
    return PassResult(done, tuple(notes), tuple(declined))


def _quantize(
    graph: Graph, config: Config, ctx: Context, assignment: Assignment, parts: Split
) -> tuple[onnx.ModelProto, list[Note]]:
    data = ctx.data.calibration
    assert data is not None
    stats = collect(
        graph.model, data, parts.ranges, _recipes.watched(graph, assignment), emit=ctx.emit
    )
    npu = ctx.target.family != "cpu"
    bench = Bench(graph, stats, config.per_channel, 1e-4 if npu else 0.0)
    judge = Judge(graph.model, data, parts.judge, ctx.emit)
    recipe, model, error, notes = _best_recipe(bench, judge, assignment, config)
    return model, notes


def _best_recipe(
    bench: Bench, judge: Judge, assignment: Assignment, config: Config
) -> tuple[Recipe, onnx.ModelProto, float, list[Note]]:
    """Ranges first, then weight clipping: each kept only if it lowers the held-back error."""
    tried = []
    for name in _ranges(config):
        recipe = Recipe(name)
        model = bench.build(assignment, recipe)
        tried.append((judge.error(model), recipe, model))
    error, recipe, model = min(tried, key=lambda t: t[0])
    heard = ", ".join(f"{r.ranges} {decibel(e):.1f}" for e, r, _ in tried)
    notes = [Note("activations", f"ranges by {recipe.ranges}", f"held-back SQNR in dB: {heard}")]
    clipped = recipe.with_(clip_weights=True)
    model2 = bench.build(assignment, clipped)
    error2 = judge.error(model2)
    verdict = f"held-back SQNR {decibel(error):.1f} -> {decibel(error2):.1f} dB"
    if error2 < error:
        recipe, model, error = clipped, model2, error2
        notes.append(Note("weights", "clipped for least squared error", verdict))
    return recipe, model, error, notes


def _ranges(config: Config) -> tuple[str, ...]:
    if config.range_method == "auto":
        return _recipes.RANGES
    if config.range_method == "percentile":
        return tuple(r for r in _recipes.RANGES if r[0].isdigit())
    return (config.range_method,)


def _samples(graph: Graph, config: Config) -> int:
    macs = sum(graph.macs(n) for n in graph.nodes)
    return max(8, min(config.samples, int(_WORK / max(1, macs))))


def _check(config: Config, ctx: Context) -> None:
    options: tuple[tuple[str, object, tuple[object, ...]], ...] = (
        ("bits", config.bits, (8, 16)),
        ("range_method", config.range_method, ("auto", "minmax", "percentile", "mse")),
        ("mixed", config.mixed, ("auto", "off")),
    )
    for name, value, known in options:
        if value not in known:
            raise UsageError(
                "EB131",
                f"quantize_int8: {name} = {value!r} does not exist",
                hint=f"one of {', '.join(map(str, known))}",
            )
    if config.samples < 2 or config.max_output_error <= 0:
        raise UsageError(
            "EB131",
            f"quantize_int8: samples = {config.samples}, max_output_error = "
            f"{config.max_output_error}",
            hint="at least 2 samples and a positive error",
        )
    if (config.bits == 16 or config.sixteen_bit) and "uint16" not in ctx.target.activation_dtypes:
        raise UsageError(
            "EB133",
            f"target {ctx.target.name} has no 16-bit activations",
            hint=f"it has {', '.join(ctx.target.activation_dtypes)}",
        )


def _check_names(config: Config, graph: Graph) -> None:
    for pattern in (*config.keep_float, *config.sixteen_bit):
        if not _assign.named((pattern,), graph):
            raise UsageError(
                "EB132",
                f"quantize_int8: no node is called {pattern!r}",
                hint="see node names with `edgebudget inspect`",
            )


PASS = Pass(
    "quantize_int8",
    run,
    Config,
    "graph",
    "integer weights and activations, calibrated on real samples",
    requires=frozenset(),
    ensures=frozenset({"quantized"}),
)
