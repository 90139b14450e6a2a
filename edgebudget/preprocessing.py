"""From a picture file to a model's input: what to do, and how a user or a model says it."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

import numpy as np

from edgebudget.workload import Array
from edgebudget_runtime.errors import ArtifactError, UsageError

if TYPE_CHECKING:
    from PIL import Image

    from edgebudget.program import TensorSpec

_CHOICES: Mapping[str, Mapping[str, str]] = {
    "color": {"rgb": "RGB", "bgr": "BGR", "grey": "grey", "gray": "grey"},
    "layout": {"nchw": "NCHW", "nhwc": "NHWC"},
    "resize": {"shorter": "shorter", "stretch": "stretch"},
    "filter": {"bilinear": "bilinear", "bicubic": "bicubic", "nearest": "nearest"},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocessing:
    """How a picture becomes an input of [height, width] = `size`.

    resize "shorter": the shorter side is scaled to `shorter_side` pixels (None: until the
    picture just covers `size`) and the centre is cut out; "stretch": scaled to `size` whatever
    the proportions. Levels 0..255 are mapped to `range`, then (value - mean) / std per channel,
    channels in the order of `color`.
    """

    size: tuple[int, int]
    resize: str = "shorter"
    shorter_side: int | None = None
    filter: str = "bilinear"
    color: str = "RGB"
    range: tuple[float, float] = (0.0, 1.0)
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    layout: str = "NCHW"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON in the manifest's words (see `edgebudget_runtime.preprocess`)."""
        height, width = self.size
        if self.resize == "stretch":
            what = f"stretch to {width}x{height}"
        else:
            short = (
                "to cover" if self.shorter_side is None else f"side to {self.shorter_side}, then"
            )
            what = f"shorter {short} {width}x{height}, centre crop"
        if self.filter != "bilinear" or self.shorter_side is not None:
            # The runtime's own picture reader must refuse what it would do differently.
            what = f"own: {what}, {self.filter}"
        return {
            "layout": self.layout,
            "color": self.color,
            "range": list(self.range),
            "mean": list(self.mean),
            "std": list(self.std),
            "size": list(self.size),
            "resize": what,
        }

    def picture(self, image: Image.Image) -> Array:
        """uint8 [height, width, channels], channels in the order of `color`."""
        from PIL import Image as Pil

        image = image.convert("L" if self.color == "grey" else "RGB")
        height, width = self.size
        how = Pil.Resampling[self.filter.upper()]
        wide, high = width, height
        if self.resize == "shorter":
            scale = max(width / image.width, height / image.height)
            if self.shorter_side is not None:
                scale = self.shorter_side / min(image.size)
            wide = max(width, round(image.width * scale))
            high = max(height, round(image.height * scale))
        if image.size != (wide, high):
            image = image.resize((wide, high), how)
        left, top = (wide - width) // 2, (high - height) // 2
        image = image.crop((left, top, left + width, top + height))
        pixels: Array = np.asarray(image).reshape(height, width, -1)
        return np.ascontiguousarray(pixels[..., ::-1]) if self.color == "BGR" else pixels

    def tensor(self, picture: Array, dtype: str) -> Array:
        """The model's input without batch, from uint8 [height, width, channels]."""
        low, high = np.float32(self.range[0]), np.float32(self.range[1])
        scaled = picture.astype(np.float32) / np.float32(255) * (high - low) + low
        mean, std = (np.asarray(v, np.float32) for v in (self.mean, self.std))
        value: Array = (scaled - mean) / std
        if dtype == "uint8":
            value = np.clip(np.rint(value), 0, 255)
        if self.layout == "NCHW":
            value = value.transpose(2, 0, 1)
        return np.ascontiguousarray(value, dtype=dtype)


def preprocessing_for(
    spec: TensorSpec, described: Mapping[str, Any], query: str, source: str
) -> Preprocessing:
    """What to do to pictures for this input: its own shape, then `described`, then the `query`.

    Args:
        spec: The model's input.
        described: What the model's source says, in the manifest's words; may be empty.
        query: What the user says: `mean=0.485,0.456,0.406&std=...&range=0,1&color=bgr`.
        source: For messages.

    Defaults: size and layout of the input, colour RGB, range 0 to 1 (0 to 255 for a uint8
    input), no mean or std, bilinear, shorter side scaled to cover the input, centre crop.

    Raises:
        UsageError: EB165, an option is unknown or its value makes no sense.
        ArtifactError: EB548, the input does not take pictures, or not of this size.
    """
    if len(spec.shape) != 4 or not {spec.shape[1], spec.shape[3]} & {1, 3}:
        raise ArtifactError(
            "EB548",
            f"{source}: the model's input {spec.name!r} is {list(spec.shape)}, no picture",
            hint="give arrays instead: --data npz:FILE",
        )
    first = spec.shape[1] in {1, 3}
    channels = spec.shape[1] if first else spec.shape[3]
    size = spec.shape[2:] if first else spec.shape[1:3]
    base = Preprocessing(
        size=(size[0], size[1]),
        layout="NCHW" if first else "NHWC",
        color="grey" if channels == 1 else "RGB",
        range=(0.0, 255.0) if spec.dtype == "uint8" else (0.0, 1.0),
    )
    made = replace(base, **_described(described, source))
    options = parse_qsl(query, keep_blank_values=True)
    made = replace(made, **{k: _option(k, v, source) for k, v in options})
    _check(made, channels, spec, source)
    return made


def _described(given: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The entries of a model's own description; other words than ours mean the defaults."""
    found: dict[str, Any] = {}
    for key in (f.name for f in fields(Preprocessing)):
        value = given.get(key)
        if isinstance(value, str) and key in _CHOICES:
            word = value.replace(":", " ").split()[0].lower() if value.strip() else ""
            if word in _CHOICES[key]:
                found[key] = _CHOICES[key][word]
        elif isinstance(value, (list, tuple)):
            found[key] = _option(key, ",".join(str(v) for v in value), source)
        elif isinstance(value, (int, float)):
            found[key] = _option(key, str(value), source)
    return found


def _option(key: str, text: str, source: str) -> Any:
    """The value of one option, typed as `Preprocessing` wants it."""
    names = [f.name for f in fields(Preprocessing)]
    if key not in names:
        close = difflib.get_close_matches(key, names, n=1)
        raise UsageError(
            "EB165",
            f"{source}: unknown picture option {key!r}",
            hint=f"did you mean {close[0]!r}?" if close else f"one of {', '.join(names)}",
        )
    if key in _CHOICES:
        if text.lower() not in _CHOICES[key]:
            known = ", ".join(_CHOICES[key])
            raise UsageError("EB165", f"{source}: {key}={text}", hint=f"one of {known}")
        return _CHOICES[key][text.lower()]
    try:
        numbers = tuple(float(v) for v in text.split(","))
    except ValueError:
        numbers = ()
    counts = {"size": (1, 2), "shorter_side": (1,), "range": (2,)}.get(key, (1, 3))
    whole = key in {"size", "shorter_side"}
    if (
        len(numbers) not in counts
        or not all(math.isfinite(v) for v in numbers)
        or (whole and any(v < 1 or v != int(v) for v in numbers))
    ):
        example = {"size": "224", "shorter_side": "256", "range": "0,1"}.get(key, "0.5,0.5,0.5")
        raise UsageError("EB165", f"{source}: {key}={text}", hint=f"write {key}={example}")
    if key == "size":
        return int(numbers[0]), int(numbers[-1])
    return int(numbers[0]) if whole else numbers


def _check(made: Preprocessing, channels: int, spec: TensorSpec, source: str) -> None:
    colors = 1 if made.color == "grey" else 3
    shape = (colors, *made.size) if made.layout == "NCHW" else (*made.size, colors)
    if shape != spec.shape[1:]:
        raise ArtifactError(
            "EB548",
            f"{source}: pictures would be {made.layout} {list(shape)}, input "
            f"{spec.name!r} wants {list(spec.shape[1:])}",
            hint="leave size, layout and color out: they follow the model",
        )
    for key, values in (("mean", made.mean), ("std", made.std)):
        if len(values) not in {1, channels} or (key == "std" and 0 in values):
            raise UsageError(
                "EB165",
                f"{source}: {key}={list(values)} for {channels} channels",
                hint=f"give 1 or {channels} numbers, and no std of 0",
            )
    if made.range[0] >= made.range[1]:
        raise UsageError("EB165", f"{source}: range={list(made.range)}", hint="write range=0,1")
    if made.shorter_side is not None and made.shorter_side < max(made.size):
        raise UsageError(
            "EB165",
            f"{source}: shorter_side={made.shorter_side} is less than size {list(made.size)}",
            hint="use at least the longer side of size",
        )
