"""Another machine, through the system's own OpenSSH client.

What ~/.ssh/config says of the host counts. Keys of hosts are never taken on trust here: an
unknown or changed one ends the attempt. Nothing stays on the machine.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import NoReturn

from edgebudget.devices.bootstrap import START
from edgebudget.devices.lines import Program
from edgebudget.devices.parcel import pack
from edgebudget_runtime.errors import TargetError
from edgebudget_runtime.measure.job import Job

_OWN = 255  # ssh's exit code for troubles of its own
_NO_PROGRAM = (126, 127)  # the shell's
_OPTIONS = {
    "BatchMode": "yes",  # no questions: of passwords, nor of keys
    "ConnectTimeout": "10",
    "ServerAliveInterval": "5",
    "ServerAliveCountMax": "3",
    "LogLevel": "ERROR",
}


class Ssh:
    """A machine with a POSIX shell, Python, numpy and onnxruntime."""

    def __init__(
        self,
        name: str,
        host: str,
        user: str | None,
        port: int | None,
        python: str,
        install: bool,
        silence_s: float,
    ) -> None:
        self.name = name
        self._host, self._user, self._port = host, user, port
        self._python, self._install, self._silence_s = python, install, silence_s
        self._heard = False

    def lines(self, job: Job, folder: Path) -> Iterator[str]:
        """What the probe tells on the machine.

        Raises:
            ArtifactError: EB500 to EB507 the folder is not a whole artifact.
            TargetError: EB640 the machine cannot be reached, EB641 it lacks something, EB642
                its host key is not known or has changed, EB643 it was lost, EB644 the probe
                crashed there.
        """
        self._heard = False
        with pack(job, folder) as parcel:
            program = Program(
                self._command(), given=parcel, silence_s=self._silence_s, where=self.name
            )
            for line in program.lines():
                self._check_lacking(line)
                self._heard = True
                yield line
        self._check(program)

    def _command(self) -> list[str]:
        client = shutil.which("ssh")
        if client is None:
            raise TargetError("EB640", "there is no ssh here", hint="install the OpenSSH client")
        text = files("edgebudget.devices").joinpath("bootstrap.py").read_text(encoding="utf-8")
        flag = "install" if self._install else "-"
        remote = shlex.join([self._python, "-c", START, text, flag])
        options = [x for k, v in _OPTIONS.items() for x in ("-o", f"{k}={v}")]
        options += [] if self._port is None else ["-p", str(self._port)]
        options += [] if self._user is None else ["-l", self._user]
        return [client, "-T", *options, "--", self._host, remote]

    def _check_lacking(self, line: str) -> None:
        if '"missing"' not in line:
            return
        try:
            said = json.loads(line)
        except ValueError:
            return
        if isinstance(said, dict) and said.get("kind") == "missing":
            what = ", ".join(str(x) for x in said.get("what", []))
            raise TargetError(
                "EB641",
                f"{self.name} lacks {what}",
                hint="install them there, name another interpreter with --python, or let "
                "--install do it",
            )

    def _check(self, program: Program) -> None:
        code = program.code or 0
        if code == _OWN or code < 0:
            self._lost(program)
        if code in _NO_PROGRAM and not self._heard:
            raise TargetError(
                "EB641",
                f"{self.name} has no {self._python}: {program.complaint}",
                hint="name the interpreter there with --python",
            )
        if code == 1 or code > 6:
            raise TargetError(
                "EB644",
                f"measuring on {self.name} ended with exit {code}: {program.complaint}",
                hint="a smaller artifact may fit in its memory; --no-layers does less",
            )

    def _lost(self, program: Program) -> NoReturn:
        said = program.complaints
        if "IDENTIFICATION HAS CHANGED" in said:
            raise TargetError(
                "EB642",
                f"{self.name} shows another host key than before: it may be another machine",
                hint=f"find out why; `ssh-keygen -R {self._host}` forgets the old key",
            )
        if "Host key verification failed" in said or "host key is known" in said:
            raise TargetError(
                "EB642",
                f"the host key of {self.name} is not known here",
                hint=f"connect once by hand, `ssh {self._host}`, and compare the key",
            )
        if self._heard:
            raise TargetError(
                "EB643", f"{self.name} was lost: {program.complaint}", hint="try again"
            )
        raise TargetError(
            "EB640",
            f"{self.name} cannot be reached: {program.complaint}",
            hint=f"`ssh {self._host}` must work without a password (keys, ssh-agent)",
        )
