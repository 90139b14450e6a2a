"""One set of weights, several networks: the whole, and static variants cut out of it.

A variant is made by edits (channels taken out, blocks left out, a smaller picture, larger patches)
on a copy of the whole. Which of the shared weights it uses is not derived from the edits but read
back: the same edits are done once on a copy whose weights hold their own numbers.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from edgebudget.batchnorm import refresh
from edgebudget.export import call
from edgebudget_runtime.errors import PassError

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class Edit(Protocol):
    """Changes a module that it may keep; names are those of the whole.

    It may take slices out of parameters and have `torch.nn.utils.parametrize` compute with them,
    but a parameter afterwards holds elements of one parameter of the whole. Plain data, so that
    copies are equal.
    """

    @property
    def order(self) -> int:
        """Edits of one variant are done in this order: 0 channels, 1 blocks, 2 patches, 3 size."""
        ...

    def __call__(self, body: nn.Module) -> nn.Module:
        """The changed module."""
        ...


@dataclass(frozen=True, slots=True)
class Variant:
    """What sets a variant apart, for people, and the edits that make it; `macs` of one input."""

    choices: Mapping[str, str]
    edits: tuple[Edit, ...] = ()
    macs: int = 0

    @property
    def name(self) -> str:
        """The choices in one line; "whole" where nothing was changed."""
        return " ".join(f"{k}={v}" for k, v in self.choices.items()) if self.edits else "whole"


@dataclass(frozen=True, slots=True)
class Source:
    """Where a variant's parameter comes from: rows `kept` of each dimension (None: all)."""

    name: str
    kept: tuple[Tensor | None, ...]

    def of(self, shared: Tensor) -> Tensor:
        """The variant's parameter, differentiable in the shared one."""
        for dim, rows in enumerate(self.kept):
            if rows is not None:
                shared = shared.index_select(dim, rows)
        return shared


class Nested(nn.Module):
    """The whole network, and the variants that share its weights; the first is the whole.

    Every variant has batch-normalisation statistics of its own, kept as buffers of this module.
    Running it runs the whole.
    """

    def __init__(self, base: nn.Module, inputs: Sequence[str], variants: Sequence[Variant]) -> None:
        """`inputs` are the names of the program's inputs, in order."""
        super().__init__()
        if not variants or variants[0].edits:
            raise ValueError("the first variant is the whole, without edits")
        self.network = base  # the exporter strips this name from those in the graph
        self.inputs, self.variants = tuple(inputs), tuple(variants)
        for number, variant in enumerate(self.variants[1:], 1):
            for name, value in _statistics(self._edited(variant)).items():
                self.register_buffer(_key(number, name), value.detach().clone())
        self.train(base.training)

    @property
    def base(self) -> nn.Module:
        """The whole network, in which the shared weights live."""
        return self.network

    def forward(self, *tensors: Tensor) -> Any:
        """What the whole answers to tensors in the program's order."""
        return call(self.network, self.inputs, tensors)

    def cut(self, variant: Variant) -> nn.Module:
        """A plain module of its own in eval mode, with the variant's own statistics."""
        body = self._edited(variant)
        for module in body.modules():
            if parametrize.is_parametrized(module):
                for name in list(module.parametrizations):  # type: ignore[arg-type]
                    parametrize.remove_parametrizations(module, name)
        own = self._own(variant)
        for name, value in _statistics(body).items():
            value.copy_(own[name])
        return body.eval()

    def link(self, variant: Variant) -> Linked:
        """The variant as a function of the shared weights, for training it together with them.

        Its statistics are this module's buffers themselves: training either changes both.

        Raises:
            PassError: EB361, an edit computed a parameter.
        """
        if not variant.edits:
            return Linked(self.network, {}, self.network)
        probe, starts = _numbered(self.network)
        sources = _read_back(_edit(probe, variant), starts)
        body = self._edited(variant)
        _forget_parameters(body)
        own = self._own(variant)
        for name in _statistics(body):
            path, _, leaf = name.rpartition(".")
            setattr(body.get_submodule(path), leaf, own[name])
        return Linked(body, sources, self.network)

    def refresh(
        self,
        variant: Variant,
        batches: Iterable[tuple[Tensor, ...]],
        forward: Callable[[nn.Module, tuple[Tensor, ...]], object],
    ) -> int:
        """Set a variant's statistics to those of `batches`; how many layers it did."""
        body = self.network if not variant.edits else self.cut(variant)
        done = refresh(body, batches, lambda x: forward(body, x))
        if variant.edits:
            own = self._own(variant)
            for name, value in _statistics(body).items():
                own[name].copy_(value)
        return done

    def having(self, variants: Sequence[Variant]) -> Nested:
        """These variants of the same weights (shared, not copied); known ones keep statistics."""
        made = Nested(self.network, self.inputs, variants)
        for variant in made.variants[1:]:
            old = next((v for v in self.variants[1:] if v.edits == variant.edits), None)
            if old is not None:
                for name, value in made._own(variant).items():
                    value.copy_(self._own(old)[name])
        return made

    def _edited(self, variant: Variant) -> nn.Module:
        return _edit(copy.deepcopy(self.network), variant).train(self.network.training)

    def _own(self, variant: Variant) -> dict[str, Tensor]:
        """The statistics kept for a variant, by their names in it."""
        number = self.variants.index(variant)
        if number == 0:
            return _statistics(self.network)
        prefix = _key(number, "")
        return {
            name.removeprefix(prefix).replace("/", "."): value
            for name, value in self.named_buffers(recurse=False)
            if name.startswith(prefix)
        }


@dataclass(frozen=True, slots=True)
class Linked:
    """A variant whose parameters are taken out of `whole`'s at every call.

    `body` holds no weights of its own (the whole itself where there are no `sources`).
    """

    body: nn.Module
    sources: Mapping[str, Source]
    whole: nn.Module

    def weights(self) -> dict[str, Tensor]:
        """The variant's parameters by their names in `body`; gradients reach the whole's."""
        shared = dict(self.whole.named_parameters())
        return {name: source.of(shared[source.name]) for name, source in self.sources.items()}

    @contextmanager
    def bound(self) -> Iterator[nn.Module]:
        """The body with its weights in place, which are computed once."""
        weights = self.weights()
        for name, value in weights.items():
            _put(self.body, name, value)
        try:
            yield self.body
        finally:
            for name in weights:
                _put(self.body, name, None)


def _edit(body: nn.Module, variant: Variant) -> nn.Module:
    for edit in sorted(variant.edits, key=lambda e: e.order):
        body = edit(body)
    return body


def _put(body: nn.Module, name: str, value: Tensor | None) -> None:
    path, _, leaf = name.rpartition(".")
    module = body.get_submodule(path)
    # A derived weight is no nn.Parameter, and only those may be assigned by name.
    module._parameters[leaf] = value  # type: ignore[assignment]
    if isinstance(module, nn.RNNBase):  # keeps a list of its own
        module._flat_weights[module._flat_weights_names.index(leaf)] = value


def _key(number: int, name: str) -> str:
    return f"variant{number}:{name.replace('.', '/')}"


def _statistics(body: nn.Module) -> dict[str, Tensor]:
    return {
        f"{path}.{name}" if path else name: value
        for path, module in body.named_modules()
        if isinstance(module, _BatchNorm)
        for name in _STATISTICS
        if (value := getattr(module, name, None)) is not None
    }


def _numbered(whole: nn.Module) -> tuple[nn.Module, list[tuple[int, str, tuple[int, ...]]]]:
    """A copy whose parameters hold consecutive numbers, and where each parameter starts."""
    probe = copy.deepcopy(whole)
    starts: list[tuple[int, str, tuple[int, ...]]] = []
    start = 0
    for name, p in probe.named_parameters():
        numbers = torch.arange(start, start + p.numel(), dtype=torch.float64)
        p.requires_grad_(False)
        p.data = numbers.reshape(p.shape)  # exact up to 2^53
        starts.append((start, name, tuple(p.shape)))
        start += p.numel()
    return probe, starts


def _read_back(
    probe: nn.Module, starts: Sequence[tuple[int, str, tuple[int, ...]]]
) -> dict[str, Source]:
    sources: dict[str, Source] = {}
    for name, p in probe.named_parameters(remove_duplicate=False):
        if p.numel() == 0:
            raise _computed(name, "nothing is left of it")
        first = int(p.detach().flatten()[0])
        start, shared, shape = next(s for s in reversed(starts) if s[0] <= first)
        rows = _rows(p.detach(), start, shape)
        whole = torch.arange(math.prod(shape)).reshape(shape)
        for dim, kept in enumerate(rows):
            whole = whole.index_select(dim, kept)
        if whole.shape != p.shape or not torch.equal(whole, p.detach().long() - start):
            raise _computed(name, f"it is no slice of {shared}")
        kept_rows = tuple(
            None if torch.equal(kept, torch.arange(size)) else kept
            for kept, size in zip(rows, shape, strict=True)
        )
        sources[name] = Source(shared, kept_rows)
    return sources


def _rows(numbers: Tensor, start: int, shape: tuple[int, ...]) -> list[Tensor]:
    """Positions in each dimension of `shape`, read off the numbers along each axis."""
    if numbers.dim() != len(shape):
        raise _computed("a parameter", "its number of dimensions changed")
    found = []
    for dim, size in enumerate(shape):
        corner = tuple(slice(None) if d == dim else 0 for d in range(len(shape)))
        stride = math.prod(shape[dim + 1 :])
        found.append((numbers[corner].long() - start) // stride % size)
    return found


def _computed(name: str, why: str) -> PassError:
    return PassError(
        "EB361",
        f"a variant cannot share {name}: {why}",
        hint="report this model: a variant must be made of slices of the whole's weights",
    )


def _forget_parameters(body: nn.Module) -> None:
    for module in body.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = None
