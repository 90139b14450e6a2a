"""Compile a pretrained model to a budget. Importing this package loads neither torch nor onnx."""

from typing import TYPE_CHECKING, Any

from edgebudget_runtime.budget import Budget
from edgebudget_runtime.cost import Cost, Figure

if TYPE_CHECKING:
    from edgebudget.compiler import CompileResult, compile, propose

__all__ = ["Budget", "CompileResult", "Cost", "Figure", "compile", "propose"]


def __getattr__(name: str) -> Any:
    """Load the compiler only when something is compiled."""
    if name in {"CompileResult", "compile", "propose"}:
        from edgebudget import compiler

        return getattr(compiler, name)
    raise AttributeError(f"module 'edgebudget' has no attribute {name!r}")
