"""From a picture file to a model's input, as the manifest's `preprocessing` says.

`preprocessing` is plain JSON:

    layout  "NCHW" or "NHWC"
    color   "RGB", "BGR" or "grey"
    range   [low, high] that the byte levels 0..255 are scaled to
    mean    subtracted after scaling, one number per channel
    std     divided by after that, one number per channel
    resize  its first word decides: "none" (the picture must have the model's size),
            "shorter" (shorter side to the model's size, then the centre), "stretch"

The height and width come from the model's input.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgebudget_runtime.errors import ArtifactError, UsageError
from edgebudget_runtime.inputs import Array, shown
from edgebudget_runtime.manifest import Tensor

if TYPE_CHECKING:
    from PIL import Image

_MODES = {"RGB": "RGB", "BGR": "RGB", "grey": "L"}
_RESIZES = ("none", "shorter", "stretch")


def read_image(path: Path, preprocessing: Mapping[str, Any], tensor: Tensor) -> Array:
    """One picture as the input `tensor` takes it, batch dimension included.

    Raises:
        UsageError: EB176 the manifest does not say how to prepare a picture, EB177 the picture
            has another size and may not be resized, EB178 Pillow is not installed.
        ArtifactError: EB508 the file is not a picture.
    """
    layout, color, resize = (_word(preprocessing, k) for k in ("layout", "color", "resize"))
    if layout not in ("NCHW", "NHWC") or color not in _MODES or resize not in _RESIZES:
        raise UsageError(
            "EB176",
            f"the artifact does not say how to prepare a picture (layout {layout!r}, "
            f"color {color!r}, resize {resize!r})",
            hint="give the model's input as a .npy file",
        )
    shape = tensor.shape if layout == "NCHW" else _channels_first(tensor.shape)
    height, width = shape[2:] if len(shape) == 4 else (None, None)
    if height is None or width is None or shape[1] != (1 if color == "grey" else 3):
        raise UsageError(
            "EB176",
            f"input {tensor.name!r} {shown(tensor.shape)} does not take a {color} picture",
            hint="give the model's input as a .npy file",
        )
    levels = _decoded(path, _MODES[color], resize, (width, height))
    if color == "BGR":
        levels = levels[..., ::-1]
    pixels = levels if tensor.dtype == "uint8" else _scaled(levels, preprocessing, tensor.dtype)
    ordered = np.moveaxis(pixels, -1, 0) if layout == "NCHW" else pixels
    return np.ascontiguousarray(ordered[None])


def _word(preprocessing: Mapping[str, Any], key: str) -> str:
    value = preprocessing.get(key)
    words = value.replace(":", " ").split() if isinstance(value, str) else []
    return words[0] if words else ""


def _channels_first(shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
    return (shape[0], shape[3], shape[1], shape[2]) if len(shape) == 4 else shape


def _decoded(path: Path, mode: str, resize: str, size: tuple[int, int]) -> Array:
    """uint8 [H, W, C] of exactly `size` (width, height)."""
    try:
        from PIL import Image
    except ImportError as e:
        raise UsageError("EB178", "reading pictures needs Pillow", hint="pip install pillow") from e
    try:
        with Image.open(path) as file:
            picture = file.convert(mode)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        raise ArtifactError(
            "EB508", f"{path} cannot be read as a picture: {e}", hint="give a PNG or JPEG file"
        ) from e
    levels = np.asarray(_resized(picture, resize, size, path))
    return levels[..., None] if levels.ndim == 2 else levels


def _resized(picture: Image.Image, how: str, size: tuple[int, int], path: Path) -> Image.Image:
    from PIL import Image

    if picture.size == size:
        return picture
    if how == "none":
        raise UsageError(
            "EB177",
            f"{path} is {picture.width}x{picture.height}, the model takes {size[0]}x{size[1]}",
            hint="give a picture of that size: resizing it would change the answer",
        )
    if how == "stretch":
        return picture.resize(size, Image.Resampling.BILINEAR)
    scale = max(size[0] / picture.width, size[1] / picture.height)
    wide, high = max(size[0], round(picture.width * scale)), round(picture.height * scale)
    picture = picture.resize((wide, max(size[1], high)), Image.Resampling.BILINEAR)
    left, top = (picture.width - size[0]) // 2, (picture.height - size[1]) // 2
    return picture.crop((left, top, left + size[0], top + size[1]))


def _scaled(levels: Array, preprocessing: Mapping[str, Any], dtype: str) -> Array:
    channels = levels.shape[-1]
    try:
        low, high = (np.float32(v) for v in preprocessing.get("range", (0.0, 1.0)))
        mean, std = (
            np.broadcast_to(np.asarray(preprocessing.get(k, d), np.float32), (channels,))
            for k, d in (("mean", 0.0), ("std", 1.0))
        )
        if not (high > low and std.all()):
            raise ValueError("`range` does not rise, or `std` is 0")
    except (TypeError, ValueError) as e:
        raise UsageError(
            "EB176",
            f"`preprocessing` in manifest.json cannot be followed: {e}",
            hint="give the model's input as a .npy file",
        ) from e
    # Division, not multiplication by 1/255: the training data was scaled this way.
    scaled = levels.astype(np.float32) / (np.float32(255) / (high - low)) + low
    return ((scaled - mean) / std).astype(dtype)
