"""Lines of a program as they come, with an end to patience."""

from __future__ import annotations

import shutil
import subprocess
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from queue import Empty, Queue
from threading import Thread
from typing import BinaryIO

from edgebudget_runtime.errors import TargetError

_LONGEST = 64_000_000  # characters of one line
_KEPT = 40  # last lines of stderr
_PATIENCE_S = 10.0  # for a program that was told to end


class Program:
    """A running program. After `lines` has ended: `code`, and `complaint`, its last words.

    It is handed all of `given` on stdin, which stays open until the end: its end tells a program
    far away that nobody listens any more.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        given: BinaryIO | None = None,
        environment: Mapping[str, str] | None = None,
        silence_s: float,
        where: str,
    ) -> None:
        self._silence_s, self._where = silence_s, where
        self._stderr: deque[str] = deque(maxlen=_KEPT)
        self._queue: Queue[str | None] = Queue(maxsize=1000)
        self.code: int | None = None
        self._process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=None if environment is None else dict(environment),
        )
        works = ((self._write, (given,)), (self._read, ()), (self._listen, ()))
        self._threads = [Thread(target=work, args=args, daemon=True) for work, args in works]
        for thread in self._threads:
            thread.start()

    def lines(self) -> Iterator[str]:
        """Each line of stdout.

        Raises:
            TargetError: EB643 nothing came for too long; the program is ended.
        """
        try:
            while True:
                try:
                    line = self._queue.get(timeout=self._silence_s)
                except Empty:
                    raise TargetError(
                        "EB643",
                        f"{self._where} gave no sign of life for {self._silence_s:g} s",
                        hint="look at the device; a slower one may need a longer --silence",
                    ) from None
                if line is None:
                    break
                yield line
            self.code = self._process.wait(self._silence_s)
            self._threads[2].join(_PATIENCE_S)
        finally:
            self._end()

    @property
    def complaint(self) -> str:
        """The last line of stderr that says something."""
        return next((x for x in reversed(self._stderr) if x.strip()), "").strip()

    @property
    def complaints(self) -> str:
        """The last lines of stderr."""
        return "\n".join(self._stderr)

    def _end(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(_PATIENCE_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self.code = self._process.returncode
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe is not None:
                with suppress(OSError, ValueError):
                    pipe.close()

    def _write(self, given: BinaryIO | None) -> None:
        assert self._process.stdin is not None
        with suppress(OSError, ValueError):  # it ended before it read all: its code says why
            if given is None:
                self._process.stdin.close()
            else:
                shutil.copyfileobj(given, self._process.stdin, 1 << 20)
                self._process.stdin.flush()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with suppress(OSError, ValueError):
            while line := self._process.stdout.readline(_LONGEST):
                self._queue.put(line.decode("utf-8", "replace"))
        self._queue.put(None)

    def _listen(self) -> None:
        assert self._process.stderr is not None
        with suppress(OSError, ValueError):
            while line := self._process.stderr.readline(65_536):
                self._stderr.append(line.decode("utf-8", "replace").rstrip())
