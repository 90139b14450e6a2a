"""Compiles that are interrupted, killed, starved or raced: what they leave, and how they resume."""

from __future__ import annotations

import hashlib
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

import edgebudget
from edgebudget import compiler, registry
from edgebudget.events import Advanced, Event, Said, Started, ignore
from edgebudget.program import Context, Pass, PassResult, Program
from edgebudget_runtime import Budget
from edgebudget_runtime.errors import ArtifactError, MissedError, UsageError
from edgebudget_runtime.manifest import Manifest

Build = Callable[..., Path]
PROOF = "evaluate the exported file"


@pytest.fixture
def build(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Build:
    """Compile the tiny model so that no timing decides anything, and give the artifact."""
    monkeypatch.setenv("EDGEBUDGET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(compiler, "undo_harm", lambda _s, _t, _start, built, _steps: (built, ()))

    def run(out: str = "out", on_event: Callable[[Event], None] = ignore, **limits: str) -> Path:
        budget = Budget.parse(**limits)  # type: ignore[arg-type]
        data = f"npz:{tiny / 'data.npz'}"
        edgebudget.compile(
            str(tiny / "model.onnx"), out=tmp_path / out, data=data, budget=budget,
            on_event=on_event,
        )  # fmt: skip
        return tmp_path / out

    return run


def tree(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def interrupted_at(work: str, heard: list[Event]) -> Callable[[Event], None]:
    def listen(event: Event) -> None:
        heard.append(event)
        if isinstance(event, Started) and event.work == work:
            raise KeyboardInterrupt

    return listen


def said(heard: list[Event]) -> str:
    return "\n".join(e.text for e in heard if isinstance(e, Said))


def left_behind(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()} - {"cache", "tmp"}


@contextmanager
def ends_early(name: str, how: str) -> Iterator[None]:
    """Make a pass stop as one does that heard Ctrl-C or saw the deadline."""
    genuine = registry.get

    def run(program: Program, config: object, ctx: Context) -> PassResult:
        return replace(genuine(name).run(program, config, ctx), ended_early=how)  # type: ignore[arg-type]

    def get(wanted: str) -> Pass:
        found = genuine(wanted)
        return replace(found, run=run) if wanted == name else found

    with pytest.MonkeyPatch.context() as m:
        m.setattr(registry, "get", get)
        yield


def test_ctrl_c_before_anything_is_deployable_leaves_nothing_and_resumes(
    build: Build, tmp_path: Path
) -> None:
    heard: list[Event] = []
    with pytest.raises(KeyboardInterrupt):
        build(on_event=interrupted_at("quantize_int8", heard))
    assert left_behind(tmp_path) == set()
    again: list[Event] = []
    first = build(on_event=again.append)
    assert "clean_graph: taken from the cache" in said(again)
    assert "quantize_int8: taken from the cache" not in said(again)
    assert tree(build("undisturbed")) == tree(first)


def test_ctrl_c_during_the_proof_saves_what_is_known(build: Build, tmp_path: Path) -> None:
    heard: list[Event] = []
    with pytest.raises(KeyboardInterrupt):
        build(on_event=interrupted_at(PROOF, heard), max_drop="60%")
    assert left_behind(tmp_path) == {"out.interrupted"}
    assert "out.interrupted" in said(heard)
    manifest = Manifest.load(tmp_path / "out.interrupted")
    (sub,) = manifest.subnetworks
    assert sub.quality is None
    assert sub.cost.latency_ms.evidence == "unknown"
    assert sub.cost.macs.evidence == "measured"
    assert not manifest.holds  # the drop is not proven
    assert any("interrupted" in n for n in manifest.notes)
    file = tmp_path / "out.interrupted" / manifest.segments[0].file
    assert tree(build(max_drop="60%"))["segments/main.onnx"] == tree(file.parent)["main.onnx"]


def test_a_pass_that_returns_its_best_at_ctrl_c_ends_the_compile(
    build: Build, tmp_path: Path
) -> None:
    heard: list[Event] = []
    with ends_early("quantize_int8", "interrupt"), pytest.raises(KeyboardInterrupt):
        build(on_event=heard.append)
    assert left_behind(tmp_path) == {"out.interrupted"}
    assert "Ctrl-C again" in said(heard)
    assert not any(isinstance(e, Started) and e.work == PROOF for e in heard)
    again: list[Event] = []
    build(on_event=again.append)
    assert "quantize_int8: taken from the cache" not in said(again)


def test_a_second_ctrl_c_stops_while_the_first_is_being_saved(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def again(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(compiler, "write_artifact", again)
    with pytest.raises(KeyboardInterrupt):
        build(on_event=interrupted_at(PROOF, []))
    assert left_behind(tmp_path) == set()


def test_what_a_deadline_cut_short_is_not_kept_for_others(build: Build) -> None:
    with ends_early("quantize_int8", "deadline"):
        build("cut")
    heard: list[Event] = []
    whole = build("whole", on_event=heard.append)
    assert "clean_graph: taken from the cache" in said(heard)
    assert "quantize_int8: taken from the cache" not in said(heard)
    assert Manifest.load(whole).holds


def test_after_the_time_limit_what_is_begun_is_finished_and_proven(build: Build) -> None:
    heard: list[Event] = []
    out = build(on_event=heard.append, time_limit="0.001s", memory="1GB")
    assert Manifest.load(out).holds
    assert "no draft is tried" in said(heard)
    assert any(isinstance(e, Started) and e.work == PROOF for e in heard)


def test_limits_missed_at_the_time_limit_are_said(build: Build, tmp_path: Path) -> None:
    with pytest.raises(MissedError) as e:
        build(time_limit="0.001s", memory="1KB")
    assert e.value.exit_code == 4
    assert left_behind(tmp_path) == {"out.missed"}
    assert not Manifest.load(tmp_path / "out.missed").holds


def test_two_compiles_into_one_folder(build: Build) -> None:
    inside, go_on = threading.Event(), threading.Event()

    def hold(event: Event) -> None:
        inside.set()
        go_on.wait(60)

    first = threading.Thread(target=build, kwargs={"on_event": hold})
    first.start()
    assert inside.wait(60)
    try:
        with pytest.raises(UsageError, match="EB120"):
            build()
    finally:
        go_on.set()
        first.join()
    assert Manifest.load(build("other")).holds


def test_a_full_disk(build: Build, tmp_path: Path) -> None:
    build("warm")  # so that only the artifact is left to write
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(ArtifactError, match="EB506") as e:
            build()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert e.value.exit_code == 5
    assert left_behind(tmp_path) == {"warm"}


@pytest.mark.parametrize("fault", ["file", "proc", "garbage"])
def test_a_cache_that_does_not_work_costs_a_warning(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    wanted = tree(build("plain"))
    if fault == "file":
        (tmp_path / "tmp").write_text("not a folder")
        monkeypatch.setenv("EDGEBUDGET_CACHE", str(tmp_path / "tmp"))
    elif fault == "proc":
        monkeypatch.setenv("EDGEBUDGET_CACHE", "/proc/edgebudget")
    else:
        for file in (tmp_path / "cache").rglob("*.onnx"):
            file.write_bytes(b"garbage")
        for file in (tmp_path / "cache").rglob("record.json"):
            file.write_bytes(b"{")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    heard: list[Event] = []
    assert tree(build(on_event=heard.append)) == wanted
    assert not list((tmp_path / "scratch").iterdir())
    assert [e for e in heard if isinstance(e, Said) and e.level == "warning"]


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    # Tests that run in the background may have Ctrl-C ignored, which children inherit.
    restore = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{restore}; import sys; from edgebudget.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "compile", *arguments]
    environment = {**os.environ, "EDGEBUDGET_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


def test_ctrl_c_from_a_terminal(tmp_path: Path) -> None:
    process = start(tmp_path, "digits", "--macs", "250K", "--out", "out")
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("prune candidates"):  # seconds of work, however busy the system is
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    assert "Traceback" not in err
    assert "interrupted; the same command goes on" in err.splitlines()[-1]
    assert "out" not in left_behind(tmp_path)


@pytest.mark.slow
def test_killed_at_random_moments_the_next_run_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    arguments = ["digits", "--macs", "226905", "--size", "40KB", "--max-drop", "3%", "--out", "out"]
    calm = tmp_path / "calm"
    calm.mkdir()
    began = time.monotonic()
    _, err = start(calm, *arguments).communicate(timeout=600)
    duration = time.monotonic() - began
    wanted = tree(calm / "out")
    assert wanted, err
    draw = random.Random(7)
    for kill in range(6):
        process = start(tmp_path, *arguments)
        time.sleep(draw.uniform(0.1, 1.0) * duration)
        process.kill()
        process.communicate()
        if (tmp_path / "out").exists():
            assert tree(tmp_path / "out") == wanted, f"a partial artifact after kill {kill}"
            break
    else:
        _, err = start(tmp_path, *arguments).communicate(timeout=600)
        assert "taken from the cache" in err
    assert tree(tmp_path / "out") == wanted
    assert {p.name for p in tmp_path.iterdir()} == {"calm", "cache", "out"}


@pytest.mark.slow
def test_ctrl_c_in_training_saves_the_best_so_far_and_resumes_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = tmp_path / "plan.toml"
    recover = "config = {steps = 60, checkpoint_every = 20}"
    plan.write_text(f'format = 1\n[[step]]\npass = "recover"\n{recover}\n')
    monkeypatch.setenv("EDGEBUDGET_CACHE", str(tmp_path / "cache"))
    done = 0

    def interrupt(event: Event) -> None:
        nonlocal done
        done += isinstance(event, Advanced) and event.work == "recover"
        if done == 45:
            done += 1
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        edgebudget.compile("digits", out=out, plan=plan, on_event=interrupt)
    assert left_behind(tmp_path) == {"plan.toml", "out.interrupted"}
    (sub,) = Manifest.load(tmp_path / "out.interrupted").subnetworks
    assert sub.quality is None
    heard: list[Event] = []
    edgebudget.compile("digits", out=out, plan=plan, on_event=heard.append)
    trained = [e.steps for e in heard if isinstance(e, Advanced) and e.work == "recover"]
    assert trained[0] == 40  # from the checkpoint, in one go
    assert sum(trained) == 60
    monkeypatch.setenv("EDGEBUDGET_CACHE", str(tmp_path / "tmp"))
    edgebudget.compile("digits", out=tmp_path / "calm", plan=plan)
    assert tree(out) == tree(tmp_path / "calm")
