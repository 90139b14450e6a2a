"""Run the network on a smaller picture; the input keeps its size and is shrunk inside the graph.

MACs of a convolutional network fall with the square of the scale. The picture is averaged over
whole blocks of pixels as long as at least one block of two fits, then resized bilinearly
(half-pixel centres, no antialiasing): both forms run as integers on the NPU and on the CPU and
agree to one step of the 8-bit output. Where the target has no bilinear form (its option `shrinks`
says "blocks"), only whole blocks are averaged, to sizes that may then be odder. Sizes are multiples
of a number of pixels and keep the aspect ratio to within that rounding.
Source: "Fixing the train-test resolution discrepancy", Touvron et al., 2019.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from edgebudget.program import Context, Note, Pass, PassResult, Program

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from edgebudget.program import TensorSpec
    from edgebudget.target import TargetSpec

_SMALL_SIDE = 128  # pixels; below it sizes are multiples of 8 instead of 32
_MOST_SCALES = 32
_SMALLEST_SCALE = 0.1


@dataclass(frozen=True, slots=True)
class Config:
    """`scale` of both sides, unless `height` and `width` are given (pixels)."""

    scale: float = 1.0
    height: int = 0
    width: int = 0
    multiple: int = 0  # sizes are multiples of this; 0: 32, or 8 for sides below 128 and for blocks


def run(program: Program, config: Config, ctx: Context) -> PassResult:
    """Shrink the picture inside the network, or decline when the network cannot take it."""
    from edgebudget.export import to_graph
    from edgebudget_runtime.errors import UnsupportedError

    image = _image(program)
    if image is None:
        return _declined(program, "it has not exactly one picture [N, C, H, W] as input")
    step = config.multiple or _step(image, ctx.target)
    size = _size(image, config, step)
    before = image.shape[2:]
    if size == before or math.prod(size) >= math.prod(before):
        why = f"{_by(size)} is not smaller than {_by(before)} (multiples of {step})"
        return _declined(program, why)
    if not _shrinks(before, size, ctx.target):
        why = f"{_by(before)} to {_by(size)} takes more than {ctx.target.device} can average"
        return _declined(program, why)
    try:
        shapes = _shapes(program, image)
    except Exception as e:  # user code
        return _declined(program, f"the network does not run on shapes alone: {e}")
    refused = _refuses(program, image, size, shapes)
    if refused is not None:
        return _declined(program, f"at {_by(size)}: {refused}")
    scaled = replace(program, body=_scaled(program, image, size, step))
    try:
        to_graph(scaled, check=False)
    except UnsupportedError as e:
        return _declined(program, f"at {_by(size)}: {e.what}")
    note = Note(image.name, f"{_by(before)} is shrunk to {_by(size)} inside the network")
    return PassResult(scaled, (note,))


def feasible_scales(program: Program, target: TargetSpec | None = None) -> tuple[float, ...]:
    """Input scales below 1 that the network takes, largest first.

    Every size is tried on shapes alone, without computing; `run` looks again, at the export too.
    The square of a scale is the share of the pixels that is left after rounding.
    """
    image = _image(program)
    if image is None:
        return ()
    step = _step(image, target)
    height, width = image.shape[2:]
    try:
        shapes = _shapes(program, image)
    except Exception:  # user code that does not run on shapes alone; `run` will say why
        return ()
    found: list[float] = []
    for wished in _wished(min(height, width), step, target):
        size = _size(image, Config(scale=wished), step)
        exact = math.sqrt(math.prod(size) / (height * width))
        scale = exact if _size(image, Config(scale=exact), step) == size else wished
        if scale >= 1.0 or scale in found or not _shrinks((height, width), size, target):
            continue
        if _refuses(program, image, size, shapes) is None:
            found.append(scale)
    return tuple(found)


def _wished(side: int, step: int, target: TargetSpec | None) -> list[float]:
    """Scales to look at, largest first."""
    count = side // step
    if _by_blocks(target):
        scales = [1 / n for n in range(2, count + 1)]
    else:
        stride = max(1, -(-count // _MOST_SCALES))
        scales = [blocks * step / side for blocks in range(count, 0, -stride)]
    return [s for s in scales if _SMALLEST_SCALE <= s < 1.0]


def _image(program: Program) -> TensorSpec | None:
    if program.stage != "module":
        return None
    pictures = [s for s in program.inputs if len(s.shape) == 4 and s.dtype.startswith("float")]
    return pictures[0] if len(pictures) == 1 else None


def _step(image: TensorSpec, target: TargetSpec | None) -> int:
    return 8 if min(image.shape[2:]) < _SMALL_SIDE or _by_blocks(target) else 32


def _size(image: TensorSpec, config: Config, step: int) -> tuple[int, int]:
    height, width = image.shape[2:]
    wished = (config.height or height * config.scale, config.width or width * config.scale)
    h, w = (max(step, int(v / step + 0.5) * step) for v in wished)
    return h, w


def _by_blocks(target: TargetSpec | None) -> bool:
    return target is not None and target.options.get("shrinks") == "blocks"


def _shrinks(before: Sequence[int], size: Sequence[int], target: TargetSpec | None) -> bool:
    """Whether the target can bring pictures to this size."""
    if target is None or not _by_blocks(target):
        return True
    largest = int(target.options.get("largest_block", max(before)))
    return all(
        have % want == 0 and have // want <= largest
        for have, want in zip(before, size, strict=True)
    )


def _by(size: Sequence[int]) -> str:
    return "x".join(map(str, size))


def _declined(program: Program, why: str) -> PassResult:
    return PassResult(program, declined=(Note("input", "not scaled", why),))


def _scaled(program: Program, image: TensorSpec, size: tuple[int, int], step: int) -> nn.Module:
    from edgebudget.scaled_input import ScaledInput

    body: Any = program.body
    if isinstance(body, ScaledInput):  # scale the network, not its scaled input again
        body = body.network
    names = [s.name for s in program.inputs]
    height, width = image.shape[2:]
    made: nn.Module = ScaledInput(body, names, image.name, (height, width), size, step).eval()
    return made


def _refuses(
    program: Program, image: TensorSpec, size: tuple[int, int], expected: list[tuple[int, ...]]
) -> str | None:
    """Why the network cannot take pictures of this size, found on shapes alone."""
    try:
        got = _shapes(program, replace(image, shape=(*image.shape[:2], *size)))
    except Exception as e:  # whatever user code raises when a shape does not fit
        lines = str(e).strip().splitlines()
        return (lines[0] if lines else type(e).__name__)[:200]
    for name, was, now in zip(program.outputs, expected, got, strict=True):
        if was != now:
            return f"output {name!r} would be {_by(now)} instead of {_by(was)}"
    return None


def _shapes(program: Program, image: TensorSpec) -> list[tuple[int, ...]]:
    from edgebudget.scaled_input import ScaledInput, output_shapes

    body = program.body.network if isinstance(program.body, ScaledInput) else program.body
    inputs = tuple(image if s.name == image.name else s for s in program.inputs)
    return output_shapes(replace(program, body=body, inputs=inputs))


PASS = Pass(
    "scale_resolution",
    run,
    Config,
    "module",
    "run the network on a smaller picture, shrunk inside the graph",
    reach=feasible_scales,
)
