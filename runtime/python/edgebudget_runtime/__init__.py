"""Run a compiled artifact. Needs numpy and onnxruntime, never torch or onnx."""

from edgebudget_runtime.budget import Budget, Limit, Violation
from edgebudget_runtime.cost import Cost, Evidence, Figure

__all__ = ["Budget", "Cost", "Evidence", "Figure", "Limit", "Violation"]
