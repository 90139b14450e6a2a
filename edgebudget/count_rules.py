"""What both counters share: einsum, and how many operations an elementary function is worth."""

from __future__ import annotations

import math
from collections.abc import Sequence

Shape = tuple[int, ...]

# Operations per output element of functions made of several elementary ones.
SOFTMAX = 5  # maximum, subtract, exp, sum, divide
NORMALIZE = 7  # mean (1), variance (2), subtract, scale by the deviation, weight, bias
BATCH_NORM = 2  # a fixed scale and shift
QUANTIZE = 3  # divide, round, clip
DEQUANTIZE = 2  # subtract, multiply
COMPOSITE = {
    "sigmoid": 3,
    "hard_sigmoid": 3,
    "hard_swish": 4,
    "silu": 4,
    "gelu": 5,
    "mish": 5,
    "softplus": 3,
    "elu": 3,
    "selu": 4,
    "celu": 4,
    "log_softmax": 6,
}  # every other element-wise function is one


def interpolation(mode: str, spatial: int) -> int:
    """Operations per output element of resampling over `spatial` dimensions."""
    return 2 * math.prod([{"nearest": 0, "linear": 2, "cubic": 4}[mode]] * spatial)


def recurrent(kind: str) -> int:
    """Element-wise operations per hidden element and time step of a recurrent cell."""
    return {"lstm": 24, "gru": 17}.get(kind, 3)


def einsum_macs(equation: str, shapes: Sequence[Shape]) -> int:
    """MACs of an einsum evaluated pair by pair, left to right; one operand multiplies nothing.

    Each pair costs the product of all index sizes in it; an index that neither the result nor a
    later operand needs is summed away.
    """
    left, _, result = equation.replace(" ", "").partition("->")
    terms = [_expand(t, len(s)) for t, s in zip(left.split(","), shapes, strict=True)]
    sizes: dict[str, int] = {}
    for term, shape in zip(terms, shapes, strict=True):
        for index, size in zip(term, shape, strict=True):
            sizes[index] = max(size, sizes.get(index, 1))
    if "->" in equation:
        widest = max((sum(i.startswith("...") for i in t) for t in terms), default=0)
        wanted = set(_expand(result, len(result.replace("...", "")) + widest))
    else:
        flat = [i for t in terms for i in t]
        wanted = {i for i in flat if flat.count(i) == 1 or i.startswith("...")}
    total, held = 0, set(terms[0])
    for step, term in enumerate(terms[1:], start=1):
        space = held | set(term)
        total += math.prod(sizes[i] for i in space)
        later = wanted.union(*terms[step + 1 :])
        held = {i for i in space if i in later}
    return total


def _expand(term: str, rank: int) -> list[str]:
    """One label per dimension; an ellipsis becomes labels numbered from the right."""
    before, dots, after = term.partition("...")
    hidden = rank - len(before) - len(after) if dots else 0
    return [*before, *(f"...{i}" for i in range(hidden, 0, -1)), *after]
