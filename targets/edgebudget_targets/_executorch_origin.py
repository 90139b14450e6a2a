"""Which node of the graph an operator that ExecuTorch exported comes from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgebudget.import_onnx import ImportedGraph

_PLUMBING = ("executorch_call_delegate", "getitem")


def step(node: Any) -> str:
    """The step of the imported module that an exported operator comes from, "" for none."""
    stack: Mapping[str, Any] = node.meta.get("nn_module_stack") or {}
    for path, _ in reversed(list(stack.values())):
        if str(path).startswith("steps."):
            return str(path).removeprefix("steps.")
    return ""


def origin(node: Any, module: ImportedGraph) -> str | None:
    """The ONNX node that an exported operator comes from."""
    return module.node_names.get(step(node))


def left_out(program: Any, module: ImportedGraph) -> dict[str, str]:
    """Nodes with an operator outside the delegates of a lowered program, and its name."""
    left: dict[str, str] = {}
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        op = getattr(node.target, "__name__", str(node.target))
        if any(p in op for p in _PLUMBING):
            continue
        name = origin(node, module) or f"#{node.name}"
        left.setdefault(name, op)
    return left
