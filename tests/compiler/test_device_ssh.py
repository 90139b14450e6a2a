"""`ssh://` against a real sshd on this machine: keys of its own, a port of its own."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from edgebudget import devices
from edgebudget.cli import main
from edgebudget.profile_collect import collect
from edgebudget_runtime import engine
from edgebudget_runtime.errors import TargetError
from edgebudget_runtime.measure.job import Job
from tests.runtime import elastic_artifact as ea

SSHD = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin:/sbin")
JOB = Job(folder="", provider=engine.CPU, threads=1, seconds=0.2, runs=10, energy=False)

pytestmark = pytest.mark.skipif(
    SSHD is None or shutil.which("ssh") is None, reason="needs OpenSSH's sshd and ssh"
)


@dataclass
class Server:
    """An sshd, and the folder of its temporary files."""

    port: int
    process: subprocess.Popen[bytes]
    folder: Path

    @property
    def url(self) -> str:
        return f"ssh://127.0.0.1:{self.port}"

    def sessions(self) -> list[int]:
        """Processes that serve connections."""
        found = []
        for status in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = status.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == self.process.pid:
                found.append(int(status.parent.name))
        return found

    def left(self) -> list[Path]:
        """What measurements have left behind, after some time to tidy up."""
        for _ in range(100):
            found = list((self.folder / "tmp").glob("edgebudget-*"))
            if not found:
                break
            time.sleep(0.1)
        return found


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    for name in ("host", "other", "user"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(command, check=True)
    return folder


@pytest.fixture
def server(keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server whose key the client knows; the client is the real one with a config of its own."""
    assert SSHD is not None
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    (tmp_path / "tmp").mkdir()
    (tmp_path / "authorized").write_text((keys / "user.pub").read_text())
    (tmp_path / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {keys / 'host'}\n"
        f"AuthorizedKeysFile {tmp_path / 'authorized'}\nStrictModes no\nUsePAM no\n"
        f"PidFile none\nPasswordAuthentication no\nPermitRootLogin prohibit-password\n"
        f"SetEnv TMPDIR={tmp_path / 'tmp'}\n"
    )
    know(tmp_path, port, keys / "host.pub")
    (tmp_path / "ssh_config").write_text(
        f"UserKnownHostsFile {tmp_path / 'known'}\nGlobalKnownHostsFile /dev/null\n"
        f"IdentityFile {keys / 'user'}\nIdentitiesOnly yes\n"
        f"User {pwd.getpwuid(os.getuid()).pw_name}\n"
    )
    (tmp_path / "bin").mkdir()
    wrapper = tmp_path / "bin" / "ssh"  # ssh finds ~/.ssh by the user, not by HOME
    wrapper.write_text(
        f'#!/bin/sh\nexec {shutil.which("ssh")} -F "{tmp_path / "ssh_config"}" "$@"\n'
    )
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{wrapper.parent}:{os.environ['PATH']}")
    command = [SSHD, "-D", "-e", "-f", str(tmp_path / "sshd_config")]
    process = subprocess.Popen(command, stderr=(tmp_path / "log").open("wb"))
    for _ in range(100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        if process.poll() is not None:
            pytest.skip(f"sshd does not start here: {(tmp_path / 'log').read_text()[:200]}")
        time.sleep(0.05)
    yield Server(port, process, tmp_path)
    process.terminate()
    process.wait()


def know(folder: Path, port: int, key: Path) -> None:
    kind, blob = key.read_text().split()[:2]
    (folder / "known").write_text(f"[127.0.0.1]:{port} {kind} {blob}\n")


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    ea.write(tmp_path / "toy")
    return tmp_path / "toy"


def test_a_profile_comes_back_and_nothing_stays(server: Server, artifact: Path) -> None:
    link = devices.link(server.url, python=sys.executable, silence_s=60)
    found = collect(link.lines(JOB, artifact))
    assert found.error is None
    made = found.profile("ab" * 32, link.name, "cpu", ())
    assert made.samples_ms.keys() == ea.MACS.keys()
    assert made.device.engine_version == engine.VERSION
    assert found.kernels.keys() == ea.MACS.keys()
    assert server.left() == []


def test_the_command_brings_a_profile_for_frontier(
    server: Server, artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = server.folder / "far.json"
    command = ["profile", str(artifact), "--device", server.url, "--python", sys.executable]
    assert main([*command, "--seconds", "0.2", "--no-energy", "--out", str(out)]) == 0
    assert server.url in capsys.readouterr().out
    assert main(["frontier", str(artifact), "--profile", str(out)]) == 0
    assert server.url in capsys.readouterr().out


def test_a_machine_lost_half_way_leaves_what_came(server: Server, artifact: Path) -> None:
    link = devices.link(server.url, python=sys.executable, silence_s=60)
    long = Job(folder="", provider=engine.CPU, threads=1, seconds=600.0, runs=10**9)

    def cut() -> Iterator[str]:
        for line in link.lines(long, artifact):
            yield line
            if '"times"' in line:
                for pid in server.sessions():
                    os.kill(pid, signal.SIGKILL)

    found = collect(cut())
    assert found.error is not None
    assert found.error.code == "EB643"
    made = found.profile("ab" * 32, link.name, "cpu", ())
    assert made.samples_ms.keys() == ea.MACS.keys()
    assert made.detail is not None
    assert "partial" in made.detail.notes[-1]
    assert server.left() == []


def failure(server: Server, artifact: Path, **settings: str) -> TargetError:
    link = devices.link(server.url, silence_s=60, **settings)  # type: ignore[arg-type]
    with pytest.raises(TargetError) as caught:
        list(link.lines(JOB, artifact))
    return caught.value


def test_an_unknown_host_key_is_refused(server: Server, artifact: Path) -> None:
    (server.folder / "known").write_text("")
    error = failure(server, artifact, python=sys.executable)
    assert error.code == "EB642"
    assert "not known" in error.what
    assert (server.folder / "known").read_text() == ""


def test_a_changed_host_key_is_refused(server: Server, artifact: Path, keys: Path) -> None:
    know(server.folder, server.port, keys / "other.pub")
    error = failure(server, artifact, python=sys.executable)
    assert error.code == "EB642"
    assert "another host key" in error.what


def test_what_the_machine_lacks_is_named(server: Server, artifact: Path) -> None:
    bare = server.folder / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    error = failure(server, artifact, python=str(bare / "bin" / "python"))
    assert error.code == "EB641"
    assert "numpy>=1.26, onnxruntime>=1.24" in error.what
    (site,) = bare.glob("lib/python*/site-packages")
    (site / "numpy.py").write_text("__version__ = '1.21.5'")
    (site / "onnxruntime.py").write_text("__version__ = '1.31.1'")
    error = failure(server, artifact, python=str(bare / "bin" / "python"))
    assert error.what.endswith("lacks numpy>=1.26")
    error = failure(server, artifact, python="/no/such/python3")
    assert error.code == "EB641"
    assert "/no/such/python3" in error.what
    assert server.left() == []


def test_a_key_that_is_not_let_in_is_said(server: Server, artifact: Path) -> None:
    (server.folder / "authorized").write_text("")
    error = failure(server, artifact, python=sys.executable)
    assert error.code == "EB640"
    assert "Permission denied" in error.what


def test_a_machine_that_does_not_listen_is_unreachable(server: Server, artifact: Path) -> None:
    server.process.terminate()
    server.process.wait()
    error = failure(server, artifact, python=sys.executable)
    assert error.code == "EB640"
    assert "refused" in error.what.lower()
