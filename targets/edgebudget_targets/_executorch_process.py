"""Talking to an engine's process, mostly ExecuTorch's, and surviving whatever happens to it."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from edgebudget_runtime import errors
from edgebudget_runtime.errors import EdgeBudgetError, TargetError
from edgebudget_targets._pipe import receive, send

if TYPE_CHECKING:
    from edgebudget.workload import Array

COMMAND: tuple[str, ...] = (sys.executable, "-P", "-m", "edgebudget_targets._executorch_worker")
_LAST_LINES = 2000  # bytes of the log that are looked through for a reason


class EngineRefused(Exception):
    """The engine raised something of its own; the text is what it said."""


class Worker:
    """One process of an engine; it ends with this object.

    A request may take `limit_s` seconds.
    """

    def __init__(
        self, limit_s: float, command: Sequence[str] = (), engine: str = "ExecuTorch"
    ) -> None:
        self._limit, self._engine = limit_s, engine
        self._log: IO[bytes] = tempfile.TemporaryFile()
        # The worker must find this package however this process did.
        paths = os.pathsep.join(p for p in sys.path if p)
        self._process = subprocess.Popen(
            command or COMMAND,
            env={**os.environ, "PYTHONPATH": paths},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,
        )
        self._end = weakref.finalize(self, _kill, self._process, self._log)

    @property
    def alive(self) -> bool:
        """Whether the process still answers."""
        return self._process.poll() is None

    def close(self) -> None:
        """End the process."""
        self._end()

    def ask(self, message: dict[str, Any], arrays: Sequence[Array] = ()) -> tuple[Any, list[Array]]:
        """Send a request and wait for its answer.

        Raises:
            EngineRefused: the engine raised an error of its own.
            TargetError: EB610 the process crashed, EB611 it took too long.
            EdgeBudgetError: what the request itself raises.
        """
        source, sink = self._process.stdout, self._process.stdin
        assert source is not None
        assert sink is not None
        try:
            send(sink, message, arrays)
            self._wait(source)
            reply, results = receive(source)
        except (EOFError, BrokenPipeError):
            self._process.wait()
            raise TargetError(
                "EB610",
                f"{self._engine} crashed ({_death(self._process.returncode)}){self._said()}",
                hint="`edgebudget doctor` shows the versions for a report",
            ) from None
        except BaseException:  # Ctrl-C too: half an answer makes the next one unreadable
            self.close()
            raise
        if reply.pop("ok"):
            return reply, results
        if reply["kind"]:
            kind: type[EdgeBudgetError] = getattr(errors, reply["kind"])
            raise kind(reply["code"], reply["what"], hint=reply["hint"])
        raise EngineRefused(" ".join(reply["what"].split()))

    def _wait(self, source: IO[bytes]) -> None:
        """Until the answer begins to come."""
        deadline = time.monotonic() + self._limit
        while not select.select([source], [], [], max(0.0, deadline - time.monotonic()))[0]:
            if time.monotonic() >= deadline:
                raise TargetError(
                    "EB611",
                    f"{self._engine} gave no answer within {self._limit:.0f} s",
                    hint="free the machine of other work, or compile a smaller model",
                )

    def _said(self) -> str:
        self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, self._log.tell() - _LAST_LINES))
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return f" after saying {lines[-1].strip()!r}" if lines else ""


def opened(
    files: Sequence[Path], threads: int, limit_s: float, methods: Sequence[str] = ()
) -> Worker:
    """A process that has loaded these files, and of each this method.

    Raises:
        ArtifactError: EB510, a file is missing, damaged, or makes the engine crash.
        TargetError: EB611, it takes too long.
    """
    worker = Worker(limit_s)
    names = ", ".join(f.name for f in files)
    try:
        paths = [str(f.resolve()) for f in files]
        wanted = [*methods] or ["forward"] * len(files)
        worker.ask({"do": "open", "files": paths, "methods": wanted, "threads": threads})
    except (EngineRefused, TargetError) as e:
        worker.close()
        if isinstance(e, TargetError) and e.code != "EB610":
            raise
        why = e.what if isinstance(e, TargetError) else str(e)
        raise errors.ArtifactError(
            "EB510",
            f"ExecuTorch cannot load {names}: {why}",
            hint="it is damaged, or made by another version: compile the model again",
        ) from e
    return worker


def _kill(process: subprocess.Popen[bytes], log: IO[bytes]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout, log):
        if stream is not None:
            try:
                stream.close()
            except BrokenPipeError:
                continue


def _death(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"exit status {status}"
