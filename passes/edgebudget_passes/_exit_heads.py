"""Heads that answer from inside a network: what may be built, what it costs, and building it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgebudget_passes._exit_graph import TailOp
from edgebudget_passes._exit_places import Place, Survey

Pooling = Literal["average", "token", "grid"]

_LARGE_SIDE = 32  # maps whose sides are twice this or more are averaged over blocks first
_SMALL_SIDE = 4  # convolutions end near this side, or the one the model itself ends at
_WIDTH_SCALES = (1.0, 0.75, 0.5, 0.25)

_PLAIN: Mapping[str, Callable[..., Tensor]] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": F.relu,
    "relu6": F.relu6,
    "hardsigmoid": F.hardsigmoid,
    "hardtanh": F.hardtanh,
    "softplus": F.softplus,
    "exp": torch.exp,
    "neg": torch.neg,
    "clamp": torch.clamp,
    "mul": torch.mul,
    "div": torch.div,
    "add": torch.add,
    "sub": torch.sub,
    "softmax": lambda x: F.softmax(x, -1),
    "log_softmax": lambda x: F.log_softmax(x, -1),
}


@dataclass(frozen=True, slots=True)
class Design:
    """A kind of head at a place; `macs` is for one input.

    "average" and "token" make one vector of the tensor; "grid" keeps the map, averaged over
    blocks of `block` pixels, for stride-2 convolutions of these `widths`.
    """

    pooling: Pooling
    macs: int
    widths: tuple[int, ...] = ()
    block: int = 1

    @property
    def label(self) -> str:
        """What a person calls it."""
        if self.pooling == "grid":
            return f"conv {'-'.join(map(str, self.widths))} + linear"
        return "token + linear" if self.pooling == "token" else "average + linear"


class Head(nn.Module):
    """Pool the tensor (no weights), a trunk, a linear layer, and what the model ends with."""

    def __init__(
        self,
        pool: nn.Module,
        trunk: nn.Module,
        linear: nn.Linear,
        answer: tuple[int, ...],
        tail: tuple[TailOp, ...],
    ) -> None:
        super().__init__()
        self.pool, self.trunk, self.linear = pool, trunk, linear
        self._answer, self._tail = answer, tail

    def forward(self, x: Tensor) -> Tensor:
        """The place's tensor [N, ...] -> [N, *answer]."""
        return self.answer(self.pool(x))

    def answer(self, pooled: Tensor) -> Tensor:
        """The rest, from what `pool` gives."""
        y: Tensor = self.linear(self.trunk(pooled))
        for name, numbers in self._tail:
            y = _PLAIN[name](y, *numbers)
        return y.reshape(y.shape[0], *self._answer)

    def start_at(self, mean: Tensor) -> None:
        """Answer `mean` to everything, where the tail can be undone: fits then start near."""
        names = [name for name, _ in self._tail]
        if names not in ([], ["sigmoid"]):
            return
        value = torch.logit(mean, 1e-3) if names else mean
        with torch.no_grad():
            self.linear.weight.zero_()
            self.linear.bias.copy_(value.flatten())


class _Average(nn.Module):
    """The mean over all positions, [N, C]; the global pooling that integer engines know."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self._maps, self._channels_first = len(place.shape) == 3, place.layout == "map"

    def forward(self, x: Tensor) -> Tensor:
        if not self._channels_first:
            return x.flatten(1, -2).mean(1)
        if self._maps:
            return F.adaptive_avg_pool2d(x, 1).flatten(1)
        return x.mean(-1)


class _Token(nn.Module):
    def __init__(self, index: int) -> None:
        super().__init__()
        self._index = index

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self._index]


def designs(
    place: Place, survey: Survey, *, share: float, batch: int, multiple: int
) -> tuple[Design, ...]:
    """Heads to try at a place, the cheapest first; a convolutional one may cost `share` of all."""
    linear = place.channels * math.prod(survey.answer)
    if place.layout == "tokens":
        plain = Design("average", linear)
        return (plain,) if place.token is None else (Design("token", linear), plain)
    found = [Design("average", linear)]
    if place.layout == "map" and len(place.shape) == 3:
        grid = _grid(place, survey, share * survey.macs / batch, multiple)
        found += [grid] if grid is not None else []
    return tuple(found)


def _grid(place: Place, survey: Survey, most_macs: float, multiple: int) -> Design | None:
    """The widest stack of stride-2 convolutions towards the model's last map that fits."""
    channels, *sides = place.shape
    block = max(1, min(sides) // _LARGE_SIDE)
    inner = [s // block for s in sides]
    last = survey.last if survey.last is not None and survey.last.layout == "map" else place
    end = max(_SMALL_SIDE, min(last.shape[1:], default=1))
    count = min(2, max(1, round(math.log2(min(inner) / end))))
    if min(inner) < 3:
        return None
    for scale in _WIDTH_SCALES:
        ratio = max(1.0, last.channels * scale / channels)
        wished = [channels * ratio ** ((i + 1) / count) for i in range(count)]
        widths = tuple(max(multiple, round(w / multiple) * multiple) for w in wished)
        macs = _grid_macs((channels, *widths), inner, math.prod(survey.answer))
        if macs <= most_macs:
            return Design("grid", macs, widths, block)
    return None


def _grid_macs(widths: tuple[int, ...], sides: list[int], answers: int) -> int:
    macs, now = 0, sides
    for before, after in itertools.pairwise(widths):
        now = [(s + 1) // 2 for s in now]
        macs += 9 * before * after * math.prod(now)
    return macs + widths[-1] * answers


def build(design: Design, place: Place, survey: Survey, seed: int) -> Head:
    """An untrained head in eval mode; its weights depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pool, trunk, features = _body(design, place)
        linear = nn.Linear(features, math.prod(survey.answer))
    return Head(pool, trunk, linear, survey.answer, survey.tail).eval()


def _body(design: Design, place: Place) -> tuple[nn.Module, nn.Module, int]:
    """Pool, trunk, and how many numbers the trunk gives."""
    if design.pooling == "grid":
        layers: list[nn.Module] = []
        for before, after in zip((place.channels, *design.widths[:-1]), design.widths, strict=True):
            conv = nn.Conv2d(before, after, 3, 2, 1, bias=False)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            layers += [conv, nn.BatchNorm2d(after), nn.ReLU()]
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        pool = nn.AvgPool2d(design.block) if design.block > 1 else nn.Identity()
        return pool, nn.Sequential(*layers), design.widths[-1]
    if place.layout == "vector":
        return nn.Identity(), nn.Identity(), place.channels
    trunk = nn.LayerNorm(place.channels) if place.layout == "tokens" else nn.Identity()
    if design.pooling == "token":
        assert place.token is not None
        return _Token(place.token), trunk, place.channels
    return _Average(place), trunk, place.channels
