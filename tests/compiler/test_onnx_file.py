"""Files that somebody else made: read when sound, refused with a reason when not."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edgebudget import graph
from edgebudget.onnx_file import freeze_shapes, from_file
from edgebudget.workload import Array
from edgebudget_runtime.errors import ArtifactError, EdgeBudgetError, UnsupportedError, UsageError

Dims = list[int | str | None]


def _model(
    shape: Dims | None = None, weight: Array | None = None, opset: int = 17
) -> onnx.ModelProto:
    """relu(conv(x)); the weight is [4, 3, 3, 3]."""
    if weight is None:
        weight = np.linspace(-1, 1, 108, dtype=np.float32).reshape(4, 3, 3, 3)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv", kernel_shape=[3, 3]),
        helper.make_node("Relu", ["c"], ["y"], name="relu"),
    ]
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape or [1, 3, 8, 8])
    made = helper.make_tensor_value_info("y", TensorProto.FLOAT, list("abcd"))
    body = helper.make_graph(nodes, "g", [given], [made], [numpy_helper.from_array(weight, "w")])
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def _save(folder: Path, model: onnx.ModelProto) -> Path:
    path = folder / "m.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def _external(location: str, offset: str = "0", length: str = "432") -> onnx.ModelProto:
    model = _model()
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=value)
    return model


def _code(path: Path, **options: int) -> str:
    with pytest.raises(EdgeBudgetError) as e:
        from_file(path, **options)
    assert path.name in e.value.what
    assert e.value.hint
    return e.value.code


def test_a_sound_file_is_read_whole(tmp_path: Path) -> None:
    model = from_file(_save(tmp_path, _model()))
    assert graph.compare(_model(), model) == 0


def test_external_weights_beside_the_model_are_embedded(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(b"\0" * 16 + _model().graph.initializer[0].raw_data)
    model = from_file(_save(tmp_path, _external("w.bin", offset="16")))
    assert graph.compare(_model(), model) == 0
    assert not model.graph.initializer[0].external_data


@pytest.mark.parametrize("keep", [0, 1, 100, 300, 500])
def test_truncated(tmp_path: Path, keep: int) -> None:
    path = _save(tmp_path, _model())
    path.write_bytes(path.read_bytes()[:keep])
    assert _code(path) == "EB530"


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=4))
def test_any_damage_is_read_or_refused(tmp_path: Path, damage: list[tuple[float, int]]) -> None:
    content = bytearray(_model().SerializeToString())
    for where, value in damage:
        content[int(where * len(content))] = value
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with suppress(EdgeBudgetError):
        graph.specs(freeze_shapes(from_file(path)))


@pytest.mark.parametrize("kind", [TensorProto.STRING, TensorProto.UNDEFINED, 99])
def test_inputs_hold_numbers(kind: int) -> None:
    model = _model()
    model.graph.input[0].type.tensor_type.elem_type = kind
    with pytest.raises(UnsupportedError, match="EB227"):
        graph.specs(model)


def _corrupt(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims[0] = 5


def _loop(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[0] = "y"


def _unknown(model: onnx.ModelProto) -> None:
    model.graph.node[1].op_type = "Rellu"


@pytest.mark.parametrize("damage", [_corrupt, _loop, _unknown])
def test_invalid(tmp_path: Path, damage: Callable[[onnx.ModelProto], None]) -> None:
    model = _model()
    damage(model)
    assert _code(_save(tmp_path, model)) == "EB530"


def test_missing_text_pickle_and_archive(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    assert _code(path) == "EB530"
    path.write_text("<html>not found</html>")
    assert _code(path) == "EB530"
    path.write_bytes(pickle.dumps({"weights": [1.0]}))
    assert _code(path) == "EB532"
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as z:
        z.writestr("data.pkl", b"")
    path.write_bytes(archive.getvalue())
    assert _code(path) == "EB532"


def test_oversized(tmp_path: Path) -> None:
    assert _code(_save(tmp_path, _model()), max_bytes=100) == "EB534"
    (tmp_path / "w.bin").write_bytes(bytes(432))
    assert _code(_save(tmp_path, _external("w.bin")), max_bytes=400) == "EB534"


@pytest.mark.parametrize(
    ("location", "offset", "length"),
    [
        ("../secret.bin", "0", "432"),
        ("/etc/hostname", "0", "1"),
        ("link.bin", "0", "432"),
        ("absent.bin", "0", "432"),
        ("w.bin", "0", "433"),
        ("w.bin", "-4", "8"),
        (".", "0", "1"),
    ],
)
def test_external_data_stays_in_the_folder(
    tmp_path: Path, location: str, offset: str, length: str
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(432))
    (folder / "w.bin").write_bytes(bytes(432))
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    assert _code(_save(folder, _external(location, offset, length))) == "EB531"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_must_be_finite(tmp_path: Path, value: float) -> None:
    weight = np.zeros((4, 3, 3, 3), np.float32)
    weight[1, 2] = value
    path = _save(tmp_path, _model(weight=weight))
    with pytest.raises(ArtifactError, match=r"EB533.*'w' has 9 NaN or infinite values of 108"):
        from_file(path)


def test_old_operator_sets_are_raised(tmp_path: Path) -> None:
    model = from_file(_save(tmp_path, _model(opset=9)))
    assert graph.opset(model) == 17
    assert graph.compare(_model(opset=9), model) == 0


def test_foreign_operators_are_refused(tmp_path: Path) -> None:
    model = _model()
    model.opset_import.append(helper.make_opsetid("acme", 1))
    model.graph.node[1].domain = "acme"
    with pytest.raises(UnsupportedError, match=r"EB225.*acme"):
        from_file(_save(tmp_path, model))


def test_batch_becomes_one_and_shapes_are_derived() -> None:
    frozen = freeze_shapes(_model(["batch", 3, 8, 8]))
    assert graph.specs(frozen)[0].shape == (1, 3, 8, 8)
    assert graph.shapes(frozen)["y"] == (1, 4, 6, 6)


def test_given_shapes_fill_symbols() -> None:
    frozen = freeze_shapes(_model(["n", 3, "h", "w"]), {"x": (2, 3, 10, 12)})
    assert graph.shapes(frozen)["y"] == (2, 4, 8, 10)


@pytest.mark.parametrize(
    ("shape", "asked", "code"),
    [
        (["n", 3, "h", "w"], {}, "EB150"),
        ([1, 3, None, 8], {}, "EB150"),
        ([1, 3, 8, 8], {"x": (1, 3, 9, 8)}, "EB151"),
        (["n", 3, "h", "w"], {"x": (1, 3, 8)}, "EB151"),
        (["n", 3, "s", "s"], {"x": (1, 3, 8, 9)}, "EB151"),
        (["n", 3, "h", "w"], {"X": (1, 3, 8, 8)}, "EB152"),
    ],
)
def test_shapes_that_cannot_be_resolved(
    shape: Dims, asked: dict[str, tuple[int, ...]], code: str
) -> None:
    with pytest.raises(UsageError) as e:
        freeze_shapes(_model(shape), asked)
    assert e.value.code == code
    assert e.value.hint
