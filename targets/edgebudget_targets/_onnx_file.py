"""Writing a segment: the same program gives the same bytes, and nothing but the graph is in it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edgebudget_runtime.errors import ArtifactError, UnsupportedError

if TYPE_CHECKING:
    import onnx

    from edgebudget.program import Program

_MAX_BYTES = 2**31 - 1  # protobuf's own limit


def read_segment(file: Path, *, weights: bool = True) -> onnx.ModelProto:
    """Load an exported file; `weights` False leaves external data where it is.

    Raises:
        ArtifactError: EB510, it is missing or no ONNX file.
    """
    import onnx

    try:
        return onnx.load_model(file, load_external_data=weights)
    except Exception as e:  # protobuf's DecodeError, which has no type stubs, and OSError
        raise ArtifactError(
            "EB510",
            f"{file.name} cannot be read: it is missing, truncated or not an ONNX file",
            hint="export the model again",
        ) from e


def write_segment(program: Program, folder: Path, name: str) -> Path:
    """Write a graph-stage program as `<name>.onnx`, whole or not at all.

    Raises:
        UnsupportedError: EB241 the program is no graph, EB242 it is larger than 2 GiB.
    """
    import onnx

    if program.stage != "graph" or not isinstance(program.body, onnx.ModelProto):
        raise UnsupportedError(
            "EB241",
            f"a {program.stage}-stage program cannot be lowered",
            hint="let the plan export it to a graph first",
        )
    if program.body.ByteSize() > _MAX_BYTES:
        raise UnsupportedError(
            "EB242",
            f"the graph takes {program.body.ByteSize()} bytes, above ONNX's limit of 2 GiB",
            hint="compile a smaller model, or quantize it",
        )
    model = onnx.ModelProto()
    model.CopyFrom(program.body)
    _strip(model)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.onnx"
    aside = folder / f".{name}.onnx.part"
    aside.write_bytes(model.SerializeToString(deterministic=True))
    return aside.replace(file)


def _strip(model: onnx.ModelProto) -> None:
    """Remove what no engine reads; some of it (exporter traces, paths) differs between runs."""
    model.doc_string = ""
    model.producer_name = "edgebudget"
    model.producer_version = ""
    model.metadata_props.clear()
    for function in model.functions:
        function.doc_string = ""
    _strip_graph(model.graph)


def _strip_graph(graph: onnx.GraphProto) -> None:
    graph.doc_string = ""
    graph.metadata_props.clear()
    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        value.doc_string = ""
        value.metadata_props.clear()
    for node in graph.node:
        node.doc_string = ""
        node.metadata_props.clear()
        for attribute in node.attribute:
            attribute.doc_string = ""
            if attribute.HasField("g"):
                _strip_graph(attribute.g)
            for inner in attribute.graphs:
                _strip_graph(inner)
