"""ExecuTorch in a process of its own: its runtime may crash, and it talks to the terminal.

Run as ``python -m edgebudget_targets._executorch_worker``: answers requests on the standard
streams (see `_pipe`) until they are closed. What the engine says itself goes to standard error.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from edgebudget_runtime.executorch_program import Method, bindings
from edgebudget_targets._burst import burst
from edgebudget_targets._pipe import Message, serve

WARM_UP = 5  # runs before those that are timed
_BURST_S, _LEAST, _MOST = 0.015, 8, 60  # of one burst of runs


def main() -> None:
    """Answer until the other side is gone."""
    serve(_Engine().answer)


class _Engine:
    """The programs of one process."""

    def __init__(self) -> None:
        self._methods: list[Method] = []

    def answer(self, request: Message, arrays: Sequence[Any]) -> tuple[Message, list[Any]]:
        """Do one thing: "lower", "lower ethos-u", "lower vulkan", "tosa", "open", "run", "time" or
        "observe".

        "run" takes the loaded program at `index`; "observe" loads one for its time alone.
        """
        do = request["do"]
        if do == "lower":
            from edgebudget_targets._xnnpack_lower import lower

            graphs = {k: Path(v) for k, v in request["graphs"].items()}
            return {"left": lower(graphs, Path(request["out"]), request["max_batch"])}, []
        if do == "lower ethos-u":
            from edgebudget_targets import _ethos_lower

            return _ethos_lower.lower(Path(request["graph"]), Path(request["out"]), request), []
        if do == "lower vulkan":
            from edgebudget_targets import _vulkan_lower

            graph, out = Path(request["graph"]), Path(request["out"])
            return {"left": _vulkan_lower.lower(graph, out, half=request["half"])}, []
        if do == "tosa":
            from edgebudget_targets._tosa_model import run

            return {}, run(Path(request["file"]), arrays)
        if do == "open":
            return self._open(request["files"], request["methods"], request["threads"]), []
        if do == "run":
            return {}, self._run(self._methods[request["index"]], arrays, request["pieces"])
        if do == "observe":
            return {}, [_burst(Method(Path(request["file"]).read_bytes()), arrays)]
        if do == "time":
            return {}, [self._times(arrays, request["counts"], request["repeats"])]
        raise ValueError(f"unknown request {do!r}")

    def _open(self, files: Sequence[str], methods: Sequence[str], threads: int) -> Message:
        # Before any program is loaded: afterwards it aborts the process, or hangs.
        bindings()._unsafe_reset_threadpool(threads)
        each = zip(files, methods, strict=True)
        self._methods = [Method(Path(f).read_bytes(), m) for f, m in each]
        return {}

    def _run(self, method: Method, arrays: Sequence[Any], pieces: int) -> list[Any]:
        """Cut each array into pieces along its first axis, run them, and join the answers."""
        parts = []
        for i in range(pieces):
            parts.append(method.run([_piece(a, i, pieces) for a in arrays]))
        return [np.concatenate(p) if pieces > 1 else p[0] for p in zip(*parts, strict=True)]

    def _times(self, arrays: Sequence[Any], counts: Sequence[int], repeats: int) -> Any:
        """Milliseconds [files, repeats], the files taking turns; `counts` inputs are each one's."""
        rest = iter(arrays)
        runs = [
            m.prepared(list(islice(rest, n))) for m, n in zip(self._methods, counts, strict=True)
        ]
        seconds = np.empty((len(runs), repeats))
        for turn in range(-WARM_UP, repeats):
            for i, run in enumerate(runs):
                began = time.perf_counter()
                run()
                if turn >= 0:
                    seconds[i, turn] = time.perf_counter() - began
        return seconds * 1e3


def _burst(method: Method, arrays: Sequence[Any]) -> Any:
    """Milliseconds [runs] of one program, warm, in a fraction of a second."""
    run = method.prepared(arrays)
    for _ in range(WARM_UP):
        run()
    return burst(run, _BURST_S, _LEAST, _MOST)


def _piece(array: Any, index: int, pieces: int) -> Any:
    size = len(array) // pieces if pieces > 1 else 0
    return array[index * size : (index + 1) * size] if size else array


if __name__ == "__main__":
    main()
