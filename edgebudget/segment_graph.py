"""The graph behind an exported file, for files that are not ONNX themselves.

An engine's own format says little about what was lowered. Beside such a file lies
`<name>.graph.onnx`: the graph without its large tensors' values, whose shapes are enough to count
and to name inputs and outputs, and what the engine's compiler did with every node.

Imports onnx: reach this module only where a graph is at hand.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import onnx

from edgebudget import graph as graphs
from edgebudget.target import NodePlacement
from edgebudget_runtime.errors import ArtifactError

if TYPE_CHECKING:
    from edgebudget_runtime.manifest import Segment

_SUFFIX = ".graph.onnx"
_KEPT_BYTES = 4096  # shapes and the like keep their values, and so do all steps and zero points
_ROUND = frozenset({"QuantizeLinear", "DequantizeLinear"})
_LEFT_OUT = "left out"
_HASH, _NODES = "edgebudget.graph_sha256", "edgebudget.placement"


def graph_file(file: Path) -> Path:
    """Where the graph of an exported file is: itself, or beside it."""
    return file if file.suffix == ".onnx" else file.with_suffix(_SUFFIX)


def read_graph(file: Path, *, weights: bool = True) -> onnx.ModelProto:
    """The graph of an exported file; without values of large tensors where it lies beside it.

    `weights` False leaves external data of an ONNX file where it is.

    Raises:
        ArtifactError: EB510, it is missing or damaged.
    """
    source = graph_file(file)
    try:
        model: onnx.ModelProto = onnx.load_model(
            str(source), load_external_data=weights and source == file
        )
    except Exception as e:  # protobuf's DecodeError, which has no type stubs, and OSError
        raise ArtifactError(
            "EB510",
            f"{source.name} cannot be read: it is missing, truncated or not an ONNX file",
            hint="export the model again",
        ) from e
    return model


def read_segment_graph(folder: Path, segment: Segment) -> onnx.ModelProto:
    """The graph of an artifact's segment, whose file may hold several.

    Raises:
        ArtifactError: EB510, it is missing or damaged.
    """
    beside = [folder / f.file for f in segment.extra if f.file.endswith(_SUFFIX)]
    if not beside:
        return read_graph(folder / segment.file)
    return read_graph(beside[0], weights=False)


def write_description(
    model: onnx.ModelProto, file: Path, placed: Sequence[NodePlacement], *, whole: bool = False
) -> Path:
    """Write what `file` was lowered from, and where its nodes went, beside it.

    `whole` keeps all values, so that another engine can run the graph in the file's stead.
    """
    slim = onnx.ModelProto()
    slim.CopyFrom(model)
    steps = {n for node in slim.graph.node if node.op_type in _ROUND for n in node.input[1:]}
    for tensor in slim.graph.initializer:
        if not whole and tensor.ByteSize() > _KEPT_BYTES and tensor.name not in steps:
            _leave_out(tensor)
    slim.metadata_props.clear()
    facts = {
        _HASH: graphs.fingerprint(model),
        _NODES: json.dumps([asdict(n) for n in placed], sort_keys=True),
    }
    for key, value in facts.items():
        slim.metadata_props.add(key=key, value=value)
    result = graph_file(file)
    aside = result.with_name(f".{result.name}.part")
    aside.write_bytes(graphs.canonical_bytes(slim))
    return aside.replace(result)


def graph_hash(file: Path) -> str:
    """SHA-256 of the graph that `file` was lowered from, as an ONNX file with its weights.

    Raises:
        ArtifactError: EB510, the graph beside it is missing or damaged.
    """
    return _fact(file, _HASH)


def counted_where(file: Path) -> str:
    """What a count of an exported file was made on, for people.

    Raises:
        ArtifactError: EB510, the graph beside it is missing or damaged.
    """
    source = graph_file(file)
    if source == file:
        return file.name
    return f"{source.name}, the graph (SHA-256 {graph_hash(file)}) that {file.name} was made of"


def placed_nodes(file: Path) -> tuple[NodePlacement, ...]:
    """Where the compiler of the engine put every node.

    Raises:
        ArtifactError: EB510, the graph beside it is missing or damaged.
    """
    return tuple(NodePlacement(**n) for n in json.loads(_fact(file, _NODES)))


def _fact(file: Path, key: str) -> str:
    for prop in read_graph(file).metadata_props:
        if prop.key == key:
            return str(prop.value)
    raise ArtifactError(
        "EB510",
        f"{graph_file(file).name} does not say what {file.name} was made of",
        hint="export the model again",
    )


def _leave_out(tensor: onnx.TensorProto) -> None:
    kept = onnx.TensorProto(name=tensor.name, dims=tensor.dims, data_type=tensor.data_type)
    kept.data_location = onnx.TensorProto.EXTERNAL
    kept.external_data.add(key="location", value=_LEFT_OUT)
    tensor.CopyFrom(kept)
