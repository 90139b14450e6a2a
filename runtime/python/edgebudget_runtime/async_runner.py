"""Answers without blocking an event loop: threads that a runner owns."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import TypeVar

from edgebudget_runtime.errors import UsageError

T = TypeVar("T")


class Threads:
    """A few threads, started when first needed and ended with the runner."""

    def __init__(self, count: int | None = None) -> None:
        self._count = count or os.cpu_count() or 1
        self._pool: ThreadPoolExecutor | None = None
        self._closed = False
        self._lock = Lock()

    async def call(self, function: Callable[[], T]) -> T:
        """Call `function` on one of the threads; calls beyond their number wait their turn.

        Raises:
            UsageError: EB174 the runner is closed.
        """
        with self._lock:
            if self._closed:
                raise UsageError(
                    "EB174", "this runner is closed", hint="open the artifact again with Runner"
                )
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self._count, thread_name_prefix="edgebudget")
            future = self._pool.submit(function)
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Refuse new calls. Those that were taken end on their own."""
        with self._lock:
            self._closed = True
            if self._pool is not None:
                self._pool.shutdown(wait=False)
