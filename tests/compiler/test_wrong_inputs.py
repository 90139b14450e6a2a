"""What a new user gets wrong: one short block on stderr, the right exit code, a hint that helps."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgebudget.cli import main
from edgebudget_models import catalogue

Refused = Callable[..., str]


@pytest.fixture
def refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Refused:
    """Run a command that must fail in an empty folder; gives its message."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EDGEBUDGET_CACHE", str(tmp_path / ".cache"))

    def run(line: str, exit_code: int, code: str) -> str:
        capfd.readouterr()  # what the test itself has run
        assert main(line.split()) == exit_code
        out, err = capfd.readouterr()
        assert out == ""
        assert "Traceback" not in err
        assert "EB900" not in err
        what, hint = err.splitlines()[-2:]
        assert what.startswith(f"[{code}] ")
        assert hint.startswith("  try: ")
        assert len(what) < 400
        assert not Path("o").exists(), "nothing may have the final name"
        return f"{what}\n{hint}"

    return run


@pytest.fixture(scope="module")
def artifact(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as m:
        m.setenv("EDGEBUDGET_CACHE", str(folder / "cache"))
        command = f"compile {tiny}/model.onnx --data npz:{tiny}/data.npz --out {folder}/tiny"
        assert main(command.split()) == 0
    return folder / "tiny"


@pytest.mark.parametrize(
    ("line", "exit_code", "code", "phrase"),
    [
        ("--macs 50g", 2, "EB110", "did you mean 50G?"),
        ("--macs 50%", 2, "EB110", "units are K, M, G, T"),
        ("--time-limit 20", 2, "EB110", "20m"),
        ("--max-drop 150%", 2, "EB111", "1%"),
        ("--target npuu", 2, "EB140", "did you mean 'npu'?"),
        ("--target npu:coreml", 5, "EB240", "there are cpu"),
        ("--task clasification", 2, "EB168", "did you mean classification?"),
        ("--input-shape 1xax8", 2, "EB101", "1x3x224x224"),
        ("--input-shape 1x3x8", 2, "EB164", "[1, 3, 8]"),
        ("--plan nope.toml", 2, "EB105", "nope.toml"),
        ("--data npy:x.npz", 2, "EB169", "did you mean npz:x.npz?"),
        ("--macs 1", 3, "EB401", "smallest reachable point"),
        ("--min-quality 0.9999", 3, "EB405", "ask for at most 0.98"),
        ("--energy 5mJ", 3, "EB403", "this target tells latency_ms"),
        ("--latency 1ms --target npu:hexagon/snapdragon-888", 3, "EB403", "--size or --memory"),
    ],
)
def test_wrong_options(refused: Refused, line: str, exit_code: int, code: str, phrase: str) -> None:
    if "npu " in f"{line} " and "npuu" not in line:
        pytest.importorskip("onnxruntime_qnn", reason="needs the extra `qnn`")
    assert phrase in refused(f"compile digits --out o {line}", exit_code, code)


def test_the_smallest_point_that_a_refusal_names_can_be_asked_for(refused: Refused) -> None:
    said = refused("plan digits --macs 1", 3, "EB401")
    assert main(["plan", "digits", "--macs", said.rpartition(" ")[2]]) == 0


def test_misspelt_zoo_name(refused: Refused) -> None:
    assert "did you mean digits?" in refused("compile digit --out o", 2, "EB160")


def test_broken_plans_are_refused_before_the_model_is_read(refused: Refused) -> None:
    step = 'format = 1\n[[step]]\npass = "quantize_int8"\n'
    Path("setting.toml").write_text(step + "config = {recipez = 3}\n")
    Path("pass.toml").write_text(step.replace("quantize", "quantise"))
    Path("syntax.toml").write_text("format = \n")
    command = "compile no-such-model --out o --plan"
    assert "step[0].recipez" in refused(f"{command} setting.toml", 2, "EB104")
    assert "did you mean 'quantize_int8'?" in refused(f"{command} pass.toml", 2, "EB102")
    assert "line 1" in refused(f"{command} syntax.toml", 2, "EB105")


def test_broken_onnx_files(refused: Refused, tiny: Path) -> None:
    whole = (tiny / "model.onnx").read_bytes()
    for name, content, code in [
        ("corrupt", b"\0garbage" * 50, "EB530"),
        ("short", whole[: len(whole) // 2], "EB530"),
        ("empty", b"", "EB530"),
        ("pickle", pickle.dumps({"a": 1}), "EB532"),
    ]:
        Path(f"{name}.onnx").write_bytes(content)
        assert f"{name}.onnx" in refused(f"compile {name}.onnx --out o", 5, code)


def test_wrong_weights(refused: Refused) -> None:
    import torch
    from safetensors.torch import save_file

    state = {k: v.clone() for k, v in catalogue.get("digits").load(None).state_dict().items()}
    name = next(iter(state))
    state[name].view(-1)[0] = float("nan")
    save_file(state, "nan.safetensors")
    save_file({"a": torch.zeros(1)}, "other.safetensors")
    torch.save({"a": torch.zeros(1)}, "zip.safetensors")
    Path("pickle.safetensors").write_bytes(pickle.dumps({"a": 1}))
    command = "compile digits --out o --weights"
    assert name in refused(f"{command} nan.safetensors", 5, "EB543")
    assert "1 unexpected (a)" in refused(f"{command} other.safetensors", 5, "EB542")
    assert "can run code" in refused(f"{command} zip.safetensors", 5, "EB540")
    assert "can run code" in refused(f"{command} pickle.safetensors", 5, "EB540")
    assert "check the path" in refused(f"{command} none.safetensors", 2, "EB166")


def test_wrong_arrays(refused: Refused, tiny: Path) -> None:
    good = dict(np.load(tiny / "data.npz"))
    nan = good["x"].copy()
    nan[3, 0, 0, 0] = np.nan
    np.savez("nhwc.npz", x=good["x"].transpose(0, 2, 3, 1), labels=good["labels"])
    np.savez("nan.npz", x=nan, labels=good["labels"])
    np.savez("labels.npz", x=good["x"], labels=good["labels"] + 5)
    command = f"compile {tiny}/model.onnx --out o --data npz:"
    said = refused(f"{command}nhwc.npz", 5, "EB548")
    assert "transpose(0, 3, 1, 2)" in said
    axes = tuple(int(i) for i in said.rpartition("(")[2].partition(")")[0].split(", ")[:4])
    moved = np.load("nhwc.npz")["x"].transpose(axes)
    np.testing.assert_array_equal(moved, good["x"])  # the hint does what it says
    assert "NaN" in refused(f"{command}nan.npz", 5, "EB549")
    assert "classes 0 to 2" in refused(f"{command}labels.npz", 5, "EB547")
    said = refused(f"compile {tiny}/model.onnx --out o", 2, "EB130")
    assert "--data" in said


def test_wrong_folders_of_pictures(refused: Refused, tiny: Path) -> None:
    from PIL import Image

    Path("empty").mkdir()
    Path("one/cat").mkdir(parents=True)
    for i in range(3):
        Image.fromarray(np.full((8, 8, 3), i * 20, np.uint8)).save(f"one/cat/{i}.png")
    command = f"compile {tiny}/model.onnx --task classification --out o --data imagefolder:"
    options = "?range=0,1&mean=0,0,0&std=1,1,1"
    refused(f"{command}empty{options}", 5, "EB545")
    assert "only the class 'cat'" in refused(f"{command}one{options}", 5, "EB546")
    assert "check the path" in refused(f"{command}none{options}", 2, "EB169")


def test_faulty_user_code_is_named_with_its_line(refused: Refused, tiny: Path) -> None:
    Path("mine.py").write_text(
        "import torch\n"
        "def boom(*args):\n    raise ValueError('no luck')\n"
        "def wrong(*args):\n    return 5\n"
        "def words(*args):\n    return 'good'\n"
        "def shapeless():\n    return torch.nn.Conv2d(1, 1, 1)\n"
    )
    Path("syntax.py").write_text("def f(:\n")
    data = f"compile {tiny}/model.onnx --out o --data"
    metric = f"{data} npz:{tiny}/data.npz --task"
    assert "mine.py:3: boom() raised ValueError: no luck" in refused(
        "compile mine.py:boom --out o", 2, "EB163"
    )
    assert "did you mean mine.py:boom?" in refused("compile mine.py:bom --out o", 2, "EB162")
    assert "wrong() returned int" in refused("compile mine.py:wrong --out o", 2, "EB163")
    assert "--input-shape" in refused("compile mine.py:shapeless --out o", 2, "EB164")
    assert "syntax.py:1" in refused("compile syntax.py:f --out o", 2, "EB161")
    assert "mine.py:3" in refused(f"{data} mine.py:boom", 2, "EB163")
    assert "returned int" in refused(f"{data} mine.py:wrong", 2, "EB163")
    assert "mine.py:3" in refused(f"{metric} mine.py:boom", 2, "EB163")
    assert "words() returned 'good'" in refused(f"{metric} mine.py:words", 2, "EB163")


@pytest.mark.parametrize("command", ["run {0} x.npz", "explain {0}", "report {0}", "inspect {0}",
                                     "eval {0}"])  # fmt: skip
def test_damaged_artifacts(refused: Refused, artifact: Path, command: str) -> None:
    np.savez("x.npz", x=np.zeros((1, 3, 8, 8), np.float32))
    for name in ("flipped", "outside", "cut", "lost"):
        shutil.copytree(artifact, name)
    file = Path("flipped/segments/main.onnx")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    manifest = json.loads(Path("outside/manifest.json").read_text())
    manifest["segments"][0]["file"] = "../flipped/segments/main.onnx"
    Path("outside/manifest.json").write_text(json.dumps(manifest))
    Path("cut/manifest.json").write_bytes(Path("cut/manifest.json").read_bytes()[:300])
    Path("lost/segments/main.onnx").unlink()
    for name, code in [
        ("flipped", "EB502"),
        ("outside", "EB503"),
        ("cut", "EB500"),
        ("lost", "EB504"),
    ]:
        refused(command.format(name), 5, code)


def test_folders_that_are_no_artifact(refused: Refused) -> None:
    Path("empty").mkdir()
    for command in ("run empty x.npz", "explain empty", "report empty"):
        assert "edgebudget compile --out" in refused(command, 5, "EB500")
    for command in ("inspect empty", "eval empty"):
        refused(command, 2, "EB160")


def test_wrong_inputs_of_run(refused: Refused, artifact: Path) -> None:
    np.savez("shape.npz", x=np.zeros((1, 3, 9, 9), np.float32))
    np.savez("name.npz", z=np.zeros((1, 3, 8, 8), np.float32))
    np.savez("good.npz", x=np.zeros((1, 3, 8, 8), np.float32))
    Path("text.npz").write_text("hello")
    assert "[1, 3, 9, 9]" in refused(f"run {artifact} shape.npz", 2, "EB171")
    assert "the model takes 'x'" in refused(f"run {artifact} name.npz", 2, "EB170")
    refused(f"run {artifact} text.npz", 2, "EB109")
    refused(f"run {artifact} none.png", 2, "EB109")
    refused(f"run {artifact} good.npz --out none/x.npz", 2, "EB108")
    refused(f"report {artifact} --out /proc/r.html", 2, "EB108")


def test_a_broken_picture(refused: Refused) -> None:
    Path("broken.jpg").write_bytes(b"\xff\xd8\xff\xe0nope")
    assert main("compile digits --out digits --max-drop 50%".split()) == 0
    assert "broken.jpg" in refused("run digits broken.jpg", 5, "EB508")


def test_places_that_cannot_be_written(refused: Refused, tiny: Path) -> None:
    Path("foreign").mkdir()
    Path("foreign/letter.txt").write_text("mine")
    Path("plain").write_text("mine")
    command = f"compile {tiny}/model.onnx --data npz:{tiny}/data.npz --out"
    refused(f"{command} foreign", 2, "EB121")
    refused(f"{command} plain", 2, "EB121")
    refused(f"{command} plain/inside", 5, "EB505")
    refused(f"{command} /proc/inside", 5, "EB505")
    assert Path("foreign/letter.txt").read_text() == Path("plain").read_text() == "mine"
