"""Run a compiled artifact. Needs numpy and onnxruntime, never torch or onnx."""

from typing import TYPE_CHECKING, Any

from edgebudget_runtime.budget import Budget, Limit, Violation
from edgebudget_runtime.cost import Cost, Evidence, Figure
from edgebudget_runtime.manifest import Manifest

if TYPE_CHECKING:
    from edgebudget_runtime.runner import Outcome, Runner

__all__ = [
    "Budget",
    "Cost",
    "Evidence",
    "Figure",
    "Limit",
    "Manifest",
    "Outcome",
    "Runner",
    "Violation",
]


def __getattr__(name: str) -> Any:
    """Load onnxruntime only when something that runs is asked for."""
    if name in {"Outcome", "Runner"}:
        from edgebudget_runtime import runner

        return getattr(runner, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
