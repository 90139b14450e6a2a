"""Fold batch normalisation into the layer before it: exact, and free at run time.

For a layer y = Wx + b followed by gamma (y - mean) / sqrt(var + eps) + beta, the weights become
W gamma / sqrt(var + eps) and the bias (b - mean) gamma / sqrt(var + eps) + beta, per channel.
The norm is replaced by an identity. Norms without such a layer before them are declined.
Source: "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference", Jacob et al., 2017, section 3.2.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

from edgebudget.program import Context, Note, Pass, PassResult, Program


@dataclass(frozen=True, slots=True)
class Config:
    """Nothing to set."""


def run(program: Program, config: Config, ctx: Context) -> PassResult:
    """Fold what can be folded; undo it if the outputs move beyond rounding."""
    from edgebudget import graph
    from edgebudget.export import run_module
    from edgebudget.fold import fold, foldable

    pairs, declined = foldable(program)
    if not pairs:
        none = () if declined else (Note("model", "nothing to fold", "it has no batch norm"),)
        return PassResult(program, declined=(*declined, *none))
    values = graph.probe(program.inputs)
    expected = list(run_module(program, values).values())
    body = copy.deepcopy(program.body)
    for pair in pairs:
        fold(body, pair)
    folded = replace(program, body=body)
    try:
        moved = graph.difference(expected, list(run_module(folded, values).values()))
    except Exception as e:  # forward() is user code, and may read the norm's own attributes
        return PassResult(program, declined=(*declined, Note("model", "kept", f"it fails: {e}")))
    if moved > graph.REORDERED:
        why = f"folding moves the outputs by {moved:.2g} of their largest"
        return PassResult(program, declined=(*declined, Note("model", "kept", why)))
    did = tuple(Note(p.norm, f"folded into {p.layer}") for p in pairs)
    return PassResult(folded, did, declined)


PASS = Pass(
    "fold_batchnorm",
    run,
    Config,
    "module",
    "fold batch normalisation into the convolutions and linear layers before it",
    ensures=frozenset({"batchnorm_folded"}),
    equivalence="close",
)
