"""What `inspect` knows about a model or an artifact, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebudget.counter import DEFINITION
from edgebudget.events import Emit, Finished, Started
from edgebudget_runtime.errors import EdgeBudgetError

if TYPE_CHECKING:
    from onnx import ModelProto

    from edgebudget_runtime.manifest import Manifest


def of_model(
    source: str, weights: Path | None, shape: tuple[int, ...] | None, emit: Emit
) -> dict[str, Any]:
    """Count a model on the graph it exports to."""
    from edgebudget.load_model import load_model

    loaded = load_model(source, weights=weights, input_shape=shape)
    program = loaded.program
    if program.stage == "module":
        from edgebudget.export import to_graph

        emit(Started("export"))
        program = to_graph(program, check=False)
        emit(Finished("export"))
    inputs = [{"name": s.name, "shape": list(s.shape), "dtype": s.dtype} for s in program.inputs]
    return {
        "kind": "model",
        "name": loaded.name,
        "definition": DEFINITION,
        "inputs": inputs,
        **_counted({"": program.body}, {}, None),
        "notes": [],
    }


def of_artifact(folder: Path) -> dict[str, Any]:
    """Check an artifact's files, and count its graphs where this machine can read them."""
    from edgebudget_runtime import integrity
    from edgebudget_runtime.manifest import Manifest

    manifest = Manifest.load(folder)
    integrity.verify(folder, manifest)
    path = [manifest.segment(i) for i in manifest.subnetworks[0].path]
    head = {
        "kind": "artifact",
        "name": manifest.name,
        "definition": DEFINITION,
        "inputs": [
            {"name": t.name, "shape": list(t.shape), "dtype": t.dtype} for t in path[0].inputs
        ],
        "target": manifest.target.name,
        "holds": manifest.holds,
    }
    if find_spec("onnx") is None:
        why = "counting the files again needs onnx, which is not installed"
        return {**head, **_recorded(manifest, why)}
    from edgebudget.segment_graph import read_segment_graph

    placed = manifest.placement
    elsewhere = {n.name: n.processor for n in placed.fallback} if placed else {}
    try:
        models = {s.id: read_segment_graph(folder, s) for s in path}
        counted = _counted(models, elsewhere, placed.processor if placed else None)
    except EdgeBudgetError as e:  # a context compiled for a device is opaque
        return {**head, **_recorded(manifest, e.what)}
    return {**head, **counted, "notes": list(manifest.notes)}


def _counted(
    models: Mapping[str, ModelProto], elsewhere: Mapping[str, str], processor: str | None
) -> dict[str, Any]:
    """Counts of graphs that run in order; `elsewhere` names the nodes not on `processor`.

    Weights of all stay resident; activations are those of the segment that needs most.
    """
    from edgebudget.count_onnx import count_graph
    from edgebudget.memory import plan_memory

    reports = {k: count_graph(v) for k, v in models.items()}
    plans = {k: plan_memory(v) for k, v in models.items()}
    peak = max(plans.values(), key=lambda p: p.peak_activation_bytes)
    weights = sum(p.weight_bytes for p in plans.values())
    macs = sum(r.macs for r in reports.values())
    return {
        "macs": macs,
        "flops": 2 * macs,
        "other_ops": sum(r.other_ops for r in reports.values()),
        "params": sum(r.params for r in reports.values()),
        "weight_bytes": weights,
        "memory": {
            "total_bytes": weights + peak.peak_activation_bytes,
            "weight_bytes": weights,
            "peak_activation_bytes": peak.peak_activation_bytes,
            "peak_at": peak.peak_at,
            "tensors": [{"name": n, "bytes": b} for n, b in peak.tensors],
        },
        "layers": [
            {
                "name": x.name,
                "op": x.op,
                "output_shape": list(x.output_shape),
                "dtype": x.output_dtype,
                "macs": x.macs,
                "other_ops": x.other_ops,
                "params": x.params,
                "weight_bytes": x.weight_bytes,
                "live_bytes": live.get(x.name),
                "processor": elsewhere.get(x.name, processor),
            }
            for key, report in reports.items()
            for live in [dict(plans[key].live)]
            for x in report.layers
        ],
    }


def _recorded(manifest: Manifest, why: str) -> dict[str, Any]:
    """What the compile counted, for a machine that cannot count again."""
    cost, layers = manifest.subnetworks[0].cost, manifest.layers_after
    placed = manifest.placement
    elsewhere = {n.name: n.processor for n in placed.fallback} if placed else {}
    macs = sum(x.macs for x in layers)
    unknown = dict.fromkeys(("output_shape", "other_ops", "weight_bytes", "live_bytes"))
    return {
        "macs": macs,
        "flops": 2 * macs,
        "other_ops": None,
        "params": sum(x.params for x in layers),
        "weight_bytes": None,
        "memory": None if cost.memory_bytes.value is None else {
            "total_bytes": cost.memory_bytes.value,
            "weight_bytes": None,
            "peak_activation_bytes": None,
            "peak_at": None,
            "tensors": [],
        },
        "layers": [
            {
                "name": x.name,
                "op": x.op,
                "dtype": x.dtype,
                "macs": x.macs,
                "params": x.params,
                "processor": elsewhere.get(x.name, placed.processor if placed else None),
                **unknown,
            }
            for x in layers
        ],
        "notes": [f"from the manifest: {why}", *manifest.notes],
    }  # fmt: skip
