"""Running a segment over batches that its fixed shapes do not know."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from edgebudget.session import CpuSession
from edgebudget_runtime.errors import UsageError

if TYPE_CHECKING:
    from edgebudget.workload import Array

Shape = tuple[int | str | None, ...]


class CpuExecutor:
    """A segment in ONNX Runtime's CPU engine."""

    def __init__(self, session: CpuSession) -> None:
        self._session = session

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run N samples, as many at a time as the segment's own batch.

        Raises:
            UsageError: EB142 an input is missing or has the wrong shape, EB143 the engine
                refuses the values.
        """
        parts = []
        for chunk in chunks(inputs, self._session.shapes):
            try:
                parts.append(self._session.run(chunk))
            except Exception as e:  # the engine raises a dozen unrelated types here
                first = (str(e).strip().splitlines() or [type(e).__name__])[0]
                raise UsageError(
                    "EB143",
                    f"ONNX Runtime cannot run these inputs: {first}",
                    hint="give what the preprocessing of the model makes",
                ) from e
        return (
            {k: np.concatenate([p[k] for p in parts]) for k in parts[0]} if parts[1:] else parts[0]
        )


def chunks(inputs: Mapping[str, Array], shapes: Mapping[str, Shape]) -> Iterator[dict[str, Array]]:
    """Cut inputs along their first axis into pieces of the segment's own batch.

    Raises:
        UsageError: EB142, an input is missing or has the wrong shape.
    """
    count = _count(inputs, shapes)
    for i in range(count):
        yield {k: _piece(np.asarray(inputs[k]), shapes[k], i) for k in shapes}


def _count(inputs: Mapping[str, Array], shapes: Mapping[str, Shape]) -> int:
    counts = set()
    for name, shape in shapes.items():
        if name not in inputs:
            raise UsageError(
                "EB142",
                f"input {name!r} is missing",
                hint=f"the model takes {', '.join(shapes)}; given: {', '.join(inputs) or 'none'}",
            )
        got = np.shape(inputs[name])
        batch = shape[0] if shape else None
        fits = len(got) == len(shape) and all(
            not isinstance(want, int) or have == want
            for have, want in zip(got[1:], shape[1:], strict=False)
        )
        whole = not isinstance(batch, int) or (got[:1] > (0,) and got[0] % batch == 0)
        if not fits or not whole:
            raise UsageError(
                "EB142",
                f"input {name!r} has shape {_text(got)}, the model takes {_text(shape)}",
                hint="only the first dimension may be a multiple",
            )
        counts.add(got[0] // batch if isinstance(batch, int) else 1)
    if len(counts) > 1:
        raise UsageError(
            "EB142",
            "the inputs hold different numbers of samples",
            hint="give each input the same first dimension",
        )
    return counts.pop() if counts else 1


def _piece(value: Array, shape: Shape, index: int) -> Array:
    batch = shape[0] if shape else None
    return value[index * batch : (index + 1) * batch] if isinstance(batch, int) else value


def _text(shape: tuple[Any, ...]) -> str:
    return "x".join("?" if d is None else str(d) for d in shape) or "scalar"
