"""How a network with a ladder of exits learns."""

from __future__ import annotations

from torch import Tensor, nn

from edgebudget_models.cifar_ladder import Laddered


class Student(nn.Module):
    """The network with a body that answers for itself, by `head`, while training.

    Were the last answer trained on body and ladder at once, it would lean on the ladder, which is
    sooner good, and the body would learn less.
    """

    def __init__(self, net: Laddered, head: nn.Linear) -> None:
        super().__init__()
        self.net, self.head = net, head
        self.net.linear.requires_grad_(False)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Scores of the exits, the last by the body alone."""
        answers, x, _ = self.net.early(image)
        return (*answers, self.head(self.net.pooled(self.net.late(x))))
