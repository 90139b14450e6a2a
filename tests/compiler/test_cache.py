"""A cache that is whole, or a miss; and never a reason to fail."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from edgebudget import cache
from edgebudget.cache import Cache
from edgebudget.events import Event, Said
from edgebudget_runtime import profile
from edgebudget_runtime.errors import UsageError

KEY = cache.key({"pass": "prune", "seed": 1})


def put(kept: Cache, key: str = KEY, content: bytes = b"model") -> Path:
    def write(folder: Path) -> None:
        (folder / "model.onnx").write_bytes(content)
        (folder / "record.json").write_text("{}")

    folder = kept.put(key, write)
    assert folder is not None
    return folder


def test_keys_depend_on_content_and_not_on_order() -> None:
    assert cache.key({"seed": 1, "pass": "prune"}) == KEY
    assert cache.key({"seed": 2, "pass": "prune"}) != KEY
    with pytest.raises(ValueError, match="JSON compliant"):
        cache.key({"ratio": float("nan")})


def test_gives_back_what_was_put(tmp_path: Path) -> None:
    assert Cache(tmp_path).get(KEY) is None
    folder = put(Cache(tmp_path))
    assert Cache(tmp_path).get(KEY) == folder
    assert (folder / "model.onnx").read_bytes() == b"model"


@pytest.mark.parametrize("damage", ["change", "truncate", "remove", "index", "no index"])
def test_a_damaged_entry_is_said_and_missed(tmp_path: Path, damage: str) -> None:
    said: list[Event] = []
    kept = Cache(tmp_path, said.append)
    folder = put(kept)
    match damage:
        case "change":
            (folder / "model.onnx").write_bytes(b"moDel")
        case "truncate":
            (folder / "model.onnx").write_bytes(b"")
        case "remove":
            (folder / "model.onnx").unlink()
        case "index":
            (folder / "entry.json").write_text('{"files": 3}')
        case _:
            (folder / "entry.json").unlink()
    assert kept.get(KEY) is None
    assert [e.level for e in said if isinstance(e, Said)] == ["warning"]
    assert kept.get(KEY) is None
    assert len(said) == 1  # it is gone, and can be kept anew
    assert put(kept) == kept.get(KEY)


def test_a_failed_write_keeps_nothing(tmp_path: Path) -> None:
    def half(folder: Path) -> None:
        (folder / "model.onnx").write_bytes(b"half")
        raise RuntimeError("killed")

    kept = Cache(tmp_path)
    with pytest.raises(RuntimeError):
        kept.put(KEY, half)
    assert kept.get(KEY) is None
    assert list((kept.folder / "tmp").iterdir()) == []


def test_formats_that_run_code_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.pt"):
        Cache(tmp_path).put(KEY, lambda f: (f / "model.pt").touch())


def test_many_writers_of_one_key(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        folders = set(pool.map(lambda _: put(Cache(tmp_path)), range(32)))
    assert len(folders) == 1
    assert Cache(tmp_path).get(KEY) in folders


def test_lists_and_removes_the_least_recently_used_first(tmp_path: Path) -> None:
    kept = Cache(tmp_path)
    keys = [cache.key({"n": n}) for n in range(4)]
    for age, key in enumerate(reversed(keys)):
        entry = put(kept, key, b"x" * 1000) / "entry.json"
        os.utime(entry, (entry.stat().st_mtime - 100 * age,) * 2)
    assert [e.key for e in kept.ls()] == keys
    size = kept.ls()[0].bytes
    assert [e.key for e in kept.gc(older_than_s=250)] == keys[:1]
    assert [e.key for e in kept.gc(max_bytes=2 * size)] == keys[1:2]
    assert kept.gc(max_bytes=2 * size) == ()
    assert kept.get(keys[2]) is not None  # now the most recent
    assert [e.key for e in kept.gc(max_bytes=size)] == keys[3:]


def test_gc_waits_for_the_cache_to_be_free(tmp_path: Path) -> None:
    compiling, cleaning = Cache(tmp_path), Cache(tmp_path)
    put(compiling)
    with pytest.raises(UsageError, match="EB123"):
        cleaning.gc(max_bytes=0)
    assert compiling.get(KEY) is not None
    compiling.close()
    assert len(cleaning.gc(max_bytes=0)) == 1
    assert Cache(tmp_path / "none").gc(max_bytes=0) == ()


def test_checkpoints_are_found_again_and_never_shared(tmp_path: Path) -> None:
    killed = Cache(tmp_path)
    (killed.workdir(KEY) / "step.safetensors").touch()
    assert killed.workdir(KEY) == killed.workdir(KEY)
    other = Cache(tmp_path)
    assert other.workdir(KEY) != killed.workdir(KEY)
    killed.close()
    resumed = Cache(tmp_path)
    folder = resumed.workdir(KEY)
    assert (folder / "step.safetensors").exists()
    resumed.done(KEY)
    assert not folder.exists()


def test_a_place_that_cannot_be_written_costs_only_the_cache() -> None:
    said: list[Event] = []
    kept = Cache(Path("/proc/edgebudget"), said.append)
    assert kept.put(KEY, lambda f: None) is None
    assert kept.put(KEY, lambda f: None) is None
    assert kept.get(KEY) is None
    assert len(said) == 1
    kept.workdir(KEY).rmdir()


def test_the_place_comes_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("EDGEBUDGET_CACHE", raising=False)
    assert profile.cache_folder() == tmp_path / "xdg" / "edgebudget"
    monkeypatch.setenv("EDGEBUDGET_CACHE", str(tmp_path / "mine"))
    assert Cache().folder.parent == tmp_path / "mine"


def test_a_killed_writer_leaves_no_entry(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from edgebudget.cache import Cache\n"
        "def write(f):\n"
        "    (f / 'model.onnx').write_bytes(b'half'); os.kill(os.getpid(), signal.SIGKILL)\n"
        "Cache(Path(sys.argv[1])).put(sys.argv[2], write)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path), KEY], check=False)
    kept = Cache(tmp_path)
    assert kept.get(KEY) is None
    assert kept.ls() == []
    kept.gc()
    assert not (kept.folder / "tmp").exists()
