"""Second moments of what layers read, and least-squares repair of layers that lost inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgebudget.train import Forward, TensorData
from edgebudget_passes._slicing import Removal

_LARGEST = 4608  # inputs x kernel positions; the cost of a solve grows with the cube
_RIDGE = 1e-2  # of the mean diagonal: patches of few samples are nearly dependent


@dataclass(frozen=True, slots=True)
class Moments:
    """E[x x^T] (float64 [d, d], ridge included) of a layer's input patches, d = C * kernel.

    `mean` is E[x] where the layer can absorb a shift (bias, or normalisation after it), and then
    `second` is centred; otherwise None.
    """

    second: Tensor
    mean: Tensor | None
    kernel: int

    def rows(self, positions: Sequence[int]) -> Tensor:
        """Indices into d of these input positions, kernel positions together."""
        base = torch.tensor(positions, dtype=torch.long)
        return (base[:, None] * self.kernel + torch.arange(self.kernel)).flatten()


def measurable(layer: nn.Module) -> bool:
    """Whether moments of this layer can be taken and used."""
    if isinstance(layer, nn.Linear):
        return layer.in_features <= _LARGEST
    return (
        isinstance(layer, nn.Conv2d)
        and layer.groups == 1
        and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
        and layer.weight[0].numel() <= _LARGEST
    )


def measure(
    body: nn.Module,
    forward: Forward,
    data: TensorData,
    batch: int,
    names: Iterable[str],
    seed: int,
) -> dict[str, Moments]:
    """Moments of the named layers over `data`, at positions drawn at random in large maps."""
    layers = {n: body.get_submodule(n) for n in names}
    sums = {n: _Sums(m, len(data), seed) for n, m in layers.items() if measurable(m)}
    hooks = [
        layers[n].register_forward_pre_hook(lambda m, args, s=s: s.add(args[0]))
        for n, s in sums.items()
    ]
    try:
        with torch.no_grad():
            for chunk in data.batches(batch):
                forward(body, chunk.inputs)
    finally:
        for hook in hooks:
            hook.remove()
    shifts = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in body.modules())
    return {n: s.moments(shifts) for n, s in sums.items() if s.count}


class _Sums:
    def __init__(self, layer: nn.Module, samples: int, seed: int) -> None:
        self.layer: Any = layer
        self.width = layer.get_parameter("weight")[0].numel()
        self.per_sample = max(1, -(-(16 * self.width + 8192) // max(1, samples)))
        self.draw = torch.Generator().manual_seed(seed)
        self.count = 0
        self.second = torch.zeros(self.width, self.width, dtype=torch.float64)
        self.total = torch.zeros(self.width, dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        rows = self._linear(x) if isinstance(self.layer, nn.Linear) else self._patches(x)
        self.count += len(rows)
        self.second += (rows.T @ rows).double()
        self.total += rows.sum(0).double()

    def _linear(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        limit = self.per_sample * len(x)
        if len(rows) <= limit:
            return rows
        return rows[torch.randint(len(rows), (limit,), generator=self.draw)]

    def _patches(self, x: Tensor) -> Tensor:
        layer = self.layer
        (ph, pw), (sh, sw), (dh, dw) = layer.padding, layer.stride, layer.dilation
        kh, kw = layer.kernel_size
        height = (x.shape[2] + 2 * ph - dh * (kh - 1) - 1) // sh + 1
        width = (x.shape[3] + 2 * pw - dw * (kw - 1) - 1) // sw + 1
        number = min(self.per_sample, height * width) * len(x)
        spot = torch.randint(len(x) * height * width, (number,), generator=self.draw)
        n, place = spot // (height * width), spot % (height * width)
        r = (place // width)[:, None] * sh + torch.arange(kh) * dh
        c = (place % width)[:, None] * sw + torch.arange(kw) * dw
        padded = F.pad(x, (pw, pw, ph, ph)).permute(0, 2, 3, 1)
        patch = padded[n[:, None, None], r[:, :, None], c[:, None, :]]
        return patch.permute(0, 3, 1, 2).reshape(number, -1)

    def moments(self, shifts: bool) -> Moments:
        second, mean = self.second / self.count, self.total / self.count
        centred = self.layer.bias is not None or (shifts and isinstance(self.layer, nn.Conv2d))
        if centred:
            second = second - torch.outer(mean, mean)
        ridge = _RIDGE * second.diagonal().mean().clamp_min(1e-12)
        second = second + ridge * torch.eye(self.width, dtype=torch.float64)
        kernel = 1 if isinstance(self.layer, nn.Linear) else self.layer.weight[0, 0].numel()
        return Moments(second, mean if centred else None, kernel)


def repair(
    original: nn.Module, pruned: nn.Module, gone: Removal, moments: Mapping[str, Moments]
) -> int:
    """Let the inputs that stay make up for those that went, in place; how many layers it changed.

    Least squares on the original's own inputs: W_K += W_R S_RK S_KK^-1 with K kept, R removed.
    Source: "Channel Pruning for Accelerating Very Deep Neural Networks", 2017.
    """
    changed = 0
    for name, positions in gone.into.items():
        known = moments.get(name)
        if known is None:
            continue
        layer, before = pruned.get_submodule(name), original.get_submodule(name)
        weight = before.get_parameter("weight").detach().double().flatten(1)
        lost = known.rows(positions)
        mask = torch.ones(weight.shape[1], dtype=torch.bool)
        mask[lost] = False
        kept = mask.nonzero().flatten()
        cross = weight[:, lost] @ known.second[lost][:, kept]
        change = torch.linalg.solve(known.second[kept][:, kept], cross.T).T
        outputs = gone.out.get(name, ())
        rows = torch.ones(len(weight), dtype=torch.bool)
        rows[list(outputs)] = False
        with torch.no_grad():
            target = layer.get_parameter("weight")
            target.add_(change[rows].reshape(target.shape).to(target.dtype))
            bias = getattr(layer, "bias", None)
            if known.mean is not None and bias is not None:
                shift = weight[:, lost] @ known.mean[lost] - change @ known.mean[kept]
                bias.add_(shift[rows].to(bias.dtype))
        changed += 1
    return changed
