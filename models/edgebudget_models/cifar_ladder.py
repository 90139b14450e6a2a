"""What networks with a ladder of exits beside their body share: a last answer from both."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn


class Laddered(nn.Module):
    """A body, exits that build on each other, and `linear` over the features of both."""

    linear: nn.Linear

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)

    @abstractmethod
    def early(self, image: Tensor) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """All exits but the last; the features of the body and of the ladder at the last tap."""

    @abstractmethod
    def late(self, x: Tensor) -> Tensor:
        """The body's last features [N, C, H, W] from those at the last tap."""

    @abstractmethod
    def last_exit(self) -> nn.Linear:
        """The head of the last exit."""

    def pooled(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C]."""
        return torch.flatten(self.pool(x), 1)

    def join(self, head: nn.Linear, share: float) -> None:
        """Make the last answer one of the body's own, by `head`, and `share` of the last exit's."""
        other = self.last_exit()
        with torch.no_grad():
            self.linear.weight.copy_(
                torch.cat(((1 - share) * head.weight, share * other.weight), 1)
            )
            self.linear.bias.copy_((1 - share) * head.bias + share * other.bias)
