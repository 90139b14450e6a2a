"""`profile`: what comes back from a device, whole, in part or damaged, and the command."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from edgebudget import devices
from edgebudget.cli import main
from edgebudget.devices.lines import Program
from edgebudget.devices.local import Local
from edgebudget.profile_collect import collect
from edgebudget.profile_layers import layer_times
from edgebudget.profile_notes import notes
from edgebudget_runtime import engine, profile
from edgebudget_runtime.cost import Figure
from edgebudget_runtime.device_id import here
from edgebudget_runtime.errors import EdgeBudgetError, TargetError, UsageError
from edgebudget_runtime.measure.job import Job
from edgebudget_runtime.measure.layers import Kernel
from edgebudget_runtime.profile import Profile
from edgebudget_runtime.profile_detail import Detail, PathTimes
from edgebudget_runtime.runner import Runner
from tests.runtime import elastic_artifact as ea

DEVICE = {"kind": "device", "device": dataclasses.asdict(here("e", "1", 1))}
TIMES = {"kind": "times", "paths": {"main": [2.0, 1.0, 3.0]}, "segments": {"s": [1.0, 2.0]}}
END = {"kind": "end"}


def lines(*told: object) -> list[str]:
    return ["welcome to this machine\n", *(json.dumps(t) + "\n" for t in told), "{\n"]


def test_lines_become_a_profile() -> None:
    found = collect(lines(DEVICE, TIMES, TIMES, END))
    assert found.error is None
    made = found.profile("ab" * 32, "local", "cpu", ())
    assert made.samples_ms == {"s": (1.0, 2.0, 1.0, 2.0)}
    assert made.detail is not None
    assert (made.detail.paths["main"].p50_ms, made.detail.paths["main"].runs) == (2.0, 6)
    assert made.energy == {}
    assert Profile.decode(made.encode()) == made


def test_a_device_lost_half_way_leaves_what_came_and_says_so() -> None:
    def lost() -> Iterator[str]:
        yield from lines(DEVICE, TIMES)
        raise TargetError("EB643", "ssh://phone was lost", hint="")

    for told in (lost(), lines(DEVICE, TIMES)):
        found = collect(told)
        assert found.error is not None
        assert found.error.code == "EB643"
        made = found.profile("ab" * 32, "ssh://phone", "cpu", ())
        assert made.detail is not None
        assert "partial" in made.detail.notes[-1]


def test_a_device_that_told_no_time_gives_no_profile() -> None:
    error = {"kind": "error", "code": "EB509", "what": "cannot load", "hint": "h"}
    with pytest.raises(EdgeBudgetError, match=r"EB509.*cannot load") as caught:
        collect(lines(DEVICE, error)).profile("ab" * 32, "x", "cpu", ())
    assert caught.value.exit_code == 5
    with pytest.raises(TargetError, match="EB643"):
        collect([]).profile("ab" * 32, "x", "cpu", ())


def test_what_makes_times_doubtful_is_said() -> None:
    def figures(**values: float) -> dict[str, Figure]:
        return {k: Figure(value=v, evidence="measured") for k, v in values.items()}

    calm = figures(throttle_events_before=3, throttle_events_after=3, load_before=1.9)
    steady = {"main": [1.0, 1.1] * 20, "short": [1.0, 9.0]}
    assert list(notes(steady, calm, 2)) == []
    assert list(notes(steady, {"load_before": Figure(value=None, evidence="unknown")}, 2)) == []
    hot = figures(throttle_events_before=3, throttle_events_after=8, load_before=4.5)
    throttled, busy, slower = notes({"main": [1.0] * 20 + [1.5] * 20}, hot, 2)
    assert "throttled 5 times" in throttled
    assert "load 4.5 on 2 cores" in busy
    assert "main became 50% slower" in slower


@pytest.mark.parametrize(
    "bad",
    [
        {"kind": "device"},
        {"kind": "device", "device": {"cpu": 1}},
        {"kind": "times", "paths": 5, "segments": {}},
        {"kind": "times", "paths": {"a": ["x"]}, "segments": {}},
        {"kind": "memory", "figure": {"value": 1}},
        {"kind": "energy"},
    ],
)
def test_unreadable_words_are_an_error_and_not_a_figure(bad: dict[str, Any]) -> None:
    found = collect(lines(DEVICE, TIMES, bad, END))
    assert found.error is not None
    assert found.error.code == "EB644"


def test_nodes_are_named_as_in_the_file(tmp_path: Path) -> None:
    def info(name: str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 8, 4, 4])

    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="first/Conv"),
        helper.make_node("Clip", ["c"], ["hardtanh"], name="first/Clip"),
        helper.make_node("Relu", ["hardtanh"], ["y"], name="last_nchwc"),
    ]
    model = helper.make_model(helper.make_graph(nodes, "g", [info("x")], [info("y")]))
    onnx.save_model(model, str(tmp_path / "m.onnx"))
    kernels = [
        Kernel("hardtanh_nchwc", "Conv", "CPU", 0.6),  # fused: named after the last tensor
        Kernel("first/Conv_token_12", "QLinearConv", "CPU", 0.1),
        Kernel("first/Clip", "Clip", "CPU", 0.1),
        Kernel("last_nchwc", "Relu", "CPU", 0.1),  # ends like a suffix, and is none
        Kernel("ReorderOutput", "ReorderOutput", "CPU", 0.1),
    ]
    found = layer_times({"s": tmp_path / "m.onnx"}, {"s": kernels})
    assert [(x.name, x.added) for x in found] == [
        ("first/Conv", False),
        ("first/Conv", False),
        ("first/Clip", False),
        ("last_nchwc", False),
        ("ReorderOutput", True),
    ]
    assert sum(x.share for x in found) == pytest.approx(1.0)
    unreadable = layer_times({"s": tmp_path / "none"}, {"s": kernels})
    assert [x.name for x in unreadable] == [k.name for k in kernels]
    assert not any(x.added for x in unreadable)


@pytest.mark.parametrize(
    "text", ["", "phone", "ssh://", "ssh://-oProxyCommand=x", "adb:", "ssh://a b"]
)
def test_a_device_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="EB147"):
        devices.link(text)


def test_a_program_without_a_sign_of_life_is_ended() -> None:
    code = "import time; print('one', flush=True); time.sleep(60)"
    program = Program([sys.executable, "-c", code], silence_s=0.3, where="it")
    told = program.lines()
    assert next(told) == "one\n"
    with pytest.raises(TargetError, match=r"EB643.*no sign of life"):
        next(told)
    assert program.code is not None


@pytest.fixture
def artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGEBUDGET_CACHE", str(tmp_path / "cache"))
    ea.write(tmp_path / "toy")
    return tmp_path / "toy"


def test_a_runner_starts_from_what_profile_wrote(
    artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["profile", str(artifact), "--seconds", "0.2", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["paths"].keys() == ea.PATHS.keys()
    assert {x["segment"] for x in said["layers"]} == ea.MACS.keys()
    with Runner(artifact) as runner:
        assert runner.profile_note == ""
        assert runner.run({"x": ea.sure()}, latency_ms=1000.0).subnetwork == "full"
    device = here(engine.CPU, engine.VERSION, engine.default_threads())
    file = profile.default_file(profile.digest(artifact), device)
    kept, why = profile.load(file, profile.digest(artifact), device, list(ea.MACS))
    assert kept is not None, why
    assert kept.detail is not None  # closing the runner has not lost it
    assert main(["frontier", str(artifact)]) == 0
    assert "--measure" not in capsys.readouterr().out


def test_a_profile_of_another_engine_version_is_left_aside(artifact: Path) -> None:
    assert main(["profile", str(artifact), "--seconds", "0.1", "--no-layers"]) == 0
    device = here(engine.CPU, engine.VERSION, engine.default_threads())
    file = profile.default_file(profile.digest(artifact), device)
    other = json.loads(file.read_text())
    other["device"]["engine_version"] = "0.1"
    file.write_text(json.dumps(other))
    with Runner(artifact) as runner:
        assert "engine_version '0.1', here" in runner.profile_note


def test_frontier_shows_what_a_profile_of_another_device_knows(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    energy = {"exit1": Figure(value=4.5, evidence="measured", how="a counter")}
    detail = Detail(
        where="ssh://board",
        target="cpu",
        runs_before=5,
        paths={"exit1": PathTimes.of([7.0] * 99 + [9.0] * 2)},
    )
    board = Profile(
        artifact=profile.digest(artifact),
        device=dataclasses.replace(here("e", "1", 1), cpu="board"),
        samples_ms={"s0": (7.5,)},
        energy=energy,
        detail=detail,
    )
    file = tmp_path / "board.json"
    profile.save(board, file)
    assert main(["frontier", str(artifact), "--profile", str(file), "--json"]) == 0
    ways = {w["id"]: w for w in json.loads(capsys.readouterr().out)["ways"]}
    assert ways["exit1"]["latency_ms"] == {"value": 7.5, "evidence": "measured"}
    assert ways["exit1"]["p99_ms"] == {"value": 9.0, "evidence": "measured"}
    assert ways["exit1"]["energy_mj"] == {"value": 4.5, "evidence": "measured"}
    assert ways["full"]["latency_ms"]["evidence"] == "unknown"
    assert main(["frontier", str(artifact), "--profile", str(file)]) == 0
    assert "ssh://board: board" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("data", "code"), [(b"{", "EB580"), (None, "EB580"), ("other artifact", "EB581")]
)
def test_a_corrupt_or_foreign_profile_is_refused(
    data: bytes | str | None,
    code: str,
    artifact: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "p.json"
    if isinstance(data, str):
        own = Profile(artifact="cd" * 32, device=here("e", "1", 1), samples_ms={})
        profile.save(own, file)
    elif data is not None:
        file.write_bytes(data)
    assert main(["frontier", str(artifact), "--profile", str(file)]) == 5
    assert f"[{code}]" in capsys.readouterr().err


def test_what_came_before_the_loss_is_shown_written_and_not_taken_for_whole(
    artifact: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """This machine, cut off after the first times."""
    lines_of = Local.lines

    def cut(self: Local, job: Job, folder: Path) -> Iterator[str]:
        for line in lines_of(self, job, folder):
            yield line
            if '"times"' in line:
                raise TargetError("EB643", "local was lost", hint="try again")

    monkeypatch.setattr(Local, "lines", cut)
    out = tmp_path / "part.json"
    assert main(["profile", str(artifact), "--seconds", "0.1", "--out", str(out)]) == 6
    said = capsys.readouterr()
    assert "partial, local stopped early" in said.out
    assert "[EB643]" in said.err
    found = Profile.decode(out.read_bytes())
    assert found.samples_ms.keys() == ea.MACS.keys()
    assert not (tmp_path / "cache" / "profiles").exists()


def test_a_damaged_artifact_is_an_error_of_one_line(
    artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ea.file_of(artifact, "s1").write_bytes(b"broken")  # after the manifest was written
    assert main(["profile", str(artifact), "--seconds", "0.1"]) == 5
    assert "[EB502]" in capsys.readouterr().err


def test_what_cannot_be_timed_is_refused(
    artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["profile", str(artifact), "--target", "npu"]) == 6
    assert "[EB645]" in capsys.readouterr().err
    assert main(["profile", str(artifact), "--weights", "x"]) == 2
    assert main(["profile", str(artifact), "--seconds", "0"]) == 2


def test_a_plain_model_is_exported_and_profiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EDGEBUDGET_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "p.json"
    command = ["profile", "digits", "--seconds", "0.2", "--out", str(out)]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "stem.0/Conv" in said
    assert "p99" in said
    found = Profile.decode(out.read_bytes())
    assert found.samples_ms.keys() == {"main"}
    assert not (tmp_path / "cache" / "profiles").exists()  # of a model there is no runner
