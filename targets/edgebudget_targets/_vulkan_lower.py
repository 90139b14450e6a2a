"""From a float graph to a `.pte` for GPUs with Vulkan; works in a process of its own.

Imports torch and executorch.
"""

from __future__ import annotations

import logging
from pathlib import Path

import onnx
import torch
from executorch.exir import to_edge_transform_and_lower

from edgebudget import graph as graphs
from edgebudget.import_onnx import import_graph
from edgebudget_targets._executorch_origin import left_out


def lower(source: Path, out: Path, *, half: bool) -> dict[str, str]:
    """Lower a graph with static shapes; in half precision if `half`.

    Returns:
        ONNX node name -> why the GPU does not take it.

    Raises:
        UnsupportedError: EB243, an operator has no counterpart in torch.
    """
    root = logging.getLogger()
    before = root.level
    # Its import sets the level of everybody's logging.
    from executorch.backends.vulkan.partitioner.vulkan_partitioner import VulkanPartitioner

    root.setLevel(before)
    model = onnx.load_model(str(source))
    module = import_graph(model)
    example = tuple(
        torch.zeros(s.shape, dtype=getattr(torch, s.dtype)) for s in graphs.specs(model)
    )
    with torch.no_grad():
        exported = torch.export.export(module, example)
        lowered = to_edge_transform_and_lower(
            exported, partitioner=[VulkanPartitioner({"force_fp16": half})]
        )
    left = left_out(lowered.exported_program(), module)
    aside = out.with_name(f".{out.name}.part")
    aside.write_bytes(lowered.to_executorch().buffer)
    aside.replace(out)
    return {n: f"ExecuTorch's Vulkan back end does not take {op}" for n, op in left.items()}
