"""Ends a run of the engine that would be late, where an answer is there already.

ONNX Runtime looks at a run's flag between two nodes, so that a run ends a node later at the most.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition, Thread

import onnxruntime as ort


class Watchdog:
    """One thread, started when first needed, for all calls of a runner."""

    def __init__(self) -> None:
        self._waits: list[tuple[float, int, ort.RunOptions]] = []  # a heap, by deadline
        self._changed = Condition()
        self._count = 0
        self._wakes_at = 0.0  # when the thread looks again; infinity while there is nothing
        self._thread: Thread | None = None
        self._closed = False

    @contextmanager
    def limit(self, seconds: float) -> Iterator[ort.RunOptions]:
        """Options for one run of the engine, which is told to end after `seconds`.

        What is yielded has `terminate` set if the time came.
        """
        options = ort.RunOptions()
        at = time.monotonic() + seconds
        with self._changed:
            self._count += 1
            heapq.heappush(self._waits, (at, self._count, options))
            if self._thread is None:
                self._thread = Thread(target=self._watch, name="edgebudget-watchdog", daemon=True)
                self._thread.start()
            elif (
                at < self._wakes_at
            ):  # else it wakes in time: waking it now would take from the run
                self._changed.notify()
        wait = (at, self._count, options)
        try:
            yield options
        finally:
            self._forget(wait)

    def close(self) -> None:
        """End the thread. Runs that are watched go on to their own end."""
        with self._changed:
            self._closed = True
            self._waits.clear()
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _forget(self, wait: tuple[float, int, ort.RunOptions]) -> None:
        with self._changed:
            if wait in self._waits:
                self._waits.remove(wait)
                heapq.heapify(self._waits)

    def _watch(self) -> None:
        with self._changed:
            while not self._closed:
                now = time.monotonic()
                while self._waits and self._waits[0][0] <= now:
                    heapq.heappop(self._waits)[2].terminate = True
                self._wakes_at = self._waits[0][0] if self._waits else float("inf")
                self._changed.wait(self._wakes_at - now if self._waits else None)
