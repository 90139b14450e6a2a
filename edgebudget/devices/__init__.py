"""Devices that an artifact can be measured on: this one, another over ssh, a phone over adb.

A device runs `edgebudget_runtime.measure.probe` (or, on a phone, the engine's own tool) and
hands back its lines as they come.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from edgebudget_runtime.errors import UsageError
from edgebudget_runtime.measure.job import Job

SILENCE_S = 300.0  # without a line from the device it counts as lost

_SSH = re.compile(r"ssh://(?:([\w.-]+)@)?([\w.-]+|\[[0-9A-Fa-f:.]+\])(?::(\d{1,5}))?/?")
_ADB = re.compile(r"adb:([\w.:-]+)")


class DeviceLink(Protocol):
    """A device as far as measuring goes."""

    name: str  # as the user wrote it

    def lines(self, job: Job, folder: Path) -> Iterator[str]:
        """What the probe tells about the artifact in `folder`, line by line.

        `job.folder` is set to where the artifact lies on the device.

        Raises:
            TargetError: EB640 to EB644 the device cannot be reached, lacks something, is not
                known to be the one it says, was lost, or failed; lines that came are valid.
        """
        ...


def link(
    text: str,
    *,
    python: str | None = None,
    install: bool = False,
    runner: Path | None = None,
    silence_s: float = SILENCE_S,
) -> DeviceLink:
    """The device that `local`, `ssh://[USER@]HOST[:PORT]` or `adb:SERIAL` names.

    Args:
        text: The device.
        python: The interpreter to use there, for ssh.
        install: Whether missing packages may be installed there, for ssh.
        runner: An `onnxruntime_perf_test` for the phone, for adb.
        silence_s: Seconds without a sign of life after which the device is lost.

    Raises:
        UsageError: EB147 it names none.
    """
    if text == "local":
        from edgebudget.devices.local import Local

        return Local(silence_s)
    if (m := _SSH.fullmatch(text)) and not m[2].startswith("-"):
        from edgebudget.devices.ssh import Ssh

        port = None if m[3] is None else int(m[3])
        host = m[2].strip("[]")
        return Ssh(text, host, m[1], port, python or "python3", install, silence_s)
    if m := _ADB.fullmatch(text):
        from edgebudget.devices.adb import Adb

        return Adb(m[1], runner, silence_s)
    raise UsageError(
        "EB147",
        f"there is no device {text!r}",
        hint="local, ssh://[USER@]HOST[:PORT] or adb:SERIAL (`adb devices` lists them)",
    )
