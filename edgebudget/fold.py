"""Which batch normalisations of a module can join the layer before them, from its graph.

The layer and the norm are found by the parameters that the captured graph reads, so any
forward() that torch.export takes will do; both have to be modules used exactly once.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from edgebudget.program import Note

if TYPE_CHECKING:
    from edgebudget.program import Program

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True, slots=True)
class Pair:
    """Names of a layer and of the batch norm that follows it and nothing else does."""

    layer: str
    norm: str


def foldable(program: Program) -> tuple[tuple[Pair, ...], tuple[Note, ...]]:
    """Pairs that can be folded, and every other batch norm with the reason it cannot.

    Raises:
        UnsupportedError: EB220, EB222, the module cannot be captured.
    """
    body: nn.Module = program.body
    if not any(isinstance(m, _BatchNorm) for m in body.modules()):
        return (), ()
    from edgebudget.export import capture

    captured = capture(program)
    owners = _owners(captured)
    uses = Counter(name for names in owners.values() for name in names)
    pairs, declined = [], []
    for node in captured.graph.nodes:
        if not _is_norm(node):
            continue
        norm = _single(owners.get(node, ()))
        where = norm or node.name
        why = _why_not(body, node, norm, owners, uses)
        if why is None:
            assert norm is not None
            pairs.append(Pair(owners[node.args[0]][0], norm))
        else:
            declined.append(Note(where, "kept", why))
    return tuple(pairs), tuple(declined)


def fold(body: nn.Module, pair: Pair) -> None:
    """Fold one pair in place: scale and shift go into the layer, the norm becomes an identity."""
    layer: Any = body.get_submodule(pair.layer)
    norm = body.get_submodule(pair.norm)
    assert isinstance(norm, _BatchNorm)
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None
    weight: Any = layer.weight
    # In float64: the terms of the new bias may cancel.
    factor = (variance.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight.detach().double()
    shift = -mean.double() * factor
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    if layer.bias is not None:
        shift = shift + layer.bias.detach().double() * factor
    if isinstance(layer, _TRANSPOSED):  # [in, out / groups, ...]: channels in group order
        by_group = weight.detach().double().unflatten(0, (layer.groups, -1))
        scaled = by_group * factor.view(layer.groups, 1, -1, *[1] * (weight.dim() - 2))
        scaled = scaled.flatten(0, 1)
    else:
        scaled = weight.detach().double() * factor.view(-1, *[1] * (weight.dim() - 1))
    layer.weight = nn.Parameter(scaled.to(weight.dtype), weight.requires_grad)
    layer.bias = nn.Parameter(shift.to(weight.dtype), weight.requires_grad)
    parent, _, name = pair.norm.rpartition(".")
    setattr(body.get_submodule(parent), name, nn.Identity())


def _is_norm(node: torch.fx.Node) -> bool:
    return node.op == "call_function" and "batch_norm" in str(node.target)


def _owners(captured: torch.export.ExportedProgram) -> dict[torch.fx.Node, tuple[str, ...]]:
    """The modules whose parameters each node of the graph reads."""
    signature = captured.graph_signature
    stored = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    found: dict[torch.fx.Node, tuple[str, ...]] = {}
    for node in captured.graph.nodes:
        names = {_module_of(stored[a.name]) for a in node.all_input_nodes if a.name in stored}
        if names:
            found[node] = tuple(sorted(names))
    return found


def _module_of(parameter: str) -> str:
    return parameter.removeprefix("body.").rpartition(".")[0]


def _single(names: tuple[str, ...]) -> str | None:
    return names[0] if len(names) == 1 else None


def _why_not(
    body: nn.Module,
    node: torch.fx.Node,
    norm: str | None,
    owners: dict[torch.fx.Node, tuple[str, ...]],
    uses: Counter[str],
) -> str | None:
    source = node.args[0]
    if norm is None or not isinstance(body.get_submodule(norm), _BatchNorm):
        return "it is not a batch norm module of its own"
    if body.get_submodule(norm).get_buffer("running_mean") is None:
        return "it keeps no running statistics"
    layer = _single(owners.get(source, ())) if isinstance(source, torch.fx.Node) else None
    if layer is None or not isinstance(
        body.get_submodule(layer), (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED)
    ):
        return "no convolution or linear layer comes directly before it"
    assert isinstance(source, torch.fx.Node)
    if len(source.users) != 1:
        return f"the output of {layer} is used elsewhere too"
    if uses[layer] != 1 or uses[norm] != 1:
        return "the layer or the norm is used more than once"
    if parametrize.is_parametrized(body.get_submodule(layer)):
        return f"the weights of {layer} are parametrised"
    return None
