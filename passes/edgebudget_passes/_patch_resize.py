"""Larger patches for a vision transformer: kernel by pseudo-inverse, positions by interpolation.

Source: "FlexiViT: One Model for All Patch Sizes", Beyer et al., 2023.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgebudget_passes._nested_nodes import readers

_PREFIX = "body."  # what the exporter puts before every name
_MOST_PREFIX = 8  # class, distillation and register tokens


@dataclass(frozen=True, slots=True)
class PatchEmbedding:
    """The convolution that cuts the picture [height, width] into patches, and the positions."""

    conv: str
    positions: str
    picture: tuple[int, int]
    patch: tuple[int, int]
    prefix: int  # tokens before those of the picture
    token_dim: int

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across."""
        return self.picture[0] // self.patch[0], self.picture[1] // self.patch[1]

    def sizes(self) -> tuple[int, ...]:
        """Larger square patches that divide the picture, and leave at least two in each row."""
        side = max(self.patch)
        return tuple(
            p
            for p in range(side + 1, min(self.picture) // 2 + 1)
            if all(length % p == 0 for length in self.picture)
        )


class Resample(nn.Module):
    """Multiplies a tensor by a matrix along one dimension, or along two that it flattens."""

    matrix: Tensor

    def __init__(self, matrix: Tensor, dim: int, folded: tuple[int, ...]) -> None:
        """`folded`: `dim` and the next one are one for the matrix, and become these sizes."""
        super().__init__()
        self.register_buffer("matrix", matrix, persistent=False)
        self.dim, self.folded = dim, folded

    def forward(self, value: Tensor) -> Tensor:
        """[..., n, ...] -> [..., m, ...]."""
        if self.folded:
            value = value.flatten(self.dim, self.dim + 1)
        moved = value.movedim(self.dim, -1) @ self.matrix.to(value.dtype).T
        result = moved.movedim(-1, self.dim)
        if self.folded:
            shape = result.shape
            result = result.reshape(*shape[: self.dim], *self.folded, *shape[self.dim + 1 :])
        return result


def kernel_matrix(old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """[new pixels, old pixels]: the pseudo-inverse of the transposed bilinear resize.

    A larger patch then answers to an enlarged picture what the stored one answers to the picture.
    """
    inverse: Tensor = torch.linalg.pinv(_resize(old, new, antialias=False).T)
    return inverse.float()


def position_matrix(old: tuple[int, int], new: tuple[int, int], prefix: int) -> Tensor:
    """[prefix + new tokens, prefix + old tokens]: bilinear over the grid, the prefix as it is."""
    grid = _resize(old, new, antialias=True)
    matrix = torch.eye(prefix + len(grid), prefix + grid.shape[1])
    matrix[prefix:, prefix:] = grid
    return matrix


def _resize(old: tuple[int, int], new: tuple[int, int], *, antialias: bool) -> Tensor:
    """Bilinear resize of a picture as a matrix [new pixels, old pixels], float64."""
    basis = torch.eye(old[0] * old[1], dtype=torch.float64).reshape(-1, 1, *old)
    sized = F.interpolate(basis, new, mode="bilinear", antialias=antialias, align_corners=False)
    return sized.flatten(1).T


def find_patches(captured: torch.export.ExportedProgram, image: str) -> PatchEmbedding | str:
    """The patch embedding of an exported program, or why there is none.

    `image` is the placeholder of the picture.
    """
    parameters = captured.graph_signature.inputs_to_parameters
    stored = {k: v.removeprefix(_PREFIX) for k, v in parameters.items()}
    nodes = {n.name: n for n in captured.graph.nodes}
    picture = nodes[image]
    conv = _first_conv(picture)
    if conv is None:
        return "the picture does not go straight into a convolution"
    weight = conv.args[1]
    kernel, stride, padding = tuple(weight.meta["val"].shape[2:]), *_geometry(conv)
    if kernel != stride or any(padding) or weight.name not in stored:
        return f"its first convolution is no patch embedding: kernel {kernel}, stride {stride}"
    height, width = picture.meta["val"].shape[2:]
    grid = (height // kernel[0]) * (width // kernel[1])
    width_tokens = weight.meta["val"].shape[0]
    for name, parameter in stored.items():
        shape = tuple(nodes[name].meta["val"].shape)
        if len(shape) not in (2, 3) or shape[-1] != width_tokens or shape[:-2] not in ((), (1,)):
            continue
        extra = shape[-2] - grid
        if 0 <= extra <= _MOST_PREFIX and _added(nodes[name]):
            return PatchEmbedding(
                conv=stored[weight.name].removesuffix(".weight"),
                positions=parameter,
                picture=(height, width),
                patch=(kernel[0], kernel[1]),
                prefix=extra,
                token_dim=len(shape) - 2,
            )
    return "no learned positions, one for each patch, are added to the patches"


def _first_conv(picture: Any) -> Any:
    """The only user of the picture, element-wise steps aside, if it is a convolution."""
    node = picture
    while len(found := readers(node)) == 1:
        node = found[0]
        if node.target is torch.ops.aten.conv2d.default:
            return node
        if not isinstance(node.target, torch._ops.OpOverload):
            return None
        same = node.target.overloadpacket.__name__ in ("to", "_to_copy", "clone", "contiguous")
        if not same and torch.Tag.pointwise not in node.target.tags:
            return None
    return None


def _geometry(conv: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    given = [*conv.args, *(None,) * (7 - len(conv.args))]
    stride, padding = given[3] or (1, 1), given[4] or (0, 0)
    return tuple(stride), tuple(padding)


def _added(parameter: Any) -> bool:
    """Whether an addition is all that reads it (`expand` and the like aside)."""
    users = readers(parameter)
    return len(users) == 1 and users[0].target in (
        torch.ops.aten.add.Tensor,
        torch.ops.aten.add_.Tensor,
    )
