"""What the outputs of a model with early exits are called.

For the model's output `scores` the exits are `scores.exit1`, `scores.exit2`, ... in depth order;
the full model's own answer, `scores`, comes last.
"""

from __future__ import annotations

from collections.abc import Sequence


def exit_name(output: str, number: int) -> str:
    """The name of early exit `number` (from 1) of `output`."""
    return f"{output}.exit{number}"


def exit_outputs(outputs: Sequence[str]) -> tuple[str, ...]:
    """The early exits of a program's last output in depth order, then that output itself."""
    final = outputs[-1]
    numbers = range(1, len(outputs))
    return (*(n for k in numbers if (n := exit_name(final, k)) in outputs), final)
