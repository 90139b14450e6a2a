"""ExecuTorch's XNNPACK recipe, where ExecuTorch is installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from edgebudget.workload import Array, Dataset


@cache
def _set_threads(count: int) -> None:
    """Once, before the first program loads: later ExecuTorch aborts the process."""
    importlib.import_module(
        "executorch.extension.pybindings.portable_lib"
    )._unsafe_reset_threadpool(count)


def xnnpack(module: torch.nn.Module, data: Dataset, threads: int) -> Callable[[Array], Array] | str:
    """Quantize (PT2E, per-channel symmetric) and lower; the answer runs one batch.

    Returns why not, when ExecuTorch is not installed.
    """
    if find_spec("executorch") is None:
        return "not installed"
    # Stacked, not [None]: numpy gives a new axis stride 0, which ExecuTorch refuses.
    blob = program(module, [np.stack([data.sample(i).inputs["image"]]) for i in range(len(data))])
    _set_threads(threads)
    loaded = importlib.import_module("executorch.runtime").Runtime.get().load_program(blob)
    method = loaded.load_method("forward")

    def run(image: Array, kept: tuple[Any, ...] = (blob, loaded)) -> Array:
        # The method only borrows the program's bytes: `kept` keeps them alive.
        found: Array = method.execute([torch.from_numpy(np.stack([*image]))])[0].numpy()
        return found

    return run


def program(module: torch.nn.Module, inputs: Sequence[Array]) -> bytes:
    """The `.pte` that ExecuTorch's own recipe makes of a module, calibrated on `inputs`."""
    et: Callable[[str], Any] = lambda name: importlib.import_module(f"executorch.{name}")  # noqa: E731
    quantizing = et("backends.xnnpack.quantizer.xnnpack_quantizer")
    pt2e = importlib.import_module("torchao.quantization.pt2e.quantize_pt2e")
    pictures = [torch.from_numpy(np.array(x)) for x in inputs]
    example = (pictures[0],)
    config = quantizing.get_symmetric_quantization_config(is_per_channel=True)
    quantizer = quantizing.XNNPACKQuantizer().set_global(config)
    prepared = pt2e.prepare_pt2e(
        torch.export.export(module.eval(), example).module(check_guards=False), quantizer
    )
    for picture in pictures:
        prepared(picture)
    whole = torch.export.export(pt2e.convert_pt2e(prepared), example)
    partitioner = et("backends.xnnpack.partition.xnnpack_partitioner").XnnpackPartitioner()
    lowered = et("exir").to_edge_transform_and_lower(whole, partitioner=[partitioner])
    found: bytes = lowered.to_executorch().buffer
    return found
