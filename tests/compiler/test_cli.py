"""The command line: what it prints, what it returns, and what it does not load."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from edgebudget.cli import app, main
from edgebudget.cli.progress import Bars, Lines, listening
from edgebudget.events import Advanced, Finished, Said, Started
from edgebudget_runtime.errors import MissedError
from edgebudget_runtime.manifest import Manifest

COMMANDS = ["compile", "cascade", "plan", "run", "simulate", "frontier", "eval", "inspect",
            "explain", "report", "compare", "targets", "passes", "models", "doctor", "cache ls",
            "cache gc"]  # fmt: skip
Capture = pytest.CaptureFixture[str]


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )


def answer(capsys: Capture, *arguments: str) -> Any:
    """The JSON of a command that must succeed."""
    code = main([*arguments, "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out)


def failure(capsys: Capture, *arguments: str) -> tuple[int, str]:
    """Exit code and message of a command that must fail, with nothing on stdout."""
    code = main(arguments)
    out, err = capsys.readouterr()
    assert out == ""
    return code, err


@pytest.fixture
def onnx_file(tmp_path: Path) -> Path:
    weight = numpy_helper.from_array(np.full((3, 2, 3, 3), 0.5, np.float32), "w")
    conv = helper.make_node("Conv", ["x", "w"], ["c"], name="stem", pads=[1] * 4)
    graph = helper.make_graph(
        [conv, helper.make_node("Relu", ["c"], ["y"], name="[red]act")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3, 8, 8])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path = tmp_path / "model.onnx"
    onnx.save(model, str(path))
    return path


def test_help_loads_no_heavy_library() -> None:
    heavy = ["torch", "onnx", "numpy", "onnxruntime", "scipy", "PIL", "transformers"]
    done = run_python(
        "import sys; from edgebudget.cli import main; code = main(['--help'])\n"
        f"print(code, sorted(set({heavy}) & set(sys.modules)), file=sys.stderr)"
    )
    assert done.stderr.strip() == "0 []"
    assert "compile" in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    result = CliRunner().invoke(app, [*command.split(), "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.output


def test_version(capsys: Capture) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("edgebudget 0.")


@pytest.mark.parametrize("command", ["targets", "passes", "models", "doctor"])
def test_lists_are_json_or_a_table(command: str, capsys: Capture) -> None:
    found = answer(capsys, command)
    assert len(found) > 0
    assert all("name" in x for x in found)
    assert main([command]) == 0
    assert found[0]["name"] in capsys.readouterr().out


def test_passes_say_what_they_do_without_being_imported() -> None:
    done = run_python(
        "import sys; from edgebudget.cli import main; main(['passes', '--json'])\n"
        "print('torch' in sys.modules, file=sys.stderr)"
    )
    assert done.stderr.strip() == "False"
    assert all(x["summary"].endswith(".") for x in json.loads(done.stdout))


def test_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    from edgebudget.cache import Cache, key

    monkeypatch.setenv("EDGEBUDGET_CACHE", str(tmp_path / "cache"))
    assert answer(capsys, "cache", "ls")["kept"] == []
    cache = Cache()

    def fill(folder: Path) -> None:
        (folder / "x.json").write_text("{}")

    cache.put(key({"a": 1}), fill)
    cache.close()
    assert len(answer(capsys, "cache", "ls")["kept"]) == 1
    assert len(answer(capsys, "cache", "gc", "--older-than-days", "1")["removed"]) == 0
    assert len(answer(capsys, "cache", "gc", "--max-size", "1B")["removed"]) == 1
    code, text = failure(capsys, "cache", "gc", "--max-size", "12")
    assert (code, "EB110" in text) == (2, True)


def test_inspect_a_model(onnx_file: Path, capsys: Capture) -> None:
    found = answer(capsys, "inspect", str(onnx_file))
    assert found["macs"] == 3 * 64 * 2 * 9
    assert found["flops"] == 2 * found["macs"]
    assert found["params"] == 54
    assert found["inputs"] == [{"name": "x", "shape": [1, 2, 8, 8], "dtype": "float32"}]
    assert found["memory"]["peak_activation_bytes"] == 2 * 3 * 64 * 4
    assert [x["name"] for x in found["layers"]] == ["stem", "[red]act"]
    assert main(["inspect", str(onnx_file)]) == 0
    text = capsys.readouterr().out
    assert "[red]act" in text, "names are text, never markup"
    assert found["definition"] in text
    assert "input x: 1x2x8x8 float32 (batch included)" in text


def test_inspect_an_artifact(artifact: Path, capsys: Capture) -> None:
    found = answer(capsys, "inspect", str(artifact))
    assert found["kind"] == "artifact"
    assert found["layers"]
    assert main(["inspect", str(artifact)]) == 0
    capsys.readouterr()
    segment = artifact / Manifest.load(artifact).segments[0].file
    segment.write_bytes(segment.read_bytes()[:-1])
    code, text = failure(capsys, "inspect", str(artifact))
    assert code == 5
    assert text.startswith("[EB50")


def test_inspect_an_artifact_without_onnx(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr("edgebudget.cli.anatomy.find_spec", lambda name: None)
    found = answer(capsys, "inspect", str(artifact))
    manifest = Manifest.load(artifact)
    assert found["macs"] == sum(x.macs for x in manifest.layers_after)
    assert found["other_ops"] is None, "unknown, not zero"
    assert main(["inspect", str(artifact)]) == 0


def test_explain_and_report(artifact: Path, tmp_path: Path, capsys: Capture) -> None:
    manifest = Manifest.load(artifact)
    found = answer(capsys, "explain", str(artifact))
    assert [x["name"] for x in found["passes"]] == [x.name for x in manifest.passes]
    assert found["holds"] is manifest.holds
    assert main(["explain", str(artifact)]) == 0
    text = capsys.readouterr().out
    for step in manifest.passes:
        for note in (*step.did, *step.declined):
            assert note.what in text
            assert note.why in text
    page = tmp_path / "r.html"
    assert answer(capsys, "report", str(artifact), "--out", str(page))["report"] == str(page)
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    code, text = failure(capsys, "report", str(artifact), "--out", str(tmp_path / "no/r.html"))
    assert (code, "EB108" in text) == (2, True)


def test_run_answers_every_input(artifact: Path, tmp_path: Path, capsys: Capture) -> None:
    image = np.arange(48, dtype=np.float32).reshape(1, 3, 4, 4) / 48
    np.save(tmp_path / "a.npy", image)
    np.savez(tmp_path / "b.npz", image=image)
    out = tmp_path / "out.npz"
    first, second = answer(
        capsys, "run", str(artifact), str(tmp_path / "a.npy"), str(tmp_path / "b.npz"),
        "--out", str(out),
    )  # fmt: skip
    assert first["outputs"] == second["outputs"]
    assert first["latency_ms"] > 0
    assert np.load(out)["scores"].shape == (2, 2)
    assert main(["run", str(artifact), str(tmp_path / "a.npy")]) == 0
    assert "scores [1, 2]" in capsys.readouterr().out
    (tmp_path / "c.npz").write_bytes(b"PK nothing")
    for name in ("c.npz", "none.npy"):
        code, text = failure(capsys, "run", str(artifact), str(tmp_path / name))
        assert (code, "EB109" in text) == (2, True)


def test_eval_a_model(capsys: Capture) -> None:
    found = answer(capsys, "eval", "digits")
    assert found["metric"] == "top1"
    assert found["low"] <= found["value"] <= found["high"]
    assert found["value"] > 0.9


def test_eval_an_artifact_needs_to_know_on_what(artifact: Path, capsys: Capture) -> None:
    code, text = failure(capsys, "eval", str(artifact))
    assert code == 2
    assert "EB109" in text
    assert "--original" in text


@pytest.mark.slow
def test_compile_to_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("EDGEBUDGET_CACHE", str(tmp_path / "cache"))
    plan, out = tmp_path / "plan.toml", str(tmp_path / "out")
    plan.write_text('format = 1\n[[step]]\npass = "quantize_int8"\n')
    made = answer(
        capsys, "compile", "digits", "--out", out, "--plan", str(plan), "--size", "1MB",
        "--max-drop", "5%",
    )  # fmt: skip
    assert made["holds"] is True
    seen = answer(capsys, "inspect", out)
    assert seen["macs"] == made["cost"]["macs"]["value"]
    assert seen["params"] == made["cost"]["params"]["value"]
    assert seen["memory"]["total_bytes"] == made["cost"]["memory_bytes"]["value"]
    assert answer(capsys, "eval", out)["value"] == made["quality"]["value"]
    shape = seen["inputs"][0]["shape"]
    np.save(tmp_path / "x.npy", np.zeros(shape, np.float32))
    (given,) = answer(capsys, "run", out, str(tmp_path / "x.npy"))
    assert len(given["outputs"]) == 1


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["frobnicate"], 2, "EB100"),
        (["compile"], 2, "`edgebudget compile --help`"),
        (["compile", "digits", "--out", "x", "--verify", "some"], 2, "EB100"),
        (["compile", "digits", "--out", "x", "--macs", "50 Gb"], 2, "did you mean 50G"),
        (["compile", "digits", "--out", "x", "--max-drop", "150%"], 2, "EB111"),
        (["inspect", "no-such-model"], 2, "no-such-model"),
        (["inspect", "digits", "--input-shape", "3xx4"], 2, "EB101"),
        (["explain", "/no/such/folder"], 5, "EB500"),
        (["run", "/no/such/folder", "x.npy"], 5, "EB500"),
    ],
)
def test_mistakes_are_one_short_block(
    arguments: list[str], code: int, says: str, capsys: Capture
) -> None:
    found, text = failure(capsys, *arguments)
    assert found == code
    assert says in text
    assert text.startswith("[EB")
    assert len(text.splitlines()) == 2
    assert "Traceback" not in text


def test_debug_shows_where(capsys: Capture) -> None:
    code, text = failure(capsys, "explain", "/no/such/folder", "--debug")
    assert code == 5
    assert "Traceback" in text
    assert "EB500" in text


def raising(error: BaseException) -> Callable[..., Any]:
    def call(*_: Any, **__: Any) -> Any:
        raise error

    return call


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (ZeroDivisionError("of zero"), 1, "[EB900] internal error: ZeroDivisionError: of zero"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 2, "edgebudget[compile]"),
        (MissedError("EB410", "not proven: size", hint="see x.missed"), 4, "EB410"),
    ],
)
def test_exit_codes(
    error: BaseException,
    code: int,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("edgebudget.compiler.compile", raising(error))
    found, text = failure(capsys, "compile", "digits", "--out", str(tmp_path / "x"))
    assert found == code
    assert says in text


def test_compile_passes_everything_on(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    from edgebudget.compiler import CompileResult
    from edgebudget.elastic_compile import Elastic

    seen: dict[str, Any] = {}

    def compile_(model: str, **given: Any) -> CompileResult:
        seen.update(given, model=model)
        given["on_event"](Said("warning", "look here"))
        print("a library talks")  # noqa: T201
        return CompileResult(artifact, Manifest.load(artifact))

    monkeypatch.setattr("edgebudget.compiler.compile", compile_)
    arguments = [
        "compile", "m.onnx", "--out", "o", "--target", "npu", "--macs", "50G", "--params", "2M",
        "--size", "4MB", "--memory", "64MiB", "--latency", "10ms@p99", "--energy", "5mJ",
        "--max-drop", "1%", "--min-quality", "0.8", "--max-fallback", "0", "--time-limit", "20m",
        "--data", "npz:d.npz", "--task", "classification", "--weights", "w.safetensors",
        "--input-shape", "1x3x224x224", "--plan", "p.toml", "--seed", "7", "--verify", "full",
        "--force", "--elastic", "exit,width", "--subnetworks", "4", "--confidence", "95%",
        "--max-batch", "4", "--energy-model", "7nm",
    ]  # fmt: skip
    assert main([*arguments, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["out"] == str(artifact)
    assert "look here" in err
    assert "a library talks" in err
    budget = seen.pop("budget")
    del seen["on_event"]
    assert seen.pop("elastic") == Elastic(("exit", "width"), 4, 0.95)
    assert seen == {
        "model": "m.onnx", "out": Path("o"), "target": "npu", "data": "npz:d.npz",
        "task": "classification", "weights": Path("w.safetensors"),
        "input_shape": (1, 3, 224, 224), "plan": Path("p.toml"), "seed": 7, "verify": "full",
        "force": True, "max_batch": 4, "energy_model": "7nm",
    }  # fmt: skip
    assert budget.limit("macs") == 50e9
    assert budget.limit("memory_bytes") == 64 * 2**20
    assert {x.statistic for x in budget.limits if x.resource == "latency_ms"} == {"p99"}
    assert (budget.max_drop, budget.min_quality, budget.time_limit_s) == (0.01, 0.8, 1200)
    assert main(arguments) == 0
    assert str(artifact / "report.html") in capsys.readouterr().out


def test_only_the_answer_reaches_stdout() -> None:
    done = run_python(
        "import os, sys\nfrom edgebudget.cli.output import only_answers\n"
        "with only_answers():\n print('python'); sys.stdout.flush(); os.write(1, b'native\\n')\n"
        "print('answer')"
    )
    assert done.stdout == "answer\n"
    assert done.stderr.splitlines() == ["python", "native"]


def test_progress_without_a_terminal_is_few_plain_lines(capsys: Capture) -> None:
    with listening() as emit:
        assert isinstance(emit, Lines)
        emit(Started("train", 1000))
        for _ in range(1000):
            emit(Advanced("train"))
        emit(Said("warning", "two pictures skipped"))
        emit(Finished("train", "loss 0.1"))
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert lines[0] == "train"
    assert "train: 500 of 1000" in lines
    assert lines[-2:] == ["warning: two pictures skipped", "train: loss 0.1"]
    assert len(lines) == 12


def test_progress_bars_follow_the_work() -> None:
    from rich.console import Console
    from rich.progress import Progress

    with open(os.devnull, "w", encoding="utf-8") as sink:  # noqa: PTH123
        progress = Progress(console=Console(file=sink))
        bars = Bars(progress)
        bars(Started("probe"))
        bars(Advanced("probe", 3, "0.1 dB"))
        bars(Advanced("never started"))
        bars(Said("info", "[not markup]"))
        bars(Finished("probe"))
        bars(Started("probe", 5))
        bars(Advanced("probe", 2))
    first, second = progress.tasks
    assert (first.completed, first.total, first.finished) == (3, 3, True)
    assert (second.completed, second.total, second.finished) == (2, 5, False)
