"""Put the files of two one-path artifacts into one folder, under one set of names."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from edgebudget_runtime import integrity
from edgebudget_runtime import manifest as m
from edgebudget_runtime.cost import UNKNOWN, Cost, Figure, counted
from edgebudget_runtime.errors import UsageError

SMALL, LARGE = "small", "large"  # segments of the joined artifact


@dataclass(frozen=True, slots=True)
class Part:
    """One of the two artifacts."""

    folder: Path
    manifest: m.Manifest

    @staticmethod
    def load(folder: Path) -> Part:
        """Read and check an artifact.

        Raises:
            ArtifactError: EB500 to EB507, it is not whole.
            UsageError: EB191, it is not of one path.
        """
        manifest = m.Manifest.load(folder)
        integrity.verify(folder, manifest)
        if len(manifest.subnetworks) != 1 or len(manifest.segments) != 1:
            raise UsageError(
                "EB191",
                f"{folder} has {len(manifest.subnetworks)} sub-networks of "
                f"{len(manifest.segments)} segments",
                hint="a cascade joins artifacts of one path: compile without --elastic",
            )
        return Part(folder, manifest)

    @property
    def segment(self) -> m.Segment:
        """Its only segment."""
        return self.manifest.segments[0]

    @property
    def cost(self) -> Cost:
        """What one answer costs."""
        return self.manifest.subnetworks[0].cost

    @property
    def macs(self) -> float:
        """MACs of one answer."""
        assert self.cost.macs.value is not None, "MACs are always counted"
        return self.cost.macs.value


def check_fit(small: Part, large: Part) -> None:
    """Refuse two artifacts that do not answer the same inputs in the same way.

    Raises:
        UsageError: EB190.
    """
    a, b = small.segment, large.segment
    same = {
        "target": (small.manifest.target.name, large.manifest.target.name),
        "task": (small.manifest.workload.task, large.manifest.workload.task),
        "input": tuple([(list(t.shape), t.dtype) for t in s.inputs] for s in (a, b)),
        "output": tuple([(list(t.shape), t.dtype) for t in s.outputs] for s in (a, b)),
        "preprocessing": (small.manifest.preprocessing, large.manifest.preprocessing),
    }
    for what, (mine, theirs) in same.items():
        if mine != theirs:
            raise UsageError(
                "EB190",
                f"{small.folder} and {large.folder} differ in {what}: {mine} and {theirs}",
                hint="compile both for one target, from models of one input and one set of classes",
            )
    if len(b.outputs) != 1:
        raise UsageError(
            "EB190",
            f"the models have {len(b.outputs)} outputs",
            hint="a cascade routes by one output, the class scores",
        )
    if small.macs >= large.macs:
        raise UsageError(
            "EB190",
            f"{small.folder} takes {small.macs:.4g} MACs, {large.folder} {large.macs:.4g}",
            hint="name the cheaper one first",
        )


def copy_both(parts: tuple[Part, Part], folder: Path) -> tuple[m.Segment, ...]:
    """Both models' files, each under its own folder; the large one takes the small one's names.

    Raises:
        UsageError: EB190, the large one's compiled files would have to be renamed.
    """
    small, large = (part.segment for part in parts)
    names = {
        theirs.name: ours.name
        for ours, theirs in zip(
            (*small.inputs, *small.outputs), (*large.inputs, *large.outputs), strict=True
        )
        if ours.name != theirs.name
    }
    if names and large.extra:
        raise UsageError(
            "EB190",
            f"the large model calls {next(iter(names))!r} what the small one calls "
            f"{next(iter(names.values()))!r}, and its compiled files cannot be renamed",
            hint="compile both from models whose inputs and outputs have the same names",
        )
    found = []
    for part, name, own in zip(parts, (SMALL, LARGE), ({}, names), strict=True):
        files: list[m.File] = []
        for file in part.segment.files():
            path = folder / name / file.file
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(integrity.locate(part.folder, file.file), path)
            if own and not files:
                _rename(path, own)
            files.append(integrity.described(folder, path))
        first = files[0]
        found.append(
            replace(
                part.segment,
                id=name,
                file=first.file,
                sha256=first.sha256,
                bytes=first.bytes,
                inputs=small.inputs,
                outputs=small.outputs,
                extra=tuple(files[1:]),
                macs=part.macs,
            )
        )
    return tuple(found)


def _rename(file: Path, names: Mapping[str, str]) -> None:
    """Give values of a graph other names; whatever has one of those now makes way."""
    import onnx

    from edgebudget import graph

    model = onnx.load_model(str(file))
    body = model.graph
    values = [*body.input, *body.output, *body.value_info, *body.initializer]
    used = {v.name for v in values} | {o for n in body.node for o in n.output} | set(names.values())
    new = dict(names)
    for name in names.values():
        new.setdefault(name, graph.unique(name, used))
    for value in values:
        value.name = new.get(value.name, value.name)
    for node in body.node:
        node.input[:] = [new.get(x, x) for x in node.input]
        node.output[:] = [new.get(x, x) for x in node.output]
    file.write_bytes(graph.canonical_bytes(model))


def both_costs(small: Cost, large: Cost) -> Cost:
    """What asking both costs. Medians of two latencies do not add up to a median: unknown."""

    def total(a: Figure, b: Figure, how: str) -> Figure:
        if a.value is None or b.value is None:
            return UNKNOWN
        return counted(a.value + b.value, how)

    memory = total(small.memory_bytes, large.memory_bytes, "")
    return Cost(
        macs=total(small.macs, large.macs, "counted on both files"),
        params=total(small.params, large.params, "initializers of both files"),
        size_bytes=total(small.size_bytes, large.size_bytes, "bytes of both files"),
        memory_bytes=UNKNOWN
        if memory.value is None
        else replace(memory, evidence="modelled", how="sum of both, each at its own peak"),
        fallback_nodes=total(small.fallback_nodes, large.fallback_nodes, "nodes of both files"),
    )
