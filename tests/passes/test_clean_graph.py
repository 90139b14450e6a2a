"""Cleaning keeps the outputs, removes what is useless, and undoes what would do harm."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgebudget import graph
from edgebudget.facts import FACTS
from edgebudget.onnx_file import freeze_shapes, from_file
from edgebudget.program import Context, PassResult, Program
from edgebudget.session import CpuSession
from edgebudget.workload import Array
from edgebudget_passes import clean_graph

_SHARED = Path(__file__).parents[2].parent / "shared" / "data"
_FACES = Path(os.environ.get("EDGEBUDGET_DATA", _SHARED)) / "ultraface"
_NODE = helper.make_node


def _program(
    nodes: Sequence[onnx.NodeProto], weights: dict[str, Array], *outputs: str, inputs: int = 0
) -> Program:
    """A graph from x [1, 3, 8, 8]; `inputs` of the weights are listed as graph inputs too."""
    rank4 = [None] * 4
    given = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])]
    for name in list(weights)[:inputs]:
        given.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, weights[name].shape))
    made = [helper.make_tensor_value_info(o, TensorProto.FLOAT, rank4) for o in outputs]
    stored = [numpy_helper.from_array(v, k) for k, v in weights.items()]
    body = helper.make_graph(list(nodes), "g", given, made, stored)
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return graph.program(model)


def _run(program: Program) -> PassResult:
    before = onnx.ModelProto()
    before.CopyFrom(program.body)
    result = clean_graph.run(program, clean_graph.Config(), cast(Context, None))
    assert graph.compare(before, result.program.body) <= graph.REORDERED
    assert result.did or result.declined
    for fact in clean_graph.PASS.ensures:
        assert FACTS[fact](result.program) is None
    return result


def _ops(program: Program) -> Counter[str]:
    return Counter(n.op_type for n in program.body.graph.node)


def _weight(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_everything_useless_goes() -> None:
    constant = helper.make_tensor("v", TensorProto.INT64, [4], [1, 4, 8, 8])
    nodes = [
        _NODE("Conv", ["x", "w"], ["c"], pads=[1] * 4),
        _NODE("BatchNormalization", ["c", "s", "b", "m", "v"], ["n"]),
        _NODE("Constant", [], ["shape"], value=constant),
        _NODE("Reshape", ["n", "shape"], ["r"]),
        _NODE("Transpose", ["r"], ["t1"], perm=[0, 2, 3, 1]),
        _NODE("Transpose", ["t1"], ["t2"], perm=[0, 3, 1, 2]),
        _NODE("Identity", ["t2"], ["i"]),
        _NODE("Dropout", ["i"], ["d"]),
        _NODE("Relu", ["d"], ["y1"]),
        _NODE("Relu", ["d"], ["y2"]),
        _NODE("Sigmoid", ["x"], ["dead"]),
        _NODE("Add", ["y1", "y2"], ["y"]),
    ]
    four = {k: np.abs(_weight(4, seed=i)) + 0.5 for i, k in enumerate("sbmv")}
    result = _run(_program(nodes, {"w": _weight(4, 3, 3, 3), **four}, "y", inputs=5))
    assert _ops(result.program) == {"Conv": 1, "Relu": 1, "Add": 1}
    assert [i.name for i in result.program.body.graph.input] == ["x"]
    assert len(result.program.body.graph.initializer) == 2
    assert all(n.name for n in result.program.body.graph.node)
    assert {n.where for n in result.did} >= {"weights as inputs", "constants", "batch norms"}


def test_a_clean_graph_is_left_alone_and_says_so() -> None:
    once = _run(_program([_NODE("Relu", ["x"], ["y"])], {}, "y"))
    assert not once.did
    assert "clean" in once.declined[0].why
    twice = _run(once.program)
    assert graph.fingerprint(twice.program.body) == graph.fingerprint(once.program.body)


def test_outputs_keep_their_names_when_what_makes_them_is_removed() -> None:
    nodes = [
        _NODE("Identity", ["x"], ["same"]),
        _NODE("Relu", ["x"], ["r"]),
        _NODE("Reshape", ["r", "shape"], ["y"]),
        _NODE("Relu", ["x"], ["z"]),
    ]
    shape = {"shape": np.array([1, 3, 8, 8])}
    result = _run(_program(nodes, shape, "same", "y", "z"))
    assert [o.name for o in result.program.body.graph.output] == ["same", "y", "z"]


def test_a_batch_norm_whose_convolution_has_another_reader_stays() -> None:
    nodes = [
        _NODE("Conv", ["x", "w"], ["c"]),
        _NODE("BatchNormalization", ["c", "s", "s", "s", "s"], ["n"]),
        _NODE("Add", ["n", "c"], ["y"]),
    ]
    weights = {"w": _weight(4, 3, 1, 1), "s": np.ones(4, np.float32)}
    assert _ops(_run(_program(nodes, weights, "y")).program)["BatchNormalization"] == 1


def test_large_equal_weights_are_stored_once_and_small_ones_apart() -> None:
    big = _weight(64, 3, 3, 3)
    weights = {"a": big, "b": big.copy(), "p": _weight(64), "q": _weight(64)}
    nodes = [
        _NODE("Conv", ["x", "a", "p"], ["c"]),
        _NODE("Conv", ["x", "b", "q"], ["d0"], dilations=[2, 2], pads=[1] * 4),
        _NODE("Add", ["c", "d0"], ["y"]),
    ]
    result = _run(_program(nodes, weights, "y"))
    assert sorted(t.name for t in result.program.body.graph.initializer) == ["a", "p", "q"]


def test_a_step_that_moves_the_outputs_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    def harm(model: onnx.ModelProto) -> onnx.ModelProto:
        model.graph.node[0].op_type = "Abs"
        return model

    def crash(model: onnx.ModelProto) -> onnx.ModelProto:
        raise RuntimeError("boom")

    steps = tuple(clean_graph._Step(f.__name__, f) for f in (harm, crash))
    monkeypatch.setattr(clean_graph, "_STEPS", steps)
    result = _run(_program([_NODE("Relu", ["x"], ["y"])], {}, "y"))
    assert _ops(result.program) == {"Relu": 1}
    assert [(n.where, n.what) for n in result.declined] == [("harm", "undone"), ("crash", "undone")]


@pytest.mark.skipif(not _FACES.is_dir(), reason="the face detector is not beside the project")
@pytest.mark.parametrize("name", ["version-RFB-320", "version-RFB-320_simplified"])
def test_face_detector(name: str, tmp_path: Path) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from PIL import Image

    original = freeze_shapes(from_file(_FACES / f"{name}.onnx"))
    result = _run(graph.program(original))
    model = result.program.body
    assert len(model.graph.input) == 1
    assert _ops(result.program)["BatchNormalization"] == 0
    assert graph.compare(original, model) < 1e-5

    picture = Image.open(_FACES / "1.jpg").convert("RGB").resize((320, 240))
    pixels = (np.asarray(picture, np.float32).transpose(2, 0, 1)[None] - 127) / 128

    class Once(CalibrationDataReader):  # type: ignore[misc]
        left = 1

        def get_next(self) -> dict[str, Array] | None:
            self.left -= 1
            return {"input": pixels} if self.left >= 0 else None

    (tmp_path / "clean.onnx").write_bytes(graph.canonical_bytes(model))
    quantize_static(
        tmp_path / "clean.onnx",
        tmp_path / "int8.onnx",
        Once(),
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
    )
    got = CpuSession(tmp_path / "int8.onnx").run({"input": pixels})
    assert got["boxes"].shape == (1, 4420, 4)
