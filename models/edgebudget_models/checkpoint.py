"""Weights in and out of safetensors files, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

M = TypeVar("M", bound=nn.Module)


def load_into(model: M, path: Path) -> M:
    """Fill `model` from `path` and put it in eval mode.

    Names and shapes must match exactly; half-precision storage is widened to the model's type.
    Raises ValueError, one line, for a missing file, another format, other tensors, or
    non-finite values.
    """
    tensors = _read(path)
    own = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    given = {k: v for k, v in tensors.items() if not k.endswith("num_batches_tracked")}
    _require_same_names(path, set(own), set(given))
    for name, tensor in given.items():
        if tensor.shape != own[name].shape:
            found, needed = tuple(tensor.shape), tuple(own[name].shape)
            raise ValueError(f"{path}: tensor {name} has shape {found}, needed {needed}")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{path}: tensor {name} holds NaN or Inf")
    # The batch counters of BN are no weights: files differ in whether they carry them.
    model.load_state_dict({k: v.to(own[k].dtype) for k, v in given.items()}, strict=False)
    return model.eval()


def save(model: nn.Module, path: Path) -> None:
    """Write the weights of `model` to `path` as safetensors, aside and then renamed."""
    tensors = {
        name: tensor.detach().to("cpu").contiguous()
        for name, tensor in model.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    save_file(tensors, aside)
    aside.replace(path)


def _read(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise ValueError(f"{path}: no such weights file")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from error


def _require_same_names(path: Path, own: set[str], given: set[str]) -> None:
    missing, extra = sorted(own - given), sorted(given - own)
    if missing:
        raise ValueError(f"{path}: {len(missing)} tensors are missing, the first is {missing[0]}")
    if extra:
        raise ValueError(f"{path}: {len(extra)} tensors are unknown, the first is {extra[0]}")
