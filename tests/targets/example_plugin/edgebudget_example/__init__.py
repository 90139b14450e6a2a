"""An example target outside edgebudget: a small CPU that runs ONNX's reference interpreter.

The interpreter is slow and needs no extra package, which makes it a good stand-in for the engine
of your device. Replace what is inside the methods; the comments say what each has to answer.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgebudget.target import Availability, Lowered, NodePlacement, Placement, TargetSpec
from edgebudget_runtime.cost import Figure
from edgebudget_runtime.errors import ArtifactError, UnsupportedError

if TYPE_CHECKING:
    from edgebudget.program import Program
    from edgebudget.workload import Array
    from edgebudget_runtime.budget import Statistic

_NOT_THERE = {"LSTM", "GRU"}  # say what your device cannot run


def make() -> ExampleTarget:
    """What the entry point names: called without arguments when the target is used."""
    return ExampleTarget()


class ExampleTarget:
    """Has the methods of `edgebudget.target.Target`; it need not inherit from anything."""

    # What passes need to know. `tells` lists the costs that have a figure here.
    spec = TargetSpec(
        name="cpu:example",
        family="cpu",
        engine="onnx-reference",
        device="ONNX's reference interpreter on this machine",
        channel_multiple=4,
        activation_dtypes=("uint8",),
        weight_dtypes=("int8",),
        float_fallback=True,
        max_fallback=0,
        tells=("latency_ms",),
    )

    def available(self) -> Availability:
        """Whether the engine is here, and if not how to get it. Import nothing heavy."""
        if find_spec("onnx") is None:
            why = "the package onnx is not installed"
            return Availability(ok=False, why=why, install='pip install "edgebudget[compile]"')
        return Availability(ok=True, version=version("onnx"))

    def lower(self, program: Program, folder: Path, name: str) -> Lowered:
        """Write what your engine loads. Equal programs must give equal bytes."""
        import onnx

        if program.stage != "graph" or not isinstance(program.body, onnx.ModelProto):
            raise UnsupportedError("EB241", "only a graph can be lowered", hint="add a plan")
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{name}.onnx"
        aside = folder / f".{name}.onnx.part"  # whole or not at all
        aside.write_bytes(program.body.SerializeToString(deterministic=True))
        return Lowered(aside.replace(file), notes=("lowered by the example plug-in",))

    def open(self, file: Path, *, exact: bool = False) -> _Loaded:
        """Load a segment for evaluation; `exact` asks for the device's own numbers."""
        return _Loaded(file)

    def placement(self, file: Path) -> Placement:
        """Where every node runs, with a reason for those that your processor does not take."""
        import onnx

        nodes = []
        for node in onnx.load_model(str(file)).graph.node:
            there = node.op_type not in _NOT_THERE
            why = "" if there else "this device has no recurrent operators"
            nodes.append(NodePlacement(node.name, node.op_type, "example" if there else "cpu", why))
        return Placement(tuple(nodes), "example")

    def latency(
        self,
        file: Path,
        inputs: Mapping[str, Array],
        repeats: int,
        *,
        statistic: Statistic = "p50",
    ) -> Figure:
        """Unknown is an honest answer; never return a number that nobody measured or modelled."""
        if statistic != "p50":
            return Figure(value=None, evidence="unknown", how="only the median is timed here")
        loaded, times = self.open(file), []
        for _ in range(max(3, min(repeats, 5))):
            began = time.perf_counter()
            loaded.run(inputs)
            times.append((time.perf_counter() - began) * 1e3)
        return Figure(
            value=statistics.median(times),
            evidence="measured",
            how=f"median of {len(times)} runs, ONNX reference {version('onnx')}",
            device=self.spec.device,
            count=len(times),
        )

    def compare(self, file: Path, other: Path, inputs: Mapping[str, Array]) -> float | None:
        """`file` over `other`; None where it cannot be told. Decides whether a step pays."""
        return None


class _Loaded:
    def __init__(self, file: Path) -> None:
        from onnx.reference import ReferenceEvaluator

        try:
            self._engine = ReferenceEvaluator(str(file))
        except Exception as e:  # whatever the engine raises becomes one clear error
            why = f"{file.name} cannot be loaded: {type(e).__name__}"
            raise ArtifactError("EB510", why, hint="`edgebudget inspect` checks the file") from e

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run N samples one by one: the file's batch is 1."""
        names: list[str] = list(self._engine.output_names)
        count = len(next(iter(inputs.values())))
        rows: list[Any] = [
            self._engine.run(names, {k: v[i : i + 1] for k, v in inputs.items()})
            for i in range(count)
        ]
        return {n: np.concatenate([row[k] for row in rows]) for k, n in enumerate(names)}
