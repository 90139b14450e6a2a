"""What a runner tells of its answers: counters, and a trace to be replayed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from threading import Lock

from edgebudget_runtime.outcome import Outcome
from edgebudget_runtime.trace import Counters, Done, Request, Writer


class Telemetry:
    """Counts every answer, and writes it to `file` where one is given. For many threads.

    Raises:
        UsageError: EB183 the file cannot be made.
    """

    def __init__(self, file: Path | None, clock: Callable[[], float]) -> None:
        self.counters = Counters()
        self._writer = None if file is None else Writer(file)
        self._began = self._last = clock()
        self._lock = Lock()

    def answered(
        self,
        outcome: Outcome,
        arrived: float,
        latency_ms: float | None,
        energy_mj: float | None,
        slowdown: float,
    ) -> None:
        """One answer has been given to a request that came at `arrived`, on the same clock."""
        broke = tuple([v.limit.resource for v in outcome.broke])
        self.counters.add_done(outcome.ran, broke, degraded=outcome.degraded)
        if self._writer is None:
            return
        took = outcome.spent.latency_ms.value
        done = Done(
            ran=outcome.ran,
            latency_ms=0.0 if took is None else took,
            energy_mj=outcome.spent.energy_mj.value,
            broke=broke,
            why=outcome.why,
        )
        sure = {} if outcome.confidence is None else {outcome.exit: outcome.confidence}
        with self._lock:  # the times of a trace never fall, those of threads and clocks may
            self._last = max(self._last, arrived)
            self._writer.write(
                Request(
                    at_s=self._last - self._began,
                    latency_ms=latency_ms,
                    energy_mj=energy_mj,
                    slowdown=min(max(slowdown, 1e-3), 1e3),
                    confidence=sure,
                    done=done,
                )
            )

    def close(self) -> None:
        """End the trace."""
        if self._writer is not None:
            self._writer.close()
