"""The GPU's engine kept open for many files, each run for a moment: what a calibration asks for.

Run as ``python -m edgebudget_targets._webgpu_observer``: answers requests on the standard streams
(see `_pipe`) until they are closed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from edgebudget.energy import metering
from edgebudget_runtime import codec
from edgebudget_runtime.cost import Figure
from edgebudget_targets._burst import burst
from edgebudget_targets._pipe import Message, serve
from edgebudget_targets._webgpu_worker import open_session

if TYPE_CHECKING:
    from edgebudget.workload import Array

_WARM_UP, _WARM_UP_S = 10, 0.1  # runs and seconds at least: shaders are compiled, the clock rises
_BURST_S, _LEAST, _MOST = 0.15, 20, 200  # of one burst of runs


def main() -> None:
    """Answer until the other side is gone."""
    serve(observed)


def observed(request: Message, arrays: Sequence[Array]) -> tuple[Message, list[Array]]:
    """Milliseconds [runs] of a file on these inputs; its energy, if `energy_s` is not 0."""
    session = open_session(request["file"], {})
    names = [i.name for i in session.get_inputs()]
    run = partial(session.run, None, dict(zip(names, arrays, strict=True)))
    began, warm = time.perf_counter(), 0
    while warm < _WARM_UP or time.perf_counter() - began < _WARM_UP_S:
        run()  # outputs are read back: all work on the GPU is done
        warm += 1
    found = burst(run, _BURST_S, _LEAST, _MOST)
    reply: Message = {}
    if request["energy_s"]:
        energy = metering.metered("gpu", partial(_once, run), request["energy_s"])
        reply["energy"] = codec.encode(Figure, energy)
    return reply, [found]


def _once(run: Callable[[], object]) -> int:
    run()
    return 1


if __name__ == "__main__":
    main()
