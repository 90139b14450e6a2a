"""Segments whose large weights lie beside them, each stored once whoever uses it.

A weight is a file of its own, named after the SHA-256 of its bytes, in a folder `weights` beside
the segments (ONNX Runtime refuses data that lies above the model's folder). The same integers
then have the same name in every segment and every sub-network, whatever the tensor is called.
Small tensors (scales, zero points, shapes) stay inside the model. One file for each weight loads
as fast as packing them: 60 convolutions took 9.5 ms apart, 8.7 ms in one file, 7.8 ms embedded
(ONNX Runtime 1.31.1), and nothing else lets sub-networks share some weights and not others.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from onnx import ModelProto, TensorProto, external_data_helper, numpy_helper

from edgebudget import graph
from edgebudget.onnx_shapes import TensorInfo, dtype_name
from edgebudget.segment_graph import read_graph
from edgebudget_runtime.elastic import Sharing
from edgebudget_runtime.errors import ArtifactError

if TYPE_CHECKING:
    from edgebudget_runtime.manifest import File, Segment, SubNetwork

FOLDER = "weights"
SMALLEST = 1024  # bytes; what is smaller stays in the model
_LOCATION = re.compile(rf"{FOLDER}/([0-9a-f]{{64}})\.bin")
_AGAIN = "the artifact is damaged; copy it again or compile again"


def write(model: ModelProto, file: Path) -> tuple[Path, ...]:
    """Write a model with embedded weights; those of `SMALLEST` bytes or more become files.

    Each file appears whole or not at all, and the model last. Weights that are there already are
    left as they are.

    Returns:
        The weights files that the model reads, each once, in the order of first use.
    """
    lean = ModelProto()
    lean.CopyFrom(model)
    used: dict[str, Path] = {}
    for tensor in lean.graph.initializer:
        data = _raw(tensor)
        if data is None or len(data) < SMALLEST:
            continue
        digest = hashlib.sha256(data).hexdigest()
        used[digest] = path = file.parent / FOLDER / f"{digest}.bin"
        if not path.is_file() or path.read_bytes() != data:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_whole(path, data)
        _point(tensor, f"{FOLDER}/{digest}.bin", len(data))
    file.parent.mkdir(parents=True, exist_ok=True)
    _write_whole(file, graph.canonical_bytes(lean))
    return tuple(used.values())


def share(file: Path) -> tuple[Path, ...]:
    """Move the weights of a segment that a target has written out of it; see `write`, `read`.

    Files of another format keep theirs.
    """
    return write(read(file), file) if _is_onnx(file) else ()


def read(file: Path) -> ModelProto:
    """Read a segment with its weights embedded, for counting or for engines that need one file.

    For a file of another format it is the graph that this was made of, without large weights.

    Raises:
        ArtifactError: EB530 the file is no ONNX model, EB531 a weights file is missing or named
            otherwise than `write` does, EB535 a weights file holds something else.
    """
    if not _is_onnx(file):
        return read_graph(file)
    model = _parsed(file)
    for tensor in graph.tensors(model.graph):
        if not external_data_helper.uses_external_data(tensor):
            continue
        tensor.raw_data = _checked(tensor, _place(tensor, file))
        tensor.data_location = TensorProto.DEFAULT
        tensor.ClearField("external_data")
    return model


def files(file: Path) -> tuple[Path, ...]:
    """The weights files that a segment reads, each once, in the order of first use.

    Raises:
        ArtifactError: EB530 and EB531, as `read`; their content is not looked at.
    """
    if not _is_onnx(file):
        return ()
    found = [
        _place(t, file)
        for t in graph.tensors(_parsed(file).graph)
        if external_data_helper.uses_external_data(t)
    ]
    return tuple(dict.fromkeys(found))


def sharing(segments: Iterable[Segment], subnetworks: Iterable[SubNetwork]) -> Sharing:
    """What sub-networks have in common, in bytes of models and weights.

    Compiled contexts are left out: they are another form of the same segments.
    """
    known = {s.id: _deployed(s) for s in segments}
    paths = [{f for id in sub.path for f in known[id]} for sub in subnetworks]
    sizes = [_total(p) for p in paths]
    return Sharing(
        stored_bytes=_total({f for p in paths for f in p}),
        separate_bytes=sum(sizes),
        largest_bytes=max(sizes, default=0),
    )


def _is_onnx(file: Path) -> bool:
    return file.suffix == ".onnx"


def _deployed(segment: Segment) -> tuple[File, ...]:
    first, *extra = segment.files()
    return (first, *(f for f in extra if Path(f.file).parent.name == FOLDER))


def _total(found: Iterable[File]) -> int:
    return sum(f.bytes for f in found)


def _raw(tensor: TensorProto) -> bytes | None:
    """A tensor's bytes as the engine maps them; None for text, which has no such form."""
    if tensor.data_type == TensorProto.STRING:
        return None
    if not tensor.HasField("raw_data"):
        tensor = numpy_helper.from_array(numpy_helper.to_array(tensor))
    return tensor.raw_data


def _point(tensor: TensorProto, location: str, length: int) -> None:
    kept = TensorProto(
        name=tensor.name,
        data_type=tensor.data_type,
        dims=tensor.dims,
        data_location=TensorProto.EXTERNAL,
    )
    where = {"location": location, "offset": "0", "length": str(length)}
    for key, value in where.items():
        kept.external_data.add(key=key, value=value)
    tensor.CopyFrom(kept)


def _write_whole(path: Path, data: bytes) -> None:
    aside = path.with_name(f".{path.name}.part")
    aside.write_bytes(data)
    aside.replace(path)


def _parsed(file: Path) -> ModelProto:
    model = ModelProto()
    try:
        model.ParseFromString(file.read_bytes())
    except Exception as e:  # protobuf's DecodeError, which has no type stubs, and OSError
        raise ArtifactError(
            "EB530", f"{file.name} cannot be read: it is missing or no ONNX file", hint=_AGAIN
        ) from e
    if not model.graph.node:
        raise ArtifactError("EB530", f"{file.name} holds no graph", hint=_AGAIN)
    return model


def _place(tensor: TensorProto, file: Path) -> Path:
    """The file of an external tensor; only what `write` writes is followed."""
    where: Mapping[str, str] = {e.key: e.value for e in tensor.external_data}
    location, offset = where.get("location", ""), where.get("offset", "0")
    path = file.parent / location
    plain = _LOCATION.fullmatch(location) and offset == "0"
    if not plain or path.is_symlink() or path.parent.is_symlink() or not path.is_file():
        raise ArtifactError(
            "EB531",
            f"{file.name}: the weights {location!r} of {tensor.name!r} are no file of its folder",
            hint=_AGAIN,
        )
    return path


def _checked(tensor: TensorProto, path: Path) -> bytes:
    """The content of a weights file, if it is what its name and the tensor say."""
    size = path.stat().st_size
    wanted = TensorInfo(tuple(tensor.dims), dtype_name(tensor.data_type)).nbytes
    if size != wanted:  # before it is read: a foreign file may be of any size
        raise ArtifactError(
            "EB535",
            f"{path.name} has {size} bytes, the tensor {tensor.name!r} {wanted}",
            hint=_AGAIN,
        )
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != path.stem:
        raise ArtifactError("EB535", f"{path.name} is not the file of that hash", hint=_AGAIN)
    return data
