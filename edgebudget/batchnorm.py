"""Re-estimate batch-normalisation statistics after a network's structure changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class _Moments:
    """Pooled sums per channel, in float64 so that many samples add up exactly enough."""

    def __init__(self, channels: int) -> None:
        self.count = 0
        self.total = torch.zeros(channels, dtype=torch.float64)
        self.squares = torch.zeros(channels, dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """Add [N, C, ...]."""
        dims = [d for d in range(x.dim()) if d != 1]
        # Centred on the batch mean first: sums of float32 squares would lose the variance.
        variance, mean = torch.var_mean(x, dims, correction=0)
        number = x.numel() // x.shape[1]
        mean64 = mean.double()
        self.count += number
        self.total += number * mean64
        self.squares += number * (variance.double() + mean64 * mean64)

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean, and E[x^2] - E[x]^2 with Bessel's correction as training would store it."""
        mean = self.total / self.count
        variance = (self.squares / self.count - mean * mean).clamp_min(0)
        return mean, variance * (self.count / max(1, self.count - 1))


def refresh(
    module: nn.Module,
    batches: Iterable[tuple[Tensor, ...]],
    forward: Callable[[tuple[Tensor, ...]], object] | None = None,
) -> int:
    """Set every running mean and variance to those of `batches`, each sample weighing the same.

    Layers normalise by their batch's statistics meanwhile, as in training, and everything else
    stays as it is (dropout off). Returns how many layers were refreshed.
    Source: candidate selection of "FedTiny: Pruned Federated Learning Towards Specialized Tiny
    Models", 2022; statistics pooled over all samples instead of averaged over batches.
    """
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return 0
    moments = {m: _Moments(m.num_features) for m in norms}
    modes = [(m, m.training, m.momentum) for m in norms]
    hooks = [m.register_forward_pre_hook(lambda m, args: moments[m].add(args[0])) for m in norms]
    try:
        for m in norms:
            m.training, m.momentum = True, 0.0
        with torch.no_grad():
            for batch in batches:
                if forward is None:
                    module(*batch)
                else:
                    forward(batch)
    finally:
        for hook in hooks:
            hook.remove()
        for m, training, momentum in modes:
            m.training, m.momentum = training, momentum
    for m in norms:
        _store(m, moments[m])
    return len(norms)


def _store(layer: _BatchNorm, moments: _Moments) -> None:
    if not moments.count or layer.running_mean is None or layer.running_var is None:
        return
    mean, variance = moments.statistics()
    layer.running_mean.copy_(mean)
    layer.running_var.copy_(variance)
