"""The final name holds a whole artifact or none, whatever happens meanwhile."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from edgebudget.artifact import explained, writing
from edgebudget_runtime import Manifest, integrity
from edgebudget_runtime.errors import ArtifactError, UsageError

if TYPE_CHECKING:
    from tests.conftest import WriteArtifact

AS_ROOT = os.geteuid() == 0


def leftovers(out: Path) -> list[str]:
    return [p.name for p in out.parent.iterdir() if p.name.startswith(".")]


def test_becomes_the_artifact_and_leaves_nothing(
    tmp_path: Path, write_artifact: WriteArtifact
) -> None:
    out = tmp_path / "new" / "out"
    with writing(out) as folder:
        assert not out.exists()
        write_artifact(folder)
    integrity.verify(out, Manifest.load(out))
    assert leftovers(out) == []


def test_a_failure_changes_nothing(artifact: Path) -> None:
    before = (artifact / "manifest.json").read_bytes()

    def interrupted() -> None:
        with writing(artifact, force=True) as folder:
            (folder / "manifest.json").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (artifact / "manifest.json").read_bytes() == before
    assert leftovers(artifact) == []


def test_what_is_not_whole_is_not_published(tmp_path: Path, write_artifact: WriteArtifact) -> None:
    def incomplete() -> None:
        with writing(tmp_path / "out") as folder:
            write_artifact(folder)
            (folder / "segments/head.onnx").unlink()

    with pytest.raises(ArtifactError, match="EB504"):
        incomplete()
    assert not (tmp_path / "out").exists()


def test_an_artifact_is_replaced_only_with_force(
    artifact: Path, write_artifact: WriteArtifact
) -> None:
    with pytest.raises(UsageError, match="EB122"), writing(artifact):
        pass
    (artifact / "old.txt").touch()
    with writing(artifact, force=True) as folder:
        write_artifact(folder)
    assert not (artifact / "old.txt").exists()
    assert leftovers(artifact) == []


def test_an_empty_folder_is_taken(tmp_path: Path, write_artifact: WriteArtifact) -> None:
    (tmp_path / "out").mkdir()
    with writing(tmp_path / "out") as folder:
        write_artifact(folder)
    assert Manifest.load(tmp_path / "out").name == "toy"


@pytest.mark.parametrize("content", ["notes.txt", "manifest.json"])
def test_other_folders_are_never_touched(tmp_path: Path, content: str) -> None:
    (tmp_path / content).write_text('{"name": "a web page\'s own manifest"}')
    with pytest.raises(UsageError, match="EB121"), writing(tmp_path, force=True):
        pass
    with pytest.raises(UsageError, match="EB121"), writing(tmp_path / content, force=True):
        pass
    assert [p.name for p in tmp_path.iterdir()] == [content]


def test_a_second_compile_into_the_same_folder_is_refused(
    tmp_path: Path, write_artifact: WriteArtifact
) -> None:
    out = tmp_path / "out"
    with writing(out) as folder:
        with pytest.raises(UsageError, match="EB120"), writing(out):
            pass
        with pytest.raises(UsageError, match="EB120"), writing(tmp_path / "x" / ".." / "out"):
            pass
        with writing(tmp_path / "other") as other:
            write_artifact(other)
        write_artifact(folder)
    assert Manifest.load(out).name == "toy"


def test_only_one_of_many_writers_gets_in(tmp_path: Path, write_artifact: WriteArtifact) -> None:
    out, inside, most, lock = tmp_path / "out", 0, 0, threading.Lock()

    def compile_it() -> None:
        nonlocal inside, most
        for _ in range(20):
            try:
                with writing(out, force=True) as folder:
                    with lock:
                        inside += 1
                        most = max(most, inside)
                    write_artifact(folder)
                    with lock:
                        inside -= 1
            except UsageError as e:
                assert e.code == "EB120"  # noqa: PT017

    threads = [threading.Thread(target=compile_it) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert most == 1
    integrity.verify(out, Manifest.load(out))
    assert leftovers(out) == []


WRITER = """
import sys, time
from pathlib import Path
from edgebudget.artifact import writing
from shutil import copytree
source, out = map(Path, sys.argv[1:])
print("ready", flush=True)
while True:
    with writing(out, force=True) as folder:
        copytree(source, folder, dirs_exist_ok=True)
"""


def test_kill_at_random_moments(artifact: Path, tmp_path: Path) -> None:
    out, rng = tmp_path / "out", random.Random(0)
    seen = 0
    for _ in range(10):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(artifact), str(out)], stdout=subprocess.PIPE
        )
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(rng.uniform(0, 0.05))
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        if out.exists():
            seen += 1
            integrity.verify(out, Manifest.load(out))
    assert seen > 0
    with writing(out, force=True) as folder:  # the next run cleans up after all of them
        for file in sorted(artifact.rglob("*.*")):
            (folder / file.relative_to(artifact)).parent.mkdir(exist_ok=True)
            (folder / file.relative_to(artifact)).write_bytes(file.read_bytes())
    assert leftovers(out) == []


def test_killed_between_the_two_renames(artifact: Path) -> None:
    artifact.rename(artifact.parent / f".{artifact.name}.edgebudget-old")
    with pytest.raises(UsageError, match="EB122"), writing(artifact):
        pass
    integrity.verify(artifact, Manifest.load(artifact))


def test_a_full_disk(tmp_path: Path) -> None:
    old = resource.getrlimit(resource.RLIMIT_FSIZE)

    def too_much() -> None:
        with writing(tmp_path / "out") as folder:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, old[1]))
            (folder / "weights.bin").write_bytes(b"\0" * 4096)

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(ArtifactError, match="EB506") as caught:
            too_much()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    assert "MB are free" in caught.value.what
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(AS_ROOT, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(ArtifactError, match="EB505"), writing(tmp_path / "out"):
            pass
    finally:
        tmp_path.chmod(0o700)


def test_a_folder_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactError, match="EB505"), writing(tmp_path / "file" / "out"):
        pass


def test_a_place_that_takes_no_files() -> None:
    with pytest.raises(ArtifactError, match="EB505"), writing(Path("/proc/edgebudget/out")):
        pass


@pytest.mark.parametrize(
    ("number", "file", "code"),
    [
        (errno.ENOSPC, None, "EB506"),
        (errno.EDQUOT, "/elsewhere", "EB506"),
        (errno.EROFS, "out", "EB505"),
        (errno.EROFS, ".out.edgebudget-tmp-1/segments/a.onnx", "EB505"),
        (errno.EACCES, "data/a.jpg", None),
        (errno.EACCES, None, None),
        (errno.ENOENT, "out", None),
    ],
)
def test_only_failures_to_write_are_explained(
    tmp_path: Path, number: int, file: str | None, code: str | None
) -> None:
    error = OSError(number, "reason", None if file is None else str(tmp_path / file))
    found = explained(error, tmp_path / "out")
    assert (found.code if found else None) == code


def test_other_failures_pass_through(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), writing(tmp_path / "out"):
        (tmp_path / "no such data").read_bytes()
