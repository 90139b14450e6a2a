"""A network that also answers early: the user's own module, run once, with heads on taps."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from edgebudget.export import call, select_outputs


@dataclass(frozen=True, slots=True, order=True)
class Tap:
    """A tensor that enters or leaves a module: tensor number `leaf` of call number `call`."""

    module: str
    side: Literal["in", "out"]
    call: int = 0
    leaf: int = 0


class ExitNetwork(nn.Module):
    """Runs `network` once and returns what each head makes of its tap, then the network's answer.

    Hooks live during one call only, so that copies and exports of this module stand alone; two
    threads must not call one copy at the same time.
    """

    def __init__(
        self,
        network: nn.Module,
        names: Sequence[str],
        output: str,
        taps: Sequence[Tap],
        heads: Sequence[nn.Module],
    ) -> None:
        super().__init__()
        self.network = network
        self.exits = nn.ModuleList(heads)
        self.taps = tuple(taps)
        self._names, self._output = tuple(names), output

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Inputs in the program's order -> exits in depth order, the final answer last."""
        with watching(self.network, self.taps) as caught:
            value = call(self.network, self._names, inputs)
        early = (head(caught[tap]) for head, tap in zip(self.exits, self.taps, strict=True))
        return (*early, *select_outputs(value, (self._output,)))

    def with_heads(self, heads: Sequence[nn.Module], taps: Sequence[Tap]) -> ExitNetwork:
        """A copy of the body with copies of other heads."""
        body, heads = copy.deepcopy(self.network), copy.deepcopy(list(heads))
        return ExitNetwork(body, self._names, self._output, taps, heads).eval()


class TappedNetwork(nn.Module):
    """Runs `network` once and returns its answer, then the tensors at the taps."""

    def __init__(
        self, network: nn.Module, names: Sequence[str], output: str, taps: Sequence[Tap]
    ) -> None:
        super().__init__()
        self.network = network
        self.taps = tuple(taps)
        self._names, self._output = tuple(names), output

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Inputs in the program's order -> the answer, then one tensor for each tap."""
        with watching(self.network, self.taps) as caught:
            value = call(self.network, self._names, inputs)
        return (*select_outputs(value, (self._output,)), *(caught[tap] for tap in self.taps))


@contextmanager
def watching(network: nn.Module, taps: Collection[Tap] | None) -> Iterator[dict[Tap, Tensor]]:
    """Tensors at these taps (None: at all modules) of a call that is made inside."""
    caught: dict[Tap, Tensor] = {}
    calls: Counter[str] = Counter()
    wanted = None if taps is None else set(taps)

    def keep(name: str, side: Literal["in", "out"], value: Any) -> None:
        tensors = (v for v in tree_leaves(value) if isinstance(v, torch.Tensor))
        for leaf, tensor in enumerate(tensors):
            tap = Tap(name, side, calls[name], leaf)
            if wanted is None or tap in wanted:
                caught[tap] = tensor

    def before(name: str) -> Any:
        return lambda module, args, kwargs: keep(name, "in", (args, kwargs))

    def after(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, value: Any) -> None:
            keep(name, "out", value)
            calls[name] += 1

        return hook

    handles = []
    try:
        for name, module in network.named_modules():
            if name and (wanted is None or any(t.module == name for t in wanted)):
                handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
                handles.append(module.register_forward_hook(after(name), with_kwargs=True))
        yield caught
    finally:
        for handle in handles:
            handle.remove()
