"""A `.pt2` archive is read without running anything it carries."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgebudget import evaluate
from edgebudget.load_model import load_model
from edgebudget_runtime.errors import ArtifactError, UnsupportedError


class Runs:
    """A pickle that leaves a file behind when it is opened."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.trace,)


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3)
        self.norm = torch.nn.BatchNorm2d(4)
        self.drop = torch.nn.Dropout()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.drop(self.norm(self.conv(x)))
        return y.mean((2, 3)) * torch.tensor([1.0, 2.0, 3.0, 4.0])


def exported(folder: Path, module: torch.nn.Module, *, batch: bool = False) -> Path:
    file = folder / "net.pt2"
    dims = ({0: torch.export.Dim("n", min=1, max=8)},) if batch else None
    example = (torch.zeros(2, 3, 8, 8),)
    torch.export.save(torch.export.export(module, example, dynamic_shapes=dims), file)
    return file


def rewritten(file: Path, change: Callable[[dict[str, bytes]], object]) -> Path:
    with zipfile.ZipFile(file) as archive:
        members = {n.partition("/")[2]: archive.read(n) for n in archive.namelist()}
    change(members)
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members.items():
            archive.writestr(f"net/{name}", data)
    return file


def edited(text: str, other: str) -> Callable[[dict[str, bytes]], object]:
    def change(members: dict[str, bytes]) -> None:
        model = members["models/model.json"].decode()
        assert text in model
        members["models/model.json"] = model.replace(text, other, 1).encode()

    return change


def test_a_pt2_answers_as_its_module_and_can_be_exported_again(tmp_path: Path) -> None:
    from edgebudget.export import to_graph

    module = Small().eval()
    loaded = load_model(str(exported(tmp_path, module, batch=True)))
    assert loaded.program.inputs[0].shape == (1, 3, 8, 8)
    loaded.program.body.eval()
    x = np.random.default_rng(0).normal(size=(1, 3, 8, 8)).astype(np.float32)
    with torch.inference_mode():
        expected = module(torch.from_numpy(x)).numpy()
    found = evaluate.runner_of(loaded.program)({"x": x})["output"]
    assert found == pytest.approx(expected, abs=1e-6)
    ops = {n.op_type for n in to_graph(loaded.program).body.graph.node}
    assert "Conv" in ops
    wider = load_model(str(tmp_path / "net.pt2"), input_shape=(4, 3, 8, 8))
    assert wider.output_shapes == {"output": (4, 4)}


def test_a_pt2_of_a_module_in_training_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"EB252.*training(.|\n)*eval\(\)"):
        load_model(str(exported(tmp_path, Small().train())))


def _pickled_weight(members: dict[str, bytes]) -> None:
    name = "data/weights/model_weights_config.json"
    config = json.loads(members[name])
    config["config"]["conv.weight"]["use_pickle"] = True
    members[name] = json.dumps(config).encode()


def _guards(members: dict[str, bytes]) -> None:
    model = json.loads(members["models/model.json"])
    model["guards_code"] = ["__import__('pathlib').Path(TRACE).touch()"]
    members["models/model.json"] = json.dumps(model).encode()


CALL = '"target": "torch.ops.aten.conv2d.default"'
TREE = r"{\"type\": null, \"context\": null, \"children_spec\": []}"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (_pickled_weight, "EB540"),
        (lambda m: m.update({"data/weights/model.pt": b"x"}), "EB544"),
        (lambda m: m.update({"data/aotinductor/model/a.so": b"x"}), "EB544"),
        (edited(CALL, '"target": "torch.os.system"'), "EB544"),
        (edited(CALL, '"target": "torch.ops.aten.from_file.default"'), "EB544"),
        (edited("Symbol('s", "__import__('s"), "EB544"),
        (edited(TREE, TREE.replace("null", r"\"os.thing\"", 1)), "EB252"),
        (lambda m: m.pop("data/weights/weight_0"), "EB541"),
        (lambda m: m.update({"models/model.json": b"{"}), "EB541"),
        (lambda m: m.update({"models/other.json": m["models/model.json"]}), "EB541"),
    ],
)
def test_a_pt2_with_more_than_a_network_is_refused(
    tmp_path: Path, change: Callable[[dict[str, bytes]], object], code: str
) -> None:
    module = Small().eval()
    file = rewritten(exported(tmp_path, module, batch=True), change)
    with pytest.raises((ArtifactError, UnsupportedError), match=code):
        load_model(str(file))


def test_a_pickle_among_a_pt2s_examples_is_refused_and_never_opened(tmp_path: Path) -> None:
    trace, buffer = tmp_path / "ran", io.BytesIO()
    torch.save(Runs(trace), buffer)

    def change(members: dict[str, bytes]) -> None:
        members["data/sample_inputs/model.pt"] = buffer.getvalue()

    file = rewritten(exported(tmp_path, Small().eval()), change)
    with pytest.raises(ArtifactError, match=r"EB540.*sample_inputs"):
        load_model(str(file))
    assert not trace.exists()


def test_guards_of_a_pt2_are_never_run(tmp_path: Path) -> None:
    file = rewritten(exported(tmp_path, Small().eval()), _guards)
    load_model(str(file))  # the guard refers to an undefined name: run, it would raise


@pytest.mark.parametrize("size", [0, 10, 2000])
def test_a_cut_pt2_is_refused(tmp_path: Path, size: int) -> None:
    file = exported(tmp_path, Small().eval())
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ArtifactError, match="EB541"):
        load_model(str(file))
