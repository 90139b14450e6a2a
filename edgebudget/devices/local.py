"""This machine, in a process of its own: nothing that was loaded before is in its memory."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from edgebudget.devices.lines import Program
from edgebudget_runtime.errors import TargetError
from edgebudget_runtime.measure.job import Job

PROBE = "edgebudget_runtime.measure.probe"


class Local:
    """The machine that this runs on."""

    name = "local"

    def __init__(self, silence_s: float) -> None:
        self._silence_s = silence_s

    def lines(self, job: Job, folder: Path) -> Iterator[str]:
        """What the probe tells, in a process of its own.

        Raises:
            TargetError: EB643 it gave no sign of life, EB644 it crashed.
        """
        job = replace(job, folder=str(folder.resolve()))
        places = os.pathsep.join(p for p in sys.path if p)
        program = Program(
            [sys.executable, "-P", "-m", PROBE, job.encode()],  # not what lies in this folder
            environment={**os.environ, "PYTHONPATH": places},
            silence_s=self._silence_s,
            where="the measuring process",
        )
        yield from program.lines()
        check_code(program, "the measuring process")


def check_code(program: Program, where: str) -> None:
    """Complain about a program that ended by itself, but not well; errors it told are told.

    Raises:
        TargetError: EB644.
    """
    code = program.code or 0
    if 0 <= code <= 6 and code != 1:  # exit codes of errors, which came as lines
        return
    how = f"exit {code}" if code > 0 else f"signal {signal.Signals(-code).name}"
    said = f": {program.complaint}" if program.complaint else ""
    raise TargetError(
        "EB644",
        f"{where} ended with {how}{said}",
        hint="a smaller artifact may fit in the device's memory; --no-layers does less",
    )
