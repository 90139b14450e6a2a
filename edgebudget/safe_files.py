"""Reading weights without running anything: safetensors only, checked before use."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgebudget_runtime.errors import ArtifactError, UsageError

if TYPE_CHECKING:
    import torch

    from edgebudget.workload import Array

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format itself
_PICKLE_SUFFIXES = frozenset({".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".pdparams"})
_CONVERT = (
    "convert it where you trust it: safetensors.torch.save_file("
    "torch.load(FILE, weights_only=True), 'model.safetensors')"
)


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a `.safetensors` file, by name.

    Raises:
        UsageError: EB166, there is no such file.
        ArtifactError: EB540 it is a pickle (whatever its name), EB541 it is truncated or corrupt,
            EB543 a tensor holds NaN or Inf.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise UsageError("EB166", f"no weights file {path}", hint="check the path")
    check_file(path)
    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
    except (SafetensorError, ValueError, RuntimeError, KeyError, OSError) as e:
        raise _corrupt(path, str(e).splitlines()[0]) from e
    require_finite(((k, v) for k, v in tensors.items()), str(path))
    return tensors


def check_file(path: Path) -> None:
    """Refuse a safetensors file that is a pickle, truncated or corrupt, without loading it.

    Raises:
        ArtifactError: EB540, EB541.
    """
    refuse_pickle(path)
    _check_header(path)


def refuse_pickle(path: Path) -> None:
    """Refuse a pickle, by content as well as by name, before anything opens it.

    Raises:
        ArtifactError: EB540.
    """
    with path.open("rb") as f:
        start = f.read(4)
    protocol = start[:1] == b"\x80" and start[1:2] in {bytes([i]) for i in range(2, 6)}
    zipped = start == b"PK\x03\x04" and path.suffix == ".safetensors"
    if protocol or zipped or path.suffix in _PICKLE_SUFFIXES:
        raise ArtifactError(
            "EB540", f"{path}: refused: a pickle can run code when it is opened", hint=_CONVERT
        )


def apply_weights(module: torch.nn.Module, path: Path) -> None:
    """Load a safetensors file into `module`, all of it and nothing else.

    Counters that evaluation never reads (`num_batches_tracked`) may be absent.

    Raises:
        UsageError: EB166, there is no such file.
        ArtifactError: EB540, EB541, EB543 as `read_weights`; EB542 names or shapes differ.
    """
    given = read_weights(path)
    wanted = module.state_dict()
    missing = [k for k in wanted if k not in given and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in given if k not in wanted]
    shapes = [
        f"{k} is {list(given[k].shape)}, the model has {list(wanted[k].shape)}"
        for k in given
        if k in wanted and given[k].shape != wanted[k].shape
    ]
    faults = [
        f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for kind, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("mis-shaped", shapes),
        )
        if names
    ]
    if faults:
        raise ArtifactError(
            "EB542",
            f"{path} does not fit the model: {'; '.join(faults)}",
            hint="build the very model that these weights were saved from",
        )
    module.load_state_dict(given, strict=False)


def require_finite(tensors: Iterable[tuple[str, torch.Tensor]], where: str) -> None:
    """Refuse weights with NaN or Inf.

    Raises:
        ArtifactError: EB543, names the first such tensor.
    """
    for name, tensor in tensors:
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            bad = int((~tensor.isfinite()).sum())
            raise ArtifactError(
                "EB543",
                f"{where}: weight {name} holds {bad} NaN or Inf of {tensor.numel()} values",
                hint="the training diverged, or the file was damaged: use an earlier checkpoint",
            )


def digest_of(tensors: Mapping[str, torch.Tensor | Array], structure: str) -> str:
    """SHA-256 over sorted (name, dtype, shape, bytes) and a text of the structure."""
    import torch

    sha = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name]
        if isinstance(value, torch.Tensor):
            flat = value.detach().cpu().contiguous()
            kind = str(flat.dtype).removeprefix("torch.")
            shape = tuple(flat.shape)
            # A byte view also covers the types numpy lacks, such as bfloat16.
            data: Array = flat.reshape(-1).view(torch.uint8).numpy()
        else:
            data = np.ascontiguousarray(value)
            kind, shape = data.dtype.name, data.shape
        sha.update(f"{name}\0{kind}\0{shape}\0".encode())
        sha.update(data.tobytes())
    sha.update(structure.encode())
    return sha.hexdigest()


def _check_header(path: Path) -> None:
    """Bounds first, so that a hostile length never becomes an allocation."""
    size = path.stat().st_size
    with path.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or length > MAX_HEADER_BYTES or length > size - 8:
            raise _corrupt(path, f"the header claims {length} bytes, the file has {size}")
        raw = f.read(length)
    try:
        header: dict[str, Any] = json.loads(raw)
        ends = [int(v["data_offsets"][1]) for k, v in header.items() if k != "__metadata__"]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as e:
        raise _corrupt(path, "the header is not safetensors JSON") from e
    if max(ends, default=0) > size - 8 - length:
        raise _corrupt(path, f"its tensors end beyond the file's {size} bytes: cut short?")


def _corrupt(path: Path, why: str) -> ArtifactError:
    return ArtifactError(
        "EB541", f"{path} is not a sound safetensors file: {why}", hint="copy or save it again"
    )
