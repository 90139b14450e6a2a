"""Variants that look at less: a smaller picture, or larger patches of it.

A smaller picture is shrunk inside the graph as `scale_resolution` does. A vision transformer that
takes pictures of one size only is given larger patches instead: fewer tokens, the same picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgebudget.export import capture
from edgebudget.program import Context, Note, Pass, PassResult, Program
from edgebudget.scaled_input import ScaledInput
from edgebudget_passes import scale_resolution
from edgebudget_passes._nested_edits import ResizePatches, Shrink
from edgebudget_passes._nested_variants import Level, base_of, check_shares, combined
from edgebudget_passes._patch_resize import PatchEmbedding, find_patches

if TYPE_CHECKING:
    from edgebudget.target import TargetSpec


@dataclass(frozen=True, slots=True)
class Config:
    """`scales` of the picture's sides, and `patches` (pixels); the next `larger_patches` sizes
    that divide the picture where none are named.

    `combine` False adds variants of the whole only, and none of the variants other passes made.
    """

    scales: tuple[float, ...] = (0.75, 0.5)
    patches: tuple[int, ...] = ()
    larger_patches: int = 2
    combine: bool = True
    samples: int = 256
    batch: int = 64


def run(program: Program, config: Config, ctx: Context) -> PassResult:
    """Add a variant for each size of the picture and of its patches that the network takes.

    Raises:
        UsageError: EB155, a scale is not between 0 and 1.
        PassError: EB360, a variant answers in another shape.
    """
    check_shares("nest_resolution", config.scales)
    base = base_of(program)
    did: list[Note] = []
    sizes, declined = _sizes(base, config.scales, ctx)
    patches, whole_patch, refused = _patches(base, config)
    declined += refused
    for dimension, whole, levels in (
        ("resolution", "1", sizes),
        ("patch", whole_patch, patches),
    ):
        if not levels:
            continue
        result = combined(
            program,
            ctx,
            dimension,
            whole,
            levels,
            combine=config.combine,
            refresh_samples=config.samples,
            batch=config.batch,
        )
        program = result.program
        did += result.did
        declined += result.declined
    return PassResult(program, tuple(did), tuple(declined))


def _sizes(base: Program, scales: Sequence[float], ctx: Context) -> tuple[list[Level], list[Note]]:
    """A level for each size of the picture that the network takes, largest first."""
    levels: list[Level] = []
    declined: list[Note] = []
    for scale in sorted(set(scales), reverse=True):
        tried = scale_resolution.run(base, scale_resolution.Config(scale=scale), ctx)
        body = tried.program.body
        if not tried.did or not isinstance(body, ScaledInput):
            why = tried.declined[0].why if tried.declined else ""
            declined.append(Note(f"resolution={scale:.3g}", "no variant", why))
            continue
        image = next(s for s in base.inputs if len(s.shape) == 4)
        names = tuple(s.name for s in base.inputs)
        edit = Shrink(names, image.name, body.outer, body.inner, body.multiple)
        if any(x.edit == edit for x in levels):
            declined.append(Note(f"resolution={scale:.3g}", "merged", "rounded to one size"))
            continue
        levels.append(Level(f"{body.inner[0] / body.outer[0]:.3g}", edit))
    return levels, declined


def _patches(base: Program, config: Config) -> tuple[list[Level], str, list[Note]]:
    """A level for each larger patch, and the whole's own size."""
    found = find_patch_embedding(base)
    if isinstance(found, str):
        return [], "", [Note("patches", "not resized", found)]
    own = str(found.patch[0])
    allowed = found.sizes()
    levels: list[Level] = []
    declined: list[Note] = []
    for size in sorted(set(config.patches)) or allowed[: config.larger_patches]:
        if size not in allowed:
            why = f"{found.picture[0]}x{found.picture[1]} pictures take {allowed} besides {own}"
            declined.append(Note(f"patch={size}", "no variant", why))
            continue
        grid = found.picture[0] // size, found.picture[1] // size
        edit = ResizePatches(
            found.conv,
            found.positions,
            (size, size),
            found.grid,
            grid,
            found.prefix,
            found.token_dim,
        )
        levels.append(Level(str(size), edit))
    if not levels and not declined:
        why = f"no larger patch than {own} divides the picture into two or more"
        declined.append(Note("patches", "not resized", why))
    return levels, own, declined


def find_patch_embedding(program: Program) -> PatchEmbedding | str:
    """Where a network cuts its picture into patches, or why it has no resizable patches.

    Raises:
        UnsupportedError: EB220, EB222, it cannot be exported.
    """
    pictures = [i for i, s in enumerate(program.inputs) if len(s.shape) == 4]
    if len(pictures) != 1:
        return "it has not exactly one picture [N, C, H, W] as input"
    if isinstance(program.body, ScaledInput):
        return "its picture is shrunk already"
    captured = capture(program)
    placeholder = captured.graph_signature.user_inputs[pictures[0]]
    return find_patches(captured, str(placeholder))


def reachable(program: Program, target: TargetSpec) -> tuple[float, ...]:
    """Input scales that the network takes."""
    return scale_resolution.feasible_scales(base_of(program), target)


PASS = Pass(
    name="nest_resolution",
    run=run,
    config=Config,
    stage="module",
    summary="add variants that see a smaller picture or larger patches",
    reach=reachable,
)
