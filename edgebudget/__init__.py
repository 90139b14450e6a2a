"""Compile a pretrained model to a budget. Importing this package loads neither torch nor onnx."""

from edgebudget_runtime.budget import Budget
from edgebudget_runtime.cost import Cost, Figure

__all__ = ["Budget", "Cost", "Figure"]
