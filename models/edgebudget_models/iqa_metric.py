"""The full-reference metric behind the labels of `uhd-iqa`.

Source: "Multi-scale structural similarity for image quality assessment", Wang, Simoncelli and
Bovik, 2003: luminance is compared at the coarsest scale, contrast and structure at every scale,
and the scales are weighted as that paper measured. Within a scale, places count by the
information they carry ("Spatial pooling strategies for perceptual image quality assessment",
Wang and Shang, 2006): without that, a photograph of much sky would pass as good after anything.

Two choices are ours. The pictures are first averaged over 4x4 pixels, which is about what a
viewer resolves of a 3840x2160 picture shown whole; and the finest of the five scales is left
out, so that crops from 512x512 up can be labelled too.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# The paper's weights of scales 2 to 5, scaled to sum to one.
_WEIGHTS = tuple(w / 0.9552 for w in (0.2856, 0.3001, 0.2363, 0.1332))
_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = 0.01**2, 0.03**2
_LUMA = (0.299, 0.587, 0.114)
# Chosen so that the grades of `iqa_distort` spread the labels over [0.1, 1].
_LABEL_POWER = 2.0

SHRINK = 4
SMALLEST_SIDE = SHRINK * 2 ** (len(_WEIGHTS) - 1) * _WINDOW


def ms_ssim(reference: Tensor, distorted: Tensor) -> Tensor:
    """Similarity in [0, 1] of RGB pictures [N, 3, H, W] in [0, 1] -> [N]; 1 for equal pictures.

    Raises ValueError for sides shorter than `SMALLEST_SIDE` pixels.
    """
    if min(reference.shape[-2:]) < SMALLEST_SIDE:
        raise ValueError(f"a side of {min(reference.shape[-2:])} pixels, needed {SMALLEST_SIDE}")
    x, y = _luma(reference), _luma(distorted)
    kernel = _gaussian(x)
    score = torch.ones(x.shape[0], device=x.device)
    for scale, weight in enumerate(_WEIGHTS):
        if scale:
            x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
        luminance, structure, information = _terms(x, y, kernel)
        last = scale == len(_WEIGHTS) - 1
        similar = luminance * structure if last else structure
        total = information.sum(dim=(1, 2, 3))
        term = (similar * information).sum(dim=(1, 2, 3)) / total
        score = score * term.clamp(min=0) ** weight
    return score


def label(reference: Tensor, distorted: Tensor) -> Tensor:
    """The quality [N] that `uhd-iqa` learns: a monotone map of `ms_ssim` onto [0, 1]."""
    return ms_ssim(reference, distorted) ** _LABEL_POWER


def _luma(picture: Tensor) -> Tensor:
    small = F.avg_pool2d(picture, SHRINK)
    return _LUMA[0] * small[:, 0:1] + _LUMA[1] * small[:, 1:2] + _LUMA[2] * small[:, 2:3]


def _gaussian(like: Tensor) -> Tensor:
    offsets = torch.arange(_WINDOW, device=like.device, dtype=torch.float32) - _WINDOW // 2
    weights = torch.exp(-0.5 * (offsets / _SIGMA) ** 2)
    return weights / weights.sum()


def _terms(x: Tensor, y: Tensor, kernel: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The luminance term, the contrast-structure term and the information at every position."""
    maps = torch.cat([x, y, x * x, y * y, x * y], dim=1)
    rows = kernel.view(1, 1, 1, -1).expand(5, 1, 1, -1)
    smooth = F.conv2d(F.conv2d(maps, rows, groups=5), rows.transpose(2, 3), groups=5)
    mean_x, mean_y, xx, yy, xy = smooth.unsqueeze(2).unbind(1)
    variance_x = (xx - mean_x * mean_x).clamp(min=0)
    variance_y = (yy - mean_y * mean_y).clamp(min=0)
    covariance = xy - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + _C1) / (mean_x * mean_x + mean_y * mean_y + _C1)
    structure = (2 * covariance + _C2) / (variance_x + variance_y + _C2)
    # The small constant lets pictures without any detail be compared too.
    information = torch.log1p(variance_x / _C2) + torch.log1p(variance_y / _C2) + 1e-6
    return luminance, structure, information
