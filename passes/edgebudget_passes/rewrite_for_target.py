"""Rewrite a graph into the forms that the target's engine runs as integers.

Padding nodes join the convolution or pool behind them, spelled-out activations become the
operator they compute, means over the picture become global pooling, matrix product and bias one
linear layer. Every rule is compared with the original on a seeded probe, node by node when the
whole differs, and undone where the outputs move beyond rounding.

What runs where was measured with ONNX Runtime 1.31.1 and onnxruntime-qnn 2.7.0: a bare Erf
leaves the NPU while Gelu stays; asymmetric padding of a convolution is fine on both; ReduceMean
runs in float on the CPU, GlobalAveragePool on integers. Zero channels (Pad) stay as they are: the
NPU takes them, and Concat with stored zeros was no faster on the CPU, and larger.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import onnx
import onnx_ir as ir
from onnx import version_converter
from onnx_ir.passes.common import RemoveUnusedNodesPass

from edgebudget import graph
from edgebudget.program import Context, Note, Pass, PassResult, Program
from edgebudget_passes._target_rules import Rule, rules_for


@dataclass(frozen=True, slots=True)
class Config:
    """Nothing to set: the target decides."""


def run(program: Program, config: Config, ctx: Context) -> PassResult:
    """Apply the target's rules that leave the outputs where they are."""
    reference = graph.Reference(program.body)
    did: list[Note] = []
    declined: list[Note] = []
    model = _raised(program.body, reference, did, declined)
    for rule in rules_for(ctx.target):
        after, notes = _apply(model, rule)
        done = [n for n in notes if not n.why]
        declined += [n for n in notes if n.why]
        if not done:
            continue
        if reference.gap(after) <= graph.REORDERED:
            model, did = after, did + done
            continue
        model = _one_by_one(model, rule, [n.where for n in done], reference, did, declined)
    if ctx.target.family == "npu":
        declined += [
            Note(n.name, "stays Erf", "not part of a Gelu; the engine has no Erf of its own")
            for n in model.graph.node
            if n.op_type == "Erf"
        ]
    if not did and not declined:
        declined.append(Note("graph", "unchanged", f"nothing to rewrite for {ctx.target.name}"))
    return PassResult(replace(program, body=model), tuple(did), tuple(declined))


def _apply(
    model: onnx.ModelProto, rule: Rule, only: Collection[str] | None = None
) -> tuple[onnx.ModelProto, list[Note]]:
    """Try a rule on every node (on those named in `only`), last nodes first."""
    held = ir.from_proto(graph.infer_shapes(model))
    notes = []
    # From the end: the last node of a spelled-out function stands for all of it.
    for node in reversed(list(held.graph)):
        if node.graph is None or node.domain or (rule.ops and node.op_type not in rule.ops):
            continue
        if only is None or node.name in only:
            note = rule.rewrite(node)
            notes += [note] if note else []
            if note and not note.why:
                RemoveUnusedNodesPass()(held)
    notes.reverse()
    after = graph.infer_shapes(ir.to_proto(held))
    graph.name_nodes(after)
    return after, notes


def _one_by_one(
    model: onnx.ModelProto,
    rule: Rule,
    names: list[str],
    reference: graph.Reference,
    did: list[Note],
    declined: list[Note],
) -> onnx.ModelProto:
    """After a rule moved the outputs: keep it on the nodes where it does not."""
    for name in names:
        after, notes = _apply(model, rule, {name})
        moved = reference.gap(after)
        if moved <= graph.REORDERED:
            model = after
            did += [n for n in notes if not n.why]
        else:
            why = f"{rule.name} would move the outputs by {moved:.2g} of their largest"
            declined.append(Note(name, "kept", why))
    return model


def _raised(
    model: onnx.ModelProto, reference: graph.Reference, did: list[Note], declined: list[Note]
) -> onnx.ModelProto:
    """The model in the operator set that has Gelu, when it spells one out."""
    version = graph.opset(model)
    ops = {n.op_type for n in model.graph.node}
    if version >= graph.OPSET or not ops & {"Erf", "Tanh"}:
        return model
    try:
        raised = graph.infer_shapes(version_converter.convert_version(model, graph.OPSET))
        moved = reference.gap(raised)
    except Exception as e:  # the converter's C++ part raises what it likes
        declined.append(Note("graph", f"kept operator set {version}", str(e).split("\n")[0]))
        return model
    if moved > graph.ROUNDING:
        why = f"converting moves the outputs by {moved:.2g} of their largest"
        declined.append(Note("graph", f"kept operator set {version}", why))
        return model
    did.append(Note("graph", f"operator set {version} became {graph.OPSET}"))
    return raised


PASS = Pass(
    "rewrite_for_target",
    run,
    Config,
    "graph",
    "rewrite into forms that the target runs as integers",
    ensures=frozenset({"valid_graph"}),
    equivalence="close",
)
