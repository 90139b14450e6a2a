"""Graded distortions of a picture, the same code on CPU and GPU.

Every distortion takes a grade in [0, 1]: 0 is barely visible on a 3840x2160 picture, 1 is ruin.
The strengths grow geometrically, which spreads the labels (see `iqa_metric`) about evenly.
Strong distortions are made on the picture shrunk four times: at these strengths nothing finer
is left of it, and a whole picture costs a fraction of a second on one core.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

_GRAIN = 2  # pixels a side of one grain of noise
_SHRINK = 4

# Quantisation tables of "ITU-T T.81, Digital compression and coding of continuous-tone still
# images", 1992, annex K.1 (luminance and chrominance, row by row).
_LUMINANCE_TABLE = (
    "16 11 10 16 24 40 51 61 12 12 14 19 26 58 60 55 14 13 16 24 40 57 69 56 "
    "14 17 22 29 51 87 80 62 18 22 37 56 68 109 103 77 24 35 55 64 81 104 113 92 "
    "49 64 78 87 103 121 120 101 72 92 95 98 112 100 103 99"
)
_CHROMINANCE_TABLE = (
    "17 18 24 47 99 99 99 99 18 21 26 66 99 99 99 99 24 26 56 99 99 99 99 99 "
    "47 66 99 99 99 99 99 99" + " 99" * 32
)
_TO_YCC = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))


@dataclass(frozen=True, slots=True)
class Distortion:
    """What is done to a picture, and how strongly (grade in [0, 1])."""

    kind: str
    grade: float


def distort(picture: Tensor, distortions: Sequence[Distortion], seed: int) -> Tensor:
    """Pictures [N, 3, H, W] in [0, 1] after `distortions` in order, in 256 levels.

    H and W are multiples of 4. Deterministic for a seed on one kind of device.
    """
    generator = torch.Generator(picture.device).manual_seed(seed)
    for distortion in distortions:
        picture = _KINDS[distortion.kind](picture, distortion.grade, generator)
        picture = picture.clamp(0.0, 1.0)
    return (picture * 255).round() / 255


def _between(weak: float, strong: float, grade: float) -> float:
    return weak * math.exp(grade * math.log(strong / weak))


def _enlarge(picture: Tensor, height: int, width: int) -> Tensor:
    # The antialiased kernel is the separable one: four times faster here, same result upwards.
    return F.interpolate(
        picture, size=(height, width), mode="bicubic", antialias=True, align_corners=False
    )


def _blur(picture: Tensor, grade: float, generator: torch.Generator) -> Tensor:
    """Gaussian blur."""
    sigma = _between(1.2, 14.0, grade)
    small = F.avg_pool2d(picture, _SHRINK)
    radius = min(math.ceil(3 * sigma), min(small.shape[-2:]) - 1)
    offsets = torch.arange(-radius, radius + 1, device=picture.device, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    rows = (kernel / kernel.sum()).view(1, 1, 1, -1).expand(3, 1, 1, -1)
    padded = F.pad(small, (radius, radius, radius, radius), mode="reflect")
    soft = F.conv2d(F.conv2d(padded, rows, groups=3), rows.transpose(2, 3), groups=3)
    return _enlarge(soft, *picture.shape[-2:])


def _noise(picture: Tensor, grade: float, generator: torch.Generator) -> Tensor:
    """White Gaussian noise in grains, independent in each colour."""
    sigma = _between(0.015, 0.5, grade)
    shape = (len(picture), 3, picture.shape[-2] // _GRAIN, picture.shape[-1] // _GRAIN)
    grains = torch.randn(shape, generator=generator, device=picture.device) * sigma
    return picture + F.interpolate(grains, scale_factor=_GRAIN, mode="nearest")


def _compress(picture: Tensor, grade: float, generator: torch.Generator) -> Tensor:
    """The losses of JPEG on the shrunk picture: DCT of 8x8 blocks, quantised."""
    quality = _between(40.0, 1.0, grade)
    small = F.avg_pool2d(picture, _SHRINK)
    height, width = small.shape[-2:]
    padded = F.pad(small, (0, -width % 8, 0, -height % 8), mode="replicate")
    constants = _constants(picture.device)
    ycc = torch.einsum("ij,njhw->nihw", constants.to_ycc, padded) * 255
    blocks = ycc.unfold(2, 8, 8).unfold(3, 8, 8) - constants.shift
    table = constants.table * (50.0 / quality)  # as common encoders scale it below 50
    coefficients = (constants.dct @ blocks @ constants.dct.T / table).round() * table
    restored = constants.dct.T @ coefficients @ constants.dct + constants.shift
    ycc = restored.transpose(3, 4).reshape(padded.shape) / 255
    rgb = torch.einsum("ij,njhw->nihw", constants.to_rgb, ycc)
    return _enlarge(rgb[..., :height, :width].clamp(0, 1), *picture.shape[-2:])


@dataclass(frozen=True, slots=True)
class _Constants:
    to_ycc: Tensor  # [3, 3]
    to_rgb: Tensor  # [3, 3]
    shift: Tensor  # [3, 1, 1, 1, 1]
    table: Tensor  # [3, 1, 1, 8, 8]
    dct: Tensor  # [8, 8]


@lru_cache
def _constants(device: torch.device) -> _Constants:
    # Kept on the device: each copy there would make the host wait for all work before it.
    to_ycc = torch.tensor(_TO_YCC)
    luminance, chrominance = (
        torch.tensor([float(v) for v in table.split()]).view(8, 8)
        for table in (_LUMINANCE_TABLE, _CHROMINANCE_TABLE)
    )
    table = torch.stack([luminance, chrominance, chrominance]).view(3, 1, 1, 8, 8)
    k = torch.arange(8, dtype=torch.float32)
    dct = torch.cos(math.pi / 8 * (k[None, :] + 0.5) * k[:, None]) / 2
    dct[0] /= math.sqrt(2)
    shift = torch.tensor((128.0, 0.0, 0.0)).view(3, 1, 1, 1, 1)
    tensors = (to_ycc, torch.linalg.inv(to_ycc), shift, table, dct)
    return _Constants(*(tensor.to(device) for tensor in tensors))


def _pixelate(picture: Tensor, grade: float, generator: torch.Generator) -> Tensor:
    """Averages over squares."""
    side = _between(12.0, 160.0, grade)
    height, width = picture.shape[-2:]
    small = F.adaptive_avg_pool2d(
        picture, (max(1, round(height / side)), max(1, round(width / side)))
    )
    return F.interpolate(small, size=(height, width), mode="nearest")


def _flatten(picture: Tensor, grade: float, generator: torch.Generator) -> Tensor:
    """Contrast and colour lost towards middle grey."""
    return 0.5 + (picture - 0.5) * _between(0.8, 0.04, grade)


def _band(picture: Tensor, grade: float, generator: torch.Generator) -> Tensor:
    """Few levels in each colour."""
    steps = _between(16.0, 0.8, grade)
    return (picture * steps).round() / steps


_KINDS: dict[str, Callable[[Tensor, float, torch.Generator], Tensor]] = {
    "blur": _blur,
    "noise": _noise,
    "compress": _compress,
    "pixelate": _pixelate,
    "flatten": _flatten,
    "band": _band,
}
KINDS = tuple(_KINDS)
