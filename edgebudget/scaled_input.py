"""A network behind a shrinking of its picture, and the shapes a network answers with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from edgebudget.export import call, quiet, select_outputs

if TYPE_CHECKING:
    from edgebudget.program import Program


class ScaledInput(nn.Module):
    """Shrinks the picture among the inputs from `outer` to `inner` [height, width], then runs on.

    Pictures of another size, as training crops may be, shrink in the same proportion.
    """

    def __init__(
        self,
        network: nn.Module,
        names: Sequence[str],
        image: str,
        outer: tuple[int, int],
        inner: tuple[int, int],
        multiple: int,
    ) -> None:
        super().__init__()
        self.network = network
        self.outer, self.inner, self.multiple = outer, inner, multiple
        self._names = tuple(names)
        self._image = self._names.index(image)

    def forward(self, *inputs: Tensor) -> Any:
        """Inputs in the program's order, the picture as [N, C, H, W]."""
        tensors = list(inputs)
        picture = tensors[self._image]
        tensors[self._image] = shrink(picture, self._size(picture.shape[2], picture.shape[3]))
        return call(self.network, self._names, tensors)

    def _size(self, height: int, width: int) -> tuple[int, int]:
        if (height, width) == self.outer:
            return self.inner
        m = self.multiple
        scales = (self.inner[0] / self.outer[0], self.inner[1] / self.outer[1])
        h, w = (
            max(m, int(v * s / m + 0.5) * m) for v, s in zip((height, width), scales, strict=True)
        )
        return h, w


def shrink(picture: Tensor, size: tuple[int, int]) -> Tensor:
    """[N, C, H, W] -> [N, C, *size]: the mean of whole blocks, then bilinear for the rest."""
    blocks = [max(1, have // want) for have, want in zip(picture.shape[2:], size, strict=True)]
    if max(blocks) > 1:
        picture = F.avg_pool2d(picture, blocks)
    if tuple(picture.shape[2:]) != size:
        picture = F.interpolate(picture, size, mode="bilinear", align_corners=False)
    return picture


def output_shapes(program: Program) -> list[tuple[int, ...]]:
    """Shapes of a module-stage program's outputs, computed on shapes alone."""
    body: nn.Module = program.body
    with quiet(), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        tensors = [torch.empty(s.shape, dtype=getattr(torch, s.dtype)) for s in program.inputs]
        value = call(body, [s.name for s in program.inputs], tensors)
        return [tuple(t.shape) for t in select_outputs(value, program.outputs)]
