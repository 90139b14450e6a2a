"""A small vision transformer for 32x32 pictures, in plain modules.

Source: "An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale", Dosovitskiy
et al., 2021, with patches of 4x4 pixels and the mean of all tokens in place of a class token.
While training, whole layers are left out at random ("Deep Networks with Stochastic Depth", Huang
et al., 2016), the later the more often: the trained network bears layers being skipped.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PATCH = 4  # pixels a side


class Attention(nn.Module):
    """Multi-head self-attention over all tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[N, tokens, width] -> the same shape."""
        q, k, v = (self._split(f(x)) for f in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(q, k, v)
        merged: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return merged

    def _split(self, x: Tensor) -> Tensor:
        count, tokens, width = x.shape
        return x.reshape(count, tokens, self.heads, width // self.heads).transpose(1, 2)


class Layer(nn.Module):
    """Attention, then two linear layers, each on normalised tokens and added to them.

    `drop` is the share of the training samples that go round each of the two.
    """

    def __init__(self, width: int, heads: int, hidden: int, drop: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.expand = nn.Linear(width, hidden)
        self.reduce = nn.Linear(hidden, width)
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        """[N, tokens, width] -> the same shape."""
        x = x + self._dropped(self.attention(self.norm1(x)))
        return x + self._dropped(self.reduce(F.gelu(self.expand(self.norm2(x)))))

    def _dropped(self, x: Tensor) -> Tensor:
        if not self.training or not self.drop:
            return x
        kept = torch.rand(len(x), 1, 1, device=x.device) >= self.drop
        return x * (kept / (1 - self.drop)).to(x.dtype)


class VisionTransformer(nn.Module):
    """Patches, learnt positions, `depth` layers, the mean token, one linear layer."""

    def __init__(
        self,
        width: int = 160,
        depth: int = 9,
        heads: int = 5,
        classes: int = 10,
        size: int = 32,
        drop: float = 0.1,
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, PATCH, PATCH)
        self.positions = nn.Parameter(torch.zeros(1, (size // PATCH) ** 2, width))
        self.layers = nn.Sequential(
            *(Layer(width, heads, 4 * width, drop * i / max(1, depth - 1)) for i in range(depth))
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        nn.init.trunc_normal_(self.positions, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, image: Tensor) -> Tensor:
        """[N, 3, 32, 32], normalised RGB, -> class scores [N, classes]."""
        x = self.patches(image).flatten(2).transpose(1, 2) + self.positions
        scores: Tensor = self.head(self.norm(self.layers(x)).mean(1))
        return scores
