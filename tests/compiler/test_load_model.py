"""Models from every source, and every bad file refused before it can do harm."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from edgebudget import evaluate
from edgebudget.load_model import load_model
from edgebudget_runtime.errors import ArtifactError, UnsupportedError, UsageError

CODE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 5)

    def forward(self, image):
        return self.head(torch.relu(self.norm(self.conv(image))).mean((2, 3)))

def make():
    return Net()

def shaped():
    return Net(), (1, 3, 8, 8)

def two():
    class Two(nn.Module):
        def forward(self, a, b):
            return {"sum": a + b, "product": a * b}
    return Two(), {"a": (1, 2), "b": (1, 2)}

def number():
    return 7

def fails():
    return 1 / 0

def badshape():
    return Net(), (1, "x")
"""


class Runs:
    """A pickle that leaves a file behind when it is opened."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.trace,)


@pytest.fixture
def code(tmp_path: Path) -> Path:
    file = tmp_path / "nets.py"
    file.write_text(CODE)
    return file


@pytest.fixture
def weights(code: Path) -> dict[str, torch.Tensor]:
    module: torch.nn.Module = load_model(f"{code}:shaped").program.body
    return {k: v.clone() for k, v in module.state_dict().items()}


def with_weights(code: Path, tensors: dict[str, torch.Tensor]) -> Any:
    file = code.parent / "w.safetensors"
    save_file(tensors, file)
    return load_model(f"{code}:shaped", weights=file)


def test_a_users_function_gives_a_program_and_a_stable_digest(code: Path) -> None:
    loaded = load_model(f"{code}:shaped", seed=1)
    spec = loaded.program.inputs[0]
    assert (spec.name, spec.shape, spec.dtype) == ("image", (1, 3, 8, 8), "float32")
    assert loaded.output_shapes == {"output": (1, 5)}
    assert not loaded.program.body.training
    assert load_model(f"{code}:make", input_shape=(1, 3, 8, 8), seed=1).digest == loaded.digest
    assert load_model(f"{code}:shaped", seed=2).digest != loaded.digest
    code.write_text(CODE.replace("torch.relu", "torch.sigmoid"))
    assert load_model(f"{code}:shaped", seed=1).digest != loaded.digest  # same weights, other code


def test_loading_leaves_the_global_generator_alone(code: Path) -> None:
    before = torch.random.get_rng_state()
    load_model(f"{code}:shaped")
    assert torch.equal(before, torch.random.get_rng_state())


def test_named_inputs_and_outputs(code: Path) -> None:
    program = load_model(f"{code}:two").program
    assert [s.name for s in program.inputs] == ["a", "b"]
    assert program.outputs == ("sum", "product")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{}:mak", r"EB162.*'mak'(.|\n)*did you mean .*nets\.py:make"),
        ("{}", r"EB162.*which function"),
        ("{}x:make", r"EB160"),
        ("missing.py:make", r"EB161.*missing\.py"),
        ("{}:number", r"EB163.*nets\.py:\d+: number\(\) returned int"),
        ("{}:fails", r"EB163.*nets\.py:31: fails\(\) raised ZeroDivisionError"),
        ("{}:badshape", r"EB163.*shape of input"),
        ("{}:make", r"EB164.*input shape(.|\n)*--input-shape"),
    ],
)
def test_faults_of_user_code_are_one_line_with_its_place(
    code: Path, source: str, expected: str
) -> None:
    with pytest.raises(UsageError, match=expected) as caught:
        load_model(source.format(code))
    assert "\n" not in caught.value.what


@pytest.mark.parametrize(
    ("text", "line"), [("import nothing_like_it", 2), ("def f(:", 2), ("raise SystemExit(3)", 2)]
)
def test_an_import_error_names_the_line(tmp_path: Path, text: str, line: int) -> None:
    file = tmp_path / "broken.py"
    file.write_text(f"x = 1\n{text}\n")
    with pytest.raises(UsageError, match=rf"EB161.*broken\.py:{line}: cannot import"):
        load_model(f"{file}:f")


def test_user_code_may_import_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "eb_neighbour.py").write_text("from torch import nn\nLAYER = nn.Identity\n")
    (tmp_path / "main.py").write_text(
        "def f():\n    from eb_neighbour import LAYER\n    return LAYER(), (1, 2)\n"
    )
    assert load_model(f"{tmp_path / 'main.py'}:f").output_shapes == {"output": (1, 2)}


def test_a_wrong_input_shape_is_told(code: Path) -> None:
    with pytest.raises(UsageError, match=r"EB164.*\[1, 1, 8, 8\]"):
        load_model(f"{code}:make", input_shape=(1, 1, 8, 8))


def test_safetensors_weights_are_used(code: Path, weights: dict[str, torch.Tensor]) -> None:
    weights["head.bias"] = torch.arange(5.0)
    del weights["norm.num_batches_tracked"]
    loaded = with_weights(code, weights)
    assert torch.equal(loaded.program.body.head.bias, torch.arange(5.0))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda w: w.pop("head.bias"), r"1 missing \(head\.bias\)"),
        (lambda w: w.update(extra=torch.zeros(1)), r"1 unexpected \(extra\)"),
        (lambda w: w.update({"head.bias": torch.zeros(9)}), r"head\.bias is \[9\].*has \[5\]"),
    ],
)
def test_weights_of_another_model_are_named(
    code: Path,
    weights: dict[str, torch.Tensor],
    change: Callable[[dict[str, torch.Tensor]], object],
    expected: str,
) -> None:
    change(weights)
    with pytest.raises(ArtifactError, match=f"EB542.*{expected}"):
        with_weights(code, weights)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(
    code: Path, weights: dict[str, torch.Tensor], value: float
) -> None:
    weights["conv.weight"][0, 0, 0, 0] = value
    with pytest.raises(ArtifactError, match=r"EB543.*conv\.weight holds 1 NaN or Inf"):
        with_weights(code, weights)


@pytest.mark.parametrize("name", ["w.pt", "w.pth", "w.bin", "w.safetensors"])
@pytest.mark.parametrize("kind", ["plain", "torch"])
def test_a_pickle_is_refused_by_any_name_and_never_opened(code: Path, name: str, kind: str) -> None:
    trace, file = code.parent / "ran", code.parent / name
    if kind == "plain":
        file.write_bytes(pickle.dumps(Runs(trace)))
    else:
        torch.save(Runs(trace), file)
    with pytest.raises(ArtifactError, match=r"EB540.*refused(.|\n)*safetensors"):
        load_model(f"{code}:shaped", weights=file)
    assert not trace.exists()


def damaged(data: bytes, how: str) -> bytes:
    length = struct.unpack("<Q", data[:8])[0]
    return {
        "empty": b"",
        "cut in the header": data[:40],
        "cut in the tensors": data[:-10],
        "an absurd header": struct.pack("<Q", 2**62) + data[8:],
        "a huge header": struct.pack("<Q", 200_000_000) + data[8:],
        "no JSON": data[:8] + b"x" * length + data[8 + length :],
        "a list": struct.pack("<Q", 2) + b"[]",
        "text": b"these are not weights at all, and longer than eight",
    }[how]


@pytest.mark.parametrize(
    "how",
    [
        "empty",
        "cut in the header",
        "cut in the tensors",
        "an absurd header",
        "a huge header",
        "no JSON",
        "a list",
        "text",
    ],
)
def test_damaged_safetensors_are_refused(
    code: Path, weights: dict[str, torch.Tensor], how: str
) -> None:
    file = code.parent / "w.safetensors"
    save_file(weights, file)
    file.write_bytes(damaged(file.read_bytes(), how))
    with pytest.raises(ArtifactError, match="EB541"):
        load_model(f"{code}:shaped", weights=file)


def test_sources_that_lead_nowhere(code: Path) -> None:
    with pytest.raises(UsageError, match=r"EB160(.|\n)*did you mean digits"):
        load_model("digit")
    with pytest.raises(UsageError, match="EB166"):
        load_model("nothing.onnx")
    with pytest.raises(UsageError, match="EB166"):
        load_model(f"{code}:shaped", weights=Path("nothing.safetensors"))
    checkpoint = code.parent / "model.pth"
    torch.save({}, checkpoint)
    with pytest.raises(ArtifactError, match="EB540"):
        load_model(str(checkpoint))
    with pytest.raises(UsageError, match="EB160"):
        load_model(str(code.parent))  # a folder without config.json


def test_the_zoo_loads_by_name() -> None:
    loaded = load_model("digits")
    assert loaded.program.inputs[0].shape == (1, 1, 8, 8)
    assert loaded.preprocessing["layout"] == "NCHW"


def test_an_onnx_file_is_a_graph_whose_digest_follows_its_weights(code: Path) -> None:
    import onnx

    from edgebudget.export import to_graph

    body = to_graph(load_model(f"{code}:shaped").program).body
    file = code.parent / "net.onnx"
    onnx.save(body, file)
    loaded = load_model(str(file))
    assert (loaded.program.stage, loaded.output_shapes) == ("graph", {"output": (1, 5)})
    with pytest.raises(UsageError, match="EB167"):
        load_model(str(file), weights=file)
    weight = body.graph.initializer[0]
    weight.raw_data = bytes(len(weight.raw_data))
    onnx.save(body, file)
    assert load_model(str(file)).digest != loaded.digest


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3)
        self.norm = torch.nn.BatchNorm2d(4)
        self.drop = torch.nn.Dropout()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.drop(self.norm(self.conv(x)))
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


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers", reason="Hugging Face models need it")
    folder = tmp_path_factory.mktemp("vit")
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=8,
        num_labels=5,
    )
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    processor = {
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.2, 0.2, 0.1],
        "size": {"height": 16, "width": 16},
        "resample": 2,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def copied(folder: Path, to: Path) -> Path:
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def test_a_hugging_face_folder_gives_plain_logits_and_its_preprocessing(vit: Path) -> None:
    loaded = load_model(str(vit))
    assert loaded.program.inputs[0].shape == (1, 3, 16, 16)
    assert loaded.output_shapes == {"output": (1, 5)}
    assert loaded.preprocessing["mean"] == [0.5, 0.4, 0.3]
    assert loaded.preprocessing["resize"] == "stretch"


def test_faults_of_a_hugging_face_folder(vit: Path, tmp_path: Path) -> None:
    pickled = copied(vit, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(ArtifactError, match="EB540"):
        load_model(str(pickled))
    partial = copied(vit, tmp_path / "partial")
    save_file({"vit.layernorm.bias": torch.zeros(16)}, partial / "model.safetensors")
    with pytest.raises(ArtifactError, match=r"EB54[12]"):
        load_model(str(partial))
    own = copied(vit, tmp_path / "own")
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "m.M"}}))
    with pytest.raises(UnsupportedError, match=r"EB251.*own code"):
        load_model(str(own))
    (own / "config.json").write_text(json.dumps({**config, "architectures": ["ViTForMagic"]}))
    with pytest.raises(UnsupportedError, match=r"EB251.*ViTForMagic"):
        load_model(str(own))


def test_a_hub_id_without_network_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="Hugging Face models need it")

    def unreachable(*_: object, **__: object) -> str:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(hub, "snapshot_download", unreachable)
    with pytest.raises(UnsupportedError, match=r"EB250.*org/net is not on this machine"):
        load_model("org/net")
