"""A small artifact: two segments in one path."""

from __future__ import annotations

import os

# Tiny networks train slower on two threads than on one, above all where the machine is shared.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgebudget_runtime import integrity
from edgebudget_runtime import manifest as m
from edgebudget_runtime.cost import Cost, Figure, counted

WriteArtifact = Callable[[Path], m.Manifest]

_IMAGE = m.Tensor("image", (1, 3, 4, 4), "float32")
_MEANS = m.Tensor("means", (1, 3), "float32")
_SCORES = m.Tensor("scores", (1, 2), "float32")


@pytest.fixture
def write_artifact() -> WriteArtifact:
    """Fill a folder with a whole artifact."""
    return _write


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """A folder that holds a whole artifact."""
    folder = tmp_path / "toy"
    folder.mkdir()
    _write(folder)
    return folder


def _write(folder: Path) -> m.Manifest:
    (folder / "segments").mkdir(parents=True)
    pool = helper.make_node("GlobalAveragePool", ["image"], ["pooled"])
    flat = helper.make_node("Flatten", ["pooled"], ["means"])
    weight = numpy_helper.from_array(np.arange(6, dtype=np.float32).reshape(3, 2), "w")
    product = helper.make_node("MatMul", ["means", "w"], ["scores"])
    segments = (
        _segment(folder, "stem", [pool, flat], [], _IMAGE, _MEANS),
        _segment(folder, "head", [product], [weight], _MEANS, _SCORES),
    )
    manifest = _manifest(segments)
    manifest.save(folder)
    return manifest


def _segment(
    folder: Path,
    id: str,
    nodes: list[onnx.NodeProto],
    weights: list[onnx.TensorProto],
    given: m.Tensor,
    made: m.Tensor,
) -> m.Segment:
    graph = helper.make_graph(nodes, id, [_info(given)], [_info(made)], weights)
    opset = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=8)
    path = folder / "segments" / f"{id}.onnx"
    path.write_bytes(model.SerializeToString(deterministic=True))
    file = integrity.described(folder, path)
    return m.Segment(id, file.file, file.sha256, file.bytes, (given,), (made,))


def _info(tensor: m.Tensor) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(tensor.name, TensorProto.FLOAT, tensor.shape)


def _manifest(segments: tuple[m.Segment, ...]) -> m.Manifest:
    macs = counted(6, "counted on segments/*.onnx")
    latency = Figure(
        value=0.02, evidence="measured", how="median of 50 runs", device="x86_64", count=50
    )
    cost = Cost(macs=macs, params=counted(6, "counted"), latency_ms=latency)
    quality = m.Quality("top1", 0.9, 0.88, 0.92, 500, {"nll": 0.3}, "onnxruntime-cpu")
    return m.Manifest(
        name="toy",
        target=m.TargetInfo("cpu", "onnxruntime-cpu", "x86_64"),
        workload=m.WorkloadInfo("toy", "classification", "top1", "ab" * 32),
        preprocessing={
            "layout": "NCHW",
            "color": "RGB",
            "range": [0.0, 1.0],
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.25, 0.5],
            "resize": "shorter side to 4 (bilinear), centre crop 4x4",
        },
        segments=segments,
        subnetworks=(m.SubNetwork("main", ("stem", "head"), cost, quality, quality),),
        limits=(m.ProvenLimit("macs", 50.0, "max", macs, True),),
        quality_limits=(m.ProvenQuality("max_drop", 0.01, 0.0, True, "on 500 samples"),),
        placement=m.Placement(
            "npu", {"cpu": 1, "npu": 2}, (m.FallbackNode("erf", "Erf", "cpu", "not supported"),)
        ),
        baseline=m.Baseline(cost, quality),
        passes=(
            m.PassEntry(
                "fold_batchnorm",
                {"keep": ["a"], "bits": 8},
                7,
                cost,
                cost,
                (m.Note("conv1", "folded"),),
                (m.Note("conv2", "kept", "used twice"),),
            ),
        ),
        candidates=(m.Candidate("width 0.5", 3.0, 0.8), m.Candidate("width 1", 6.0, 0.9, True)),
        layers_before=(m.Layer("fc", "MatMul", 6.0, 6.0, "float32"),),
        layers_after=(m.Layer("fc", "MatMul", 6.0, 6.0, "int8"),),
        provenance=m.Provenance({"onnx": "1.21.0"}, 0, {"evaluation": "cd" * 32}),
        notes=("a note",),
    )
