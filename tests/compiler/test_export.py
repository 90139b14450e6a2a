"""Modules become named, static, deterministic graphs that compute the same; or a clear refusal."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from edgebudget import export, graph
from edgebudget.facts import FACTS
from edgebudget.program import Program, TensorSpec
from edgebudget_runtime.errors import UnsupportedError


class Net(nn.Module):
    """Convolutions with batch norm, a residual and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.block = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, 5]."""
        x = self.stem(x)
        x = torch.relu(x + self.norm(self.block(x)))
        scores: Tensor = self.head(x.mean((2, 3)))
        return scores


class Call(nn.Module):
    """A module made of a function."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: Tensor) -> Any:
        """Whatever the function says."""
        return self.function(*tensors)


def _net() -> Program:
    torch.manual_seed(0)
    net = Net().eval()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.get_buffer("running_mean"))
            nn.init.uniform_(m.get_buffer("running_var"), 0.5, 2)
    return Program("module", net, (TensorSpec("image", (1, 3, 8, 8)),), ("scores",))


def _call(function: Any, *outputs: str, inputs: int = 1) -> Program:
    specs = tuple(TensorSpec(f"x{i}", (2, 3)) for i in range(inputs))
    return Program("module", Call(function).eval(), specs, outputs)


def test_graph_is_named_static_and_equal_to_the_module() -> None:
    program = _net()
    made = export.to_graph(program)
    model: onnx.ModelProto = made.body
    assert made.stage == "graph"
    assert graph.specs(model) == program.inputs
    assert [o.name for o in model.graph.output] == ["scores"]
    assert graph.opset(model) == graph.OPSET
    names = [n.name for n in model.graph.node]
    assert {"stem.0/Conv", "block/Conv", "head/Gemm"} <= set(names)
    assert len(set(names)) == len(names)
    assert {"stem.0.weight", "head.bias"} <= {t.name for t in model.graph.initializer}
    assert not any(n.metadata_props or n.doc_string for n in model.graph.node)
    facts = ("valid_graph", "static_shapes", "finite_weights", "batchnorm_folded")
    assert [FACTS[f](made) for f in facts] == [None] * 4
    values = graph.probe(program.inputs, seed=5)
    expected = export.run_module(program, values)["scores"]
    np.testing.assert_allclose(graph.run(model, values)["scores"], expected, rtol=1e-4, atol=1e-5)


def test_equal_modules_give_equal_bytes_in_another_process() -> None:
    code = (
        "import runpy, sys; m = runpy.run_path(sys.argv[1]);"
        "print(m['graph'].fingerprint(m['export'].to_graph(m['_net']()).body))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, __file__], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == graph.fingerprint(export.to_graph(_net()).body)


def test_export_says_nothing(capfd: pytest.CaptureFixture[str], recwarn: Any) -> None:
    export.to_graph(_net())
    with pytest.raises(UnsupportedError):
        export.to_graph(_call(lambda x: x if x.sum() > 0 else -x, "y"))
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


def test_outputs_may_be_dicts_tuples_inputs_and_repeated() -> None:
    made = export.to_graph(_call(lambda x: {"b": x + 1, "a": x, "c": x}, "a", "b", "c"))
    values = {"x0": np.ones((2, 3), np.float32)}
    got = graph.run(made.body, values)
    assert {k: float(v[0, 0]) for k, v in got.items()} == {"a": 1, "b": 2, "c": 1}
    nested = export.to_graph(_call(lambda x, y: (x - y, [x * y, None]), "d", "p", inputs=2))
    values = {"x0": np.full((2, 3), 3, np.float32), "x1": np.full((2, 3), 2, np.float32)}
    assert {k: float(v[0, 0]) for k, v in graph.run(nested.body, values).items()} == {
        "d": 1,
        "p": 6,
    }


def test_an_output_called_like_an_inner_value_keeps_its_name() -> None:
    made = export.to_graph(_call(lambda x: (x.relu() + 1).abs(), "relu"))
    got = graph.run(made.body, {"x0": np.full((2, 3), -1, np.float32)})
    assert float(got["relu"][0, 0]) == 1


def test_transformers_outputs_are_taken_by_name() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        image_size=16, patch_size=8, num_labels=3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(config).eval()
    spec = TensorSpec("pixel_values", (1, 3, 16, 16))
    made = export.to_graph(Program("module", model, (spec,), ("logits",)))
    assert graph.shapes(made.body)["logits"] == (1, 3)


@pytest.mark.parametrize(
    ("program", "code", "says"),
    [
        (_call(lambda x: x if x.sum() > 0 else -x, "y"), "EB220", "data-dependent"),
        (_call(lambda x: torch.linalg.cholesky(x @ x.T), "y"), "EB220", "aten.linalg_cholesky"),
        (_call(lambda x: x + torch.rand_like(x), "y"), "EB221", "differs"),
        (_call(lambda x: (x, x), "y"), "EB222", "2 tensors"),
        (_call(lambda x: ("text", x), "y", "z"), "EB222", "a str"),
    ],
)
def test_what_cannot_be_exported_is_refused(program: Program, code: str, says: str) -> None:
    with pytest.raises(UnsupportedError) as e:
        export.to_graph(program)
    assert e.value.code == code
    assert says in e.value.what
    if code == "EB220":
        assert Path(__file__).name in e.value.what


def test_difference_sees_scale_shape_and_nan() -> None:
    one = np.array([1.0, -100.0], np.float32)
    assert graph.difference([one], [one]) == 0
    assert graph.difference([one], [one + np.float32(1)]) == pytest.approx(0.01)
    assert graph.difference([one], [one[:1]]) == float("inf")
    assert graph.difference([one], [np.array([1.0, np.nan], np.float32)]) == float("inf")
    assert graph.difference([one * 0], [one * 0]) == 0
