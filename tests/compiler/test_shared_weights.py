"""Weights stored once beside the segments, and never read from anywhere else."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edgebudget import graph as graphs
from edgebudget import shared_weights
from edgebudget.session import CpuSession
from edgebudget_runtime.cost import Cost
from edgebudget_runtime.elastic import Sharing
from edgebudget_runtime.errors import ArtifactError
from edgebudget_runtime.manifest import File, Segment, SubNetwork
from tests.passes.quant_nets import Net

SHAPE = (1, 8, 4, 4)


def model(seed: int = 0, more: int = 0) -> onnx.ModelProto:
    """A convolution whose weight is a file of its own, and `more` of other values."""
    net = Net(SHAPE, seed)
    x = net.conv("x", 8, 8)
    net.rng = np.random.default_rng(seed + 100)
    for _ in range(more):
        x = net.conv(x, 8, 8)
    return net.model(x)


@settings(deadline=None, derandomize=True, max_examples=30)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["float32", "float16", "int8", "uint16", "int64", "bool"]),
            st.integers(0, 2000),
            st.booleans(),
        ),
        max_size=4,
    )
)
def test_what_is_read_back_is_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, tensors: list[tuple[str, int, bool]]
) -> None:
    folder = tmp_path_factory.mktemp("weights")
    whole = model()
    for i, (dtype, size, packed) in enumerate(tensors):
        value = np.arange(size).astype(dtype)
        tensor = numpy_helper.from_array(value, f"t{i}")
        if not packed and dtype == "float32":  # the older form, without raw bytes
            tensor = helper.make_tensor(f"t{i}", TensorProto.FLOAT, [size], value.tolist())
        whole.graph.initializer.append(tensor)
    used = shared_weights.write(whole, folder / "s0.onnx")
    back = shared_weights.read(folder / "s0.onnx")
    assert shared_weights.files(folder / "s0.onnx") == used
    assert [t.name for t in back.graph.initializer] == [t.name for t in whole.graph.initializer]
    for was, now in zip(whole.graph.initializer, back.graph.initializer, strict=True):
        a, b = numpy_helper.to_array(was), numpy_helper.to_array(now)
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    for path in used:
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.stem
        assert path.stat().st_size >= shared_weights.SMALLEST
    assert (folder / "s0.onnx").stat().st_size < 3000 + 4 * shared_weights.SMALLEST


def test_the_engine_loads_a_segment_by_its_path_and_answers_the_same(tmp_path: Path) -> None:
    whole, file = model(more=2), tmp_path / "segments" / "s0.onnx"
    assert len(shared_weights.write(whole, file)) == 3
    x = np.random.default_rng(0).random(SHAPE, np.float32)
    (wanted,) = graphs.run(whole, {"x": x}).values()
    (found,) = CpuSession(file).run({"x": x}).values()
    np.testing.assert_array_equal(found, wanted)


def test_segments_share_equal_weights_and_writing_again_changes_nothing(tmp_path: Path) -> None:
    shared_weights.write(model(), tmp_path / "s0.onnx")
    shared_weights.write(model(more=1), tmp_path / "s1.onnx")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert len(before) == 2 + 2, "the first convolution's weight is stored once"
    shared_weights.share(tmp_path / "s1.onnx")
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_a_damaged_file_that_lies_there_is_written_anew(tmp_path: Path) -> None:
    (weight,) = shared_weights.write(model(), tmp_path / "s0.onnx")
    weight.write_bytes(bytes(weight.stat().st_size))
    shared_weights.write(model(), tmp_path / "s0.onnx")
    assert graphs.fingerprint(shared_weights.read(tmp_path / "s0.onnx"))


def test_a_segment_that_carries_its_weights_is_read_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "s0.onnx").write_bytes(graphs.canonical_bytes(model()))
    assert shared_weights.files(tmp_path / "s0.onnx") == ()
    assert shared_weights.read(tmp_path / "s0.onnx") == model()


def cut_short(weight: Path) -> None:
    weight.write_bytes(weight.read_bytes()[:-1])


def altered(weight: Path) -> None:
    data = bytearray(weight.read_bytes())
    data[7] ^= 1
    weight.write_bytes(data)


def linked(weight: Path) -> None:
    weight.rename(weight.parent.parent / "elsewhere")
    weight.symlink_to(weight.parent.parent / "elsewhere")


def folder_linked(weight: Path) -> None:
    weight.parent.rename(weight.parent.parent / "elsewhere")
    weight.parent.symlink_to(weight.parent.parent / "elsewhere")


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (Path.unlink, "EB531"),
        (linked, "EB531"),
        (folder_linked, "EB531"),
        (cut_short, "EB535"),
        (altered, "EB535"),
    ],
)
def test_damaged_weights_are_refused(
    tmp_path: Path, damage: Callable[[Path], None], code: str
) -> None:
    (weight,) = shared_weights.write(model(), tmp_path / "s0.onnx")
    damage(weight)
    with pytest.raises(ArtifactError) as error:
        shared_weights.read(tmp_path / "s0.onnx")
    assert error.value.code == code


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("location", "../secret.bin"),
        ("location", "/etc/passwd"),
        ("location", "weights/../../secret.bin"),
        ("location", f"weights/{'0' * 64}.bin"),
        ("location", ""),
        ("offset", "-8"),
        ("offset", "8"),
    ],
)
def test_no_other_file_is_read(tmp_path: Path, key: str, value: str) -> None:
    (tmp_path / "secret.bin").write_bytes(bytes(8 * 8 * 9 * 4))
    file = tmp_path / "segments" / "s0.onnx"
    shared_weights.write(model(), file)
    lean = onnx.load_model(file, load_external_data=False)
    (entry,) = (e for e in lean.graph.initializer[0].external_data if e.key == key)
    entry.value = value
    file.write_bytes(lean.SerializeToString())
    with pytest.raises(ArtifactError) as error:
        shared_weights.read(file)
    assert error.value.code == "EB531"


@pytest.mark.parametrize("content", [None, b"", b"no model", b"\x08\x0a"])
def test_a_segment_that_is_no_model_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "s0.onnx").write_bytes(content)
    with pytest.raises(ArtifactError) as error:
        shared_weights.read(tmp_path / "s0.onnx")
    assert error.value.code == "EB530"


def test_sharing_counts_each_file_once_and_no_compiled_form() -> None:
    def file(name: str, size: int) -> File:
        return File(f"segments/{name}", "a" * 64, size)

    def segment(id: str, size: int, *extra: File) -> Segment:
        return Segment(id, f"segments/{id}.onnx", "a" * 64, size, (), (), extra)

    a, b, c = (file(f"weights/{n}.bin", s) for n, s in (("a", 100), ("b", 200), ("c", 400)))
    compiled = file("s0_ctx.onnx", 9999)
    segments = [segment("s0", 1, a, compiled), segment("s1", 2, a, b), segment("w", 4, b, c)]
    paths = {"exit1": ("s0",), "exit2": ("s0", "s1"), "wide": ("w",)}
    subs = [SubNetwork(k, p, Cost(), None, None) for k, p in paths.items()]
    assert shared_weights.sharing(segments, subs) == Sharing(
        stored_bytes=1 + 2 + 4 + 700, separate_bytes=101 + 303 + 604, largest_bytes=604
    )
