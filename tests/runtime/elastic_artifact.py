"""A small artifact of several sub-networks: a chain of three segments, and a variant of two.

Segment number k of a chain adds `OFFSETS[id]` to every class score, which tells the answers
apart and leaves the probabilities alone: an input is as sure as its scores are far apart.
Hidden tensors are int8 in the chain, and float in the variant; the weights that two segments
share lie in a file of their own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgebudget_runtime import device_id, engine, integrity, profile
from edgebudget_runtime import manifest as m
from edgebudget_runtime.cost import Cost, Figure, counted
from edgebudget_runtime.errors import ArtifactError
from edgebudget_runtime.profile import Profile

Array = np.ndarray[Any, Any]

CLASSES = 3
STEP = 1.0 / 16.0  # of the int8 hidden tensors
OFFSETS = {"s0": 0.0, "s1": 100.0, "s2": 200.0, "t0": 1000.0, "t1": 2000.0}
MACS = {"s0": 10.0, "s1": 30.0, "s2": 60.0, "t0": 20.0, "t1": 30.0}
PATHS = {
    "exit1": ("s0",),
    "exit2": ("s0", "s1"),
    "full": ("s0", "s1", "s2"),
    "narrow1": ("t0",),
    "narrow": ("t0", "t1"),
}
QUALITY = {"exit1": 0.5, "exit2": 0.7, "full": 0.9, "narrow1": 0.6, "narrow": 0.8}
MS = {"s0": 1.0, "s1": 2.0, "s2": 4.0, "t0": 1.5, "t1": 2.0}  # of a made-up device
HALF = {"s0": 0.95, "s1": 0.9}  # thresholds of the operating point "half"


def sure(count: int = 1) -> Array:
    """Inputs [N, 3] that any exit is sure of."""
    x = np.zeros((count, CLASSES), np.float32)
    x[np.arange(count), np.arange(count) % CLASSES] = 7.0
    return x


def unsure(count: int = 1) -> Array:
    """Inputs [N, 3] that no exit is sure of."""
    return np.tile(np.array([[0.25, 0.125, 0.0]], np.float32), (count, 1))


def expected(x: Array, segment: str) -> Array:
    """The scores that a segment of the artifact gives."""
    steps = np.clip(np.round(x / STEP), -128, 127)
    hidden = x if segment.startswith("t") else steps * STEP
    scores: Array = (hidden + OFFSETS[segment]).astype(np.float32)
    return scores


def write(folder: Path, *, batch: int | None = 1) -> m.Manifest:
    """Write the artifact; `batch` is the batch dimension of every tensor, None for any."""
    (folder / "segments" / "weights").mkdir(parents=True)
    segments = tuple(_segment(folder, id, batch) for id in OFFSETS)
    manifest = _manifest(segments)
    manifest.save(folder)
    return manifest


def file_of(folder: Path, segment: str) -> Path:
    """The executable file of a segment."""
    return folder / "segments" / f"{segment}.onnx"


def _segment(folder: Path, id: str, batch: int | None) -> m.Segment:
    chain, index = id[0], int(id[1])
    kind = "int8" if chain == "s" else "float32"
    source = "x" if index == 0 else f"{chain}h{index - 1}"
    given = m.Tensor(source, (batch, CLASSES), "float32" if index == 0 else kind)
    made = [m.Tensor("scores", (batch, CLASSES), "float32")]
    if id not in {"s2", "t1"}:
        made.insert(0, m.Tensor(f"{chain}h{index}", (batch, CLASSES), kind))
    eye = np.eye(CLASSES, dtype=np.float32)
    weights = folder / "segments" / "weights" / f"{hashlib.sha256(eye.tobytes()).hexdigest()}.bin"
    weights.write_bytes(eye.tobytes())
    model = _model(id, given, made, f"weights/{weights.name}")
    path = file_of(folder, id)
    path.write_bytes(model.SerializeToString(deterministic=True))
    file = integrity.described(folder, path)
    extra = (integrity.described(folder, weights),)
    return m.Segment(id, file.file, file.sha256, file.bytes, (given,), tuple(made), extra, MACS[id])


def _model(id: str, given: m.Tensor, made: list[m.Tensor], weights: str) -> onnx.ModelProto:
    nodes, last = [], given.name
    if given.dtype == "int8":
        nodes.append(helper.make_node("DequantizeLinear", [last, "step", "zero"], ["in"]))
        last = "in"
    hidden = next((t for t in made if t.name != "scores"), None)
    if hidden is not None:
        whole = hidden.dtype == "int8"
        op, rest = ("QuantizeLinear", ["step", "zero"]) if whole else ("Identity", [])
        nodes.append(helper.make_node(op, [last, *rest], [hidden.name]))
        last = hidden.name
        if whole:
            nodes.append(helper.make_node("DequantizeLinear", [last, "step", "zero"], ["back"]))
            last = "back"
    nodes.append(helper.make_node("MatMul", [last, "eye"], ["product"]))
    nodes.append(helper.make_node("Add", ["product", "offset"], ["scores"]))
    eye = TensorProto(
        name="eye",
        dims=(CLASSES, CLASSES),
        data_type=TensorProto.FLOAT,
        data_location=TensorProto.EXTERNAL,
    )
    eye.external_data.add(key="location", value=weights)
    constants = [
        eye,
        numpy_helper.from_array(np.array(OFFSETS[id], np.float32), "offset"),
        numpy_helper.from_array(np.array(STEP, np.float32), "step"),
        numpy_helper.from_array(np.array(0, np.int8), "zero"),
    ]
    graph = helper.make_graph(nodes, id, [_info(given)], [_info(t) for t in made], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def _info(tensor: m.Tensor) -> onnx.ValueInfoProto:
    kind = TensorProto.INT8 if tensor.dtype == "int8" else TensorProto.FLOAT
    shape = ["n" if d is None else d for d in tensor.shape]
    return helper.make_tensor_value_info(tensor.name, kind, shape)


def _cost(path: tuple[str, ...], share: Mapping[str, float] | None = None) -> Cost:
    macs = sum(MACS[s] for s in path)
    if share is not None:
        ends = {s: sum(MACS[i] for i in path[: k + 1]) for k, s in enumerate(path)}
        macs = sum(share[s] * ends[s] for s in path)
    energy = Figure(value=macs * 0.01, evidence="modelled", how="10 uJ a MAC")
    return Cost(macs=counted(macs, "counted on the files"), energy_mj=energy)


def _quality(value: float) -> m.Quality:
    return m.Quality("top1", value, value - 0.02, value + 0.02, 1000)


def _manifest(segments: tuple[m.Segment, ...]) -> m.Manifest:
    full, shares = PATHS["full"], {"s0": 0.5, "s1": 0.3, "s2": 0.2}
    return m.Manifest(
        name="toy",
        target=m.TargetInfo("cpu", "onnxruntime-cpu", "x86_64"),
        workload=m.WorkloadInfo("toy", "classification", "top1", "ab" * 32),
        preprocessing={},
        segments=segments,
        subnetworks=tuple(
            m.SubNetwork(id, path, _cost(path), _quality(QUALITY[id]), _quality(0.91), {"path": id})
            for id, path in PATHS.items()
        ),
        limits=(),
        quality_limits=(),
        placement=None,
        baseline=m.Baseline(Cost()),
        passes=(),
        candidates=(),
        layers_before=(),
        layers_after=(),
        provenance=m.Provenance({}, 0),
        exits=tuple(m.Exit(id, "scores", "max_softmax", 1.0) for id in OFFSETS),
        operating_points=(
            m.OperatingPoint("half", full, HALF, shares, _cost(full, shares), _quality(0.88), None),
        ),
    )


class Machine:
    """A clock that only runs of segments move, `ms` each; `slow` adds to the next run of one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, ms: Mapping[str, float] = MS) -> None:
        self.now_s, self.ms, self.slow = 0.0, dict(ms), dict[str, float]()
        self.ran: list[str] = []
        self.fails: set[str] = set()
        self._real = engine.run_session
        monkeypatch.setattr(engine, "run_session", self._run)

    def __call__(self) -> float:
        return self.now_s

    def _run(self, session: Any, feed: Mapping[str, Array], *rest: Any) -> dict[str, Array]:
        id = session.get_modelmeta().graph_name
        self.ran.append(id)
        self.now_s += (self.ms[id] + self.slow.pop(id, 0.0)) / 1e3
        if id in self.fails:
            raise ArtifactError("EB509", f"{id} does not work", hint="")
        return self._real(session, feed, *rest)


def profile_of(folder: Path, ms: Mapping[str, float] = MS) -> Profile:
    """What a device knows whose segments always take `ms`."""
    return Profile(
        artifact=profile.digest(folder),
        device=device_id.here(engine.CPU, engine.VERSION, 1),
        samples_ms={s: (t,) * 200 for s, t in ms.items()},
    )
