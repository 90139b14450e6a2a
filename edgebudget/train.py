"""What passes that learn or measure share: calling a module, tensors of a data set, scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from edgebudget.events import Advanced, Emit, Finished, Started, ignore
from edgebudget_runtime.errors import ArtifactError, UnsupportedError

if TYPE_CHECKING:
    from edgebudget.program import Program
    from edgebudget.workload import Dataset

Tensors = tuple[Tensor, ...]
Forward = Callable[[nn.Module, Tensors], Tensors]


@dataclass(frozen=True, slots=True)
class Caller:
    """Calls a module with tensors in input order and returns its outputs in name order."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @staticmethod
    def of(program: Program) -> Caller:
        """The caller for a program's own names."""
        return Caller(tuple(s.name for s in program.inputs), program.outputs)

    def __call__(self, body: nn.Module, tensors: Tensors) -> Tensors:
        """Bind by name where `forward` has all the names and there are several, else by position.

        Raises:
            UnsupportedError: EB256, an output is not a tensor.
        """
        code = getattr(type(body).forward, "__code__", None)
        known = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount] if code else ()
        if len(tensors) > 1 and all(n in known for n in self.inputs):
            return self._select(body(**dict(zip(self.inputs, tensors, strict=True))))
        return self._select(body(*tensors))

    def _select(self, value: Any) -> Tensors:
        if isinstance(value, Mapping) and all(n in value for n in self.outputs):
            leaves = [value[n] for n in self.outputs]
        else:
            leaves = [v for v in tree_leaves(value) if v is not None]
        if not leaves or not all(isinstance(v, Tensor) for v in leaves):
            raise UnsupportedError(
                "EB256",
                f"the model returns {type(value).__name__}, which holds more than tensors",
                hint="return a tensor, or a tuple or dict of tensors",
            )
        return tuple(leaves)


@dataclass(frozen=True, slots=True)
class TensorData:
    """Samples stacked in memory: inputs [N, ...] in the program's order, labels [N, ...]."""

    inputs: Tensors
    labels: Tensor | None

    def __len__(self) -> int:
        return len(self.inputs[0])

    def take(self, indices: Tensor) -> TensorData:
        """The samples at `indices`, in that order."""
        labels = None if self.labels is None else self.labels[indices]
        return TensorData(tuple(x[indices] for x in self.inputs), labels)

    def part(self, start: int, stop: int) -> TensorData:
        """Samples start..stop-1, sharing memory."""
        labels = None if self.labels is None else self.labels[start:stop]
        return TensorData(tuple(x[start:stop] for x in self.inputs), labels)

    def batches(self, size: int) -> Iterator[TensorData]:
        """All samples in order, `size` at a time."""
        for start in range(0, len(self), size):
            yield self.part(start, start + size)


def bytes_of_sample(dataset: Dataset) -> int:
    """Memory that one sample takes as tensors."""
    return sum(np.asarray(v).nbytes for v in dataset.sample(0).inputs.values())


def load_tensors(
    dataset: Dataset,
    names: Sequence[str],
    indices: Sequence[int] | None = None,
    *,
    emit: Emit = ignore,
    work: str = "read samples",
) -> TensorData:
    """Read samples once into memory.

    Raises:
        ArtifactError: EB560, a sample lacks an input, differs in shape or is not finite.
    """
    order = range(len(dataset)) if indices is None else indices
    emit(Started(work, len(order)))
    stacked: list[Any] = []
    labels: list[Any] = []
    for row, index in enumerate(order):
        sample = dataset.sample(index)
        values = [_value(dataset, index, sample.inputs, n) for n in names]
        if not stacked:
            stacked = [np.empty((len(order), *v.shape), v.dtype) for v in values]
        for whole, value in zip(stacked, values, strict=True):
            if value.shape != whole.shape[1:]:
                raise _bad(dataset, index, f"shape {value.shape}, expected {whole.shape[1:]}")
            whole[row] = value
        if sample.target is not None:
            labels.append(sample.target)
        if row % 512 == 511:
            emit(Advanced(work, 512))
    emit(Finished(work))
    full = bool(labels) and len(labels) == len(order)
    return TensorData(
        tuple(torch.from_numpy(w) for w in stacked),
        torch.from_numpy(np.stack(labels)) if full else None,
    )


def _value(dataset: Dataset, index: int, inputs: Mapping[str, Any], name: str) -> Any:
    if name not in inputs:
        raise _bad(dataset, index, f"no input called {name!r}")
    value = np.asarray(inputs[name])
    if value.dtype.kind == "f" and not np.isfinite(value).all():
        raise _bad(dataset, index, f"input {name!r} is not finite")
    return value


def _bad(dataset: Dataset, index: int, what: str) -> ArtifactError:
    return ArtifactError(
        "EB560", f"sample {index} of {dataset.name}: {what}", hint="check the data set"
    )


def outputs_over(
    forward: Forward, body: nn.Module, data: TensorData, batch: int
) -> tuple[Tensor, ...]:
    """The module's outputs [N, ...] over all samples, without gradients."""
    parts: list[Tensors] = []
    with torch.no_grad():
        for chunk in data.batches(batch):
            parts.append(forward(body, chunk.inputs))
    return tuple(torch.cat(p) for p in zip(*parts, strict=True))
