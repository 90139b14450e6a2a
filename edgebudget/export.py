"""From a torch module to an ONNX graph.

The captured program is handed to torch's ONNX exporter, which otherwise tries several ways of
capturing one after the other, and prints. Names, metadata and numbers are put right afterwards.
"""

from __future__ import annotations

import io
import logging
import re
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass

from edgebudget import graph
from edgebudget.onnx_file import freeze_shapes, from_file
from edgebudget_runtime.errors import EdgeBudgetError, UnsupportedError

if TYPE_CHECKING:
    from edgebudget.program import Program, TensorSpec
    from edgebudget.workload import Array

__all__ = [
    "call",
    "capture",
    "freeze_shapes",
    "from_file",
    "run_module",
    "select_outputs",
    "to_graph",
]

TOLERANCE = 1e-3  # of an output's largest magnitude: float32 through other kernels, deep networks
_OPERATOR = re.compile(r"\b(?:aten|prims|torchvision|quantized_decomposed)(?:\.|::)[\w.]+")


def to_graph(program: Program, *, check: bool = True) -> Program:
    """Export a module-stage program to ONNX with static shapes and embedded weights.

    Outputs given as a tuple, a dict or a transformers ModelOutput become the program's named
    outputs. Equal modules give equal bytes.

    Args:
        program: The program; its module is in eval mode and is not changed.
        check: Compare the graph with the module on a seeded probe.

    Raises:
        UnsupportedError: EB220 an operator or a construct cannot be exported, EB221 the graph
            computes something else than the module, EB222 the outputs do not fit their names.
    """
    captured = capture(program)
    try:
        with quiet():
            exported = torch.onnx.export(
                captured,
                (),
                dynamo=True,
                external_data=False,
                opset_version=graph.OPSET,
                verbose=False,
            )
    except Exception as e:  # the exporter lets anything through
        raise _unsupported(e, captured) from e
    assert exported is not None
    model = _tidy(exported.model, _prefix(program.body), program)
    proto = ir.to_proto(model)
    graph.name_nodes(proto)
    result = replace(program, stage="graph", body=proto)
    if check:
        _check(program, result)
    return result


def capture(program: Program) -> torch.export.ExportedProgram:
    """torch.export of a module-stage program, with one output per output name.

    Raises:
        UnsupportedError: EB220, EB222, as in `to_graph`.
    """
    wrapped = _Named(program.body, program.inputs, program.outputs).eval()
    example = tuple(torch.from_numpy(v) for v in graph.probe(program.inputs).values())
    try:
        with quiet(), torch.no_grad():
            return torch.export.export(wrapped, example, strict=False)
    except EdgeBudgetError:
        raise
    except Exception as e:  # torch.export raises what the user's code raises
        raise _unsupported(e) from e


def run_module(program: Program, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Run a module-stage program on one batch; names are the program's own."""
    wrapped = _Named(program.body, program.inputs, program.outputs)
    tensors = [torch.from_numpy(inputs[s.name]) for s in program.inputs]
    with torch.inference_mode():
        values = wrapped(*tensors)
    return {k: v.cpu().numpy() for k, v in zip(program.outputs, values, strict=True)}


def call(module: torch.nn.Module, names: Sequence[str], tensors: Sequence[torch.Tensor]) -> Any:
    """Call a module, by name where its forward() has all the names, by position otherwise."""
    code = getattr(type(module).forward, "__code__", None)
    known = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount] if code else ()
    if len(tensors) > 1 and all(n in known for n in names):
        return module(**dict(zip(names, tensors, strict=True)))
    return module(*tensors)


class _Named(torch.nn.Module):
    """Calls a module with tensors in input order and returns its outputs in name order."""

    def __init__(
        self, body: torch.nn.Module, inputs: Sequence[TensorSpec], outputs: Sequence[str]
    ) -> None:
        super().__init__()
        self.body = body
        self._names = [s.name for s in inputs]
        self._outputs = tuple(outputs)
        self.training = body.training

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """One tensor for each input and output."""
        return select_outputs(call(self.body, self._names, tensors), self._outputs)


def select_outputs(value: Any, names: tuple[str, ...]) -> tuple[torch.Tensor, ...]:
    """The tensors called `names`.

    Raises:
        UnsupportedError: EB222, the value holds other things, or another number of them.
    """
    if isinstance(value, Mapping) and all(isinstance(value.get(n), torch.Tensor) for n in names):
        return tuple(value[n] for n in names)
    leaves = [v for v in torch.utils._pytree.tree_leaves(value) if v is not None]
    strange = next((v for v in leaves if not isinstance(v, torch.Tensor)), None)
    if strange is not None or len(leaves) != len(names):
        what = f"a {type(strange).__name__}" if strange is not None else f"{len(leaves)} tensors"
        raise UnsupportedError(
            "EB222",
            f"the model returns {what} where the outputs are called {', '.join(names)}",
            hint="return one tensor per output name: a tensor, a tuple or a dict of tensors",
        )
    return tuple(leaves)


def _prefix(body: torch.nn.Module) -> str:
    """What our wrappers put before every name of the user's module."""
    children = [name for name, _ in body.named_children()]
    return "body.network." if children == ["network"] else "body."


def _tidy(model: ir.Model, prefix: str, program: Program) -> ir.Model:
    """Names that a person recognises, no metadata, and exactly the asked inputs and outputs."""
    body = model.graph
    inputs, outputs = [s.name for s in program.inputs], program.outputs
    reserved = {*inputs, *outputs}
    counts: Counter[str] = Counter()
    for node in body:
        scope = f"{_scope(node)}.".removeprefix(prefix).removeprefix("body.").rstrip(".")
        label = f"{scope}/{node.op_type}" if scope else node.op_type
        counts[label] += 1
        node.name = label if counts[label] == 1 else f"{label}_{counts[label]}"
    values = [*body.initializers.values(), *(o for node in body for o in node.outputs)]
    taken = {str(v.name) for v in values} | reserved
    for value in values:
        assert value.name is not None
        name = value.name.removeprefix(prefix)
        if name in reserved or (name != value.name and name in taken):
            name = graph.unique(f"{name}_inner", taken)
        taken.add(name)
        value.name = name
    for given, name in zip(body.inputs, inputs, strict=True):
        given.name = name
    _name_outputs(body, outputs)
    model.producer_name, model.producer_version = "edgebudget", ""
    model.metadata_props.clear()
    ClearMetadataAndDocStringPass()(model)
    body.name = "main"
    return model


def _name_outputs(body: ir.Graph, names: Sequence[str]) -> None:
    """An output that is also an input, a weight or another output passes through an Identity."""
    seen: set[int] = set()
    for i, name in enumerate(names):
        value = body.outputs[i]
        if value.producer() is None or id(value) in seen:
            copy = ir.node("Identity", [value], name=f"{name}/Identity")
            copy.outputs[0].type, copy.outputs[0].shape = value.type, value.shape
            body.append(copy)
            value = body.outputs[i] = copy.outputs[0]
        seen.add(id(value))
        value.name = name


def _scope(node: ir.Node) -> str:
    """The sub-module a node belongs to: by its weight (fused nodes moved), else by its origin."""
    weight = node.inputs[1].name if len(node.inputs) > 1 and node.inputs[1] is not None else None
    if weight is not None and weight.endswith(".weight"):
        scope = weight.removesuffix(".weight")
    else:
        text = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
        found = re.findall(r"'([^']*)'", text)
        scope = found[-2] if len(found) > 1 else ""
    return scope


def _check(before: Program, after: Program) -> None:
    values = graph.probe(before.inputs)
    expected = run_module(before, values)
    got = graph.run(after.body, values)
    gap = graph.difference(list(expected.values()), [got[k] for k in expected])
    if not gap <= TOLERANCE:
        raise UnsupportedError(
            "EB221",
            f"the exported graph differs from the module by {gap:.2g} of its largest output "
            f"(allowed {TOLERANCE:g})",
            hint="look for random numbers or state in forward(); the module must be in eval mode",
        )


def _unsupported(
    e: Exception, captured: torch.export.ExportedProgram | None = None
) -> EdgeBudgetError:
    """Name the operator and the line of the user's code, from whatever was raised."""
    chain: list[BaseException] = [e]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
        chain.append(cause)
    for link in chain:
        if isinstance(link, EdgeBudgetError):
            return link
    text = "\n".join(str(x) for x in chain)
    operator = _OPERATOR.search(text)
    reason = str(chain[-1]).strip().splitlines() or [type(chain[-1]).__name__]
    if operator and captured:
        text += "".join(
            n.meta.get("stack_trace") or ""
            for n in captured.graph.nodes
            if n.op == "call_function" and _akin(str(n.target), operator.group(0))
        )
    where = _user_line(chain, text)
    what = f"{operator.group(0)}: " if operator else ""
    return UnsupportedError(
        "EB220",
        f"this model cannot be exported{where}: {what}{reason[0][:300]}",
        hint="replace that operation by standard torch ones, without data-dependent control flow",
    )


def _akin(target: str, operator: str) -> bool:
    """Whether an operator of the captured graph may have been lowered to the one that failed."""
    a, b = (x.replace("::", ".").split(".")[1].strip("_") for x in (target, operator))
    return a.startswith(b) or b.startswith(a)


def _user_line(chain: Sequence[BaseException], text: str) -> str:
    ours = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    frames = [f for x in chain for f in traceback.extract_tb(x.__traceback__)]
    named = [(f.filename, f.lineno) for f in frames]
    named += [(m[1], int(m[2])) for m in re.finditer(r'File "([^"]+)", line (\d+)', text)]
    users = [
        (file, line)
        for file, line in named
        if file.endswith(".py")
        and not file.startswith(ours)
        and "site-packages" not in file
        and "/lib/python" not in file
    ]
    return f" ({Path(users[-1][0]).name}, line {users[-1][1]})" if users else ""


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what torch writes while it exports to ourselves: its failures become errors."""
    level = logging.root.manager.disable
    sink = io.StringIO()
    with warnings.catch_warnings(), redirect_stdout(sink), redirect_stderr(sink):
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(level)
