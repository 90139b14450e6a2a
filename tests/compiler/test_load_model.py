"""Models from every source, and every bad file refused before it can do harm."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from edgebudget.load_model import load_model
from edgebudget_runtime.errors import ArtifactError, UsageError

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
    length = int.from_bytes(data[:8], "little")
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
