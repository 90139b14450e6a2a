"""Parts of a manifest that artifacts of one and of several sub-networks have in common."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebudget_runtime import manifest as m
from edgebudget_runtime.integrity import sha256

if TYPE_CHECKING:
    from edgebudget.program import Note, PassRecord, Program
    from edgebudget.target import Lowered, Placement
    from edgebudget.workload import Quality, Workload

_PACKAGES = (
    "edgebudget",
    "executorch",
    "numpy",
    "onnx",
    "onnx-ir",
    "onnxruntime",
    "onnxruntime-qnn",
    "onnxscript",
    "scipy",
    "torch",
    "torch-pruning",
    "torchao",
)


def versions() -> dict[str, str]:
    """Versions of everything that decides the bytes of a result."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def segment(folder: Path, lowered: Lowered, id: str, macs: float) -> m.Segment:
    """An exported file and what goes with it; `macs` of one run."""
    from onnx import TensorProto, helper

    from edgebudget.segment_graph import read_graph

    graph = read_graph(lowered.file, weights=False).graph
    weights = {t.name for t in graph.initializer}

    def tensor(value: Any) -> m.Tensor:
        kind = value.type.tensor_type
        shape = tuple(d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim)
        assert kind.elem_type != TensorProto.UNDEFINED
        dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type).name
        return m.Tensor(value.name, shape, dtype)

    def relative(path: Path) -> str:
        return path.relative_to(folder).as_posix()

    file = lowered.file
    return m.Segment(
        id=id,
        file=relative(file),
        sha256=sha256(file),
        bytes=file.stat().st_size,
        inputs=tuple(tensor(v) for v in graph.input if v.name not in weights),
        outputs=tuple(tensor(v) for v in graph.output),
        macs=macs,
        extra=tuple(m.File(relative(x), sha256(x), x.stat().st_size) for x in lowered.extra),
        max_batch=lowered.max_batch,
    )


def runtime(file: Path) -> str:
    """The name of the engine that reads such a file."""
    return "ExecuTorch" if file.suffix == ".pte" else "ONNX Runtime"


def quality(found: Quality | None, how: str) -> m.Quality | None:
    """A quality, and how it was found."""
    if found is None:
        return None
    q = found
    return m.Quality(q.metric, q.value, q.low, q.high, q.count, dict(q.others), how)


def placement(found: Placement) -> m.Placement:
    """How many nodes run where, and why some do not run where they should."""
    counts: dict[str, int] = {}
    for node in found.nodes:
        counts[node.processor] = counts.get(node.processor, 0) + 1
    fallback = tuple(m.FallbackNode(n.name, n.op, n.processor, n.why) for n in found.fallback)
    return m.Placement(found.processor, counts, fallback)


def entry(record: PassRecord) -> m.PassEntry:
    """What one step did."""

    def notes(found: tuple[Note, ...]) -> tuple[m.Note, ...]:
        return tuple(m.Note(n.where, n.what, n.why) for n in found)

    return m.PassEntry(
        name=record.name,
        config=record.config,
        seed=record.seed,
        before=record.before,
        after=record.after,
        did=notes(record.did),
        declined=notes(record.declined),
        undone=record.undone,
    )


def layers(program: Program) -> tuple[m.Layer, ...]:
    """The layers that cost something."""
    from edgebudget.counter import count

    return tuple(
        m.Layer(x.name, x.op, float(x.macs), float(x.params), x.output_dtype)
        for x in count(program).layers
        if x.macs or x.params
    )


def digests(workload: Workload) -> dict[str, str]:
    """What the data was, by role."""
    data = workload.data
    sets = {"calibration": data.calibration, "train": data.train, "evaluation": data.evaluation}
    return {k: d.digest() for k, d in sets.items() if d is not None}
