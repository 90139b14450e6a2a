"""Several Qualcomm SoCs as one target: one artifact, one compiled file, every SoC checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgebudget.target import Availability, Executor, Lowered, Placement
from edgebudget_runtime.cost import Figure
from edgebudget_runtime.errors import TargetError
from edgebudget_targets import _hexagon_limits
from edgebudget_targets._onnx_file import write_segment

if TYPE_CHECKING:
    import onnx

    from edgebudget.program import Program
    from edgebudget.workload import Array
    from edgebudget_runtime.budget import Statistic
    from edgebudget_targets.onnxruntime_qnn import HexagonTarget


class SeveralSocs:
    """The NPUs of several SoCs; a figure is that of the worst, and unknown where one is."""

    def __init__(self, members: Sequence[HexagonTarget]) -> None:
        self._members = tuple(members)
        first = self._members[0].spec
        names = [m.spec.name.rpartition("/")[2] for m in self._members]
        self.spec = replace(
            first,
            name=f"{first.name.rpartition('/')[0]}/{'+'.join(names)}",
            device="; ".join(m.spec.device for m in self._members),
            # Of the options, passes read those that all members share.
            options={**first.options, **_joined(self._members)},
        )

    def available(self) -> Availability:
        """One engine serves every SoC."""
        return self._members[0].available()

    def lower(self, program: Program, folder: Path, name: str) -> Lowered:
        """Write `<name>.onnx`, and `<name>_ctx.onnx` with compiled forms for every SoC.

        The emulator cannot load a file of several SoCs: what is loaded is the compiled form of
        each SoC alone, made by the same compiler from the same graph, which is not kept.

        Raises:
            UnsupportedError: EB241 the program is no graph, EB242 it is larger than 2 GiB, EB248
                one SoC's compiler is known to fail on an operator.
        """
        if program.stage == "graph":
            for member in self._members:
                _hexagon_limits.check(program.body, member.spec)
        file = write_segment(program, folder, name)
        context = folder / f"{name}_ctx.onnx"
        try:
            for member in self._members:
                member.emulator.compile(file, context)
            context.unlink()
            socs = {m.spec.options["soc_model"]: m.spec.options["arch"] for m in self._members}
            self._members[0].emulator.compile(file, context, socs=socs)
        except TargetError as e:
            context.unlink(missing_ok=True)
            return Lowered(file, notes=(f"no compiled context: {e.what}",))
        note = (
            f"{context.name} is compiled for {self.spec.device}; the emulator cannot load a file "
            "of several SoCs, it loaded each SoC's own. The vendor's tool writes the time into it: "
            "equal compiles differ in those bytes"
        )
        return Lowered(file, (context,), (note,))

    def open(self, file: Path, *, exact: bool = False) -> Executor:
        """The CPU engine; if `exact`, every SoC's emulator, answering with the farthest of them.

        Raises:
            ArtifactError: EB510, the CPU engine refuses the file.
            TargetError: EB601, the NPU engine is missing.
        """
        fast = self._members[0].open(file)
        if not exact:
            return fast
        return _Farthest(fast, [m.open(file, exact=True) for m in self._members])

    def placement(self, file: Path) -> Placement:
        """A node is on the NPU where every SoC takes it; else the reason names the SoC.

        Raises:
            As `HexagonTarget.placement`.
        """
        found = [m.placement(file) for m in self._members]
        rows = {n.name: n for n in found[0].nodes}
        for member, placed in zip(self._members, found, strict=True):
            for node in placed.fallback:
                rows[node.name] = replace(node, why=f"{member.spec.device}: {node.why}")
        return Placement(tuple(rows.values()), found[0].processor)

    def latency(
        self,
        file: Path,
        inputs: Mapping[str, Array],
        repeats: int,
        *,
        statistic: Statistic = "p50",
    ) -> Figure:
        """The slowest SoC's latency in ms.

        Raises:
            As `HexagonTarget.latency`.
        """
        return _worst([m.latency(file, inputs, repeats, statistic=statistic)
                       for m in self._members])  # fmt: skip

    def predict(self, model: onnx.ModelProto) -> Figure:
        """The slowest SoC's modelled latency in ms; see `HexagonTarget.predict`."""
        return _worst([m.predict(model) for m in self._members])

    def compare(self, file: Path, other: Path, inputs: Mapping[str, Array]) -> float | None:
        """Latency of `file` over that of `other`; None where one is unknown."""
        mine, theirs = (self.latency(f, inputs, 1).value for f in (file, other))
        return mine / theirs if mine is not None and theirs else None


class _Farthest:
    """Of several executors, the answers farthest from a reference: what the proof must cover."""

    def __init__(self, reference: Executor, members: Sequence[Executor]) -> None:
        self._reference, self._members = reference, members

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        plain = self._reference.run(inputs)
        answers = [m.run(inputs) for m in self._members]
        chosen = {}
        for name, value in plain.items():
            gaps = [float(np.abs(a[name].astype(np.float64) - value).max()) for a in answers]
            chosen[name] = answers[int(np.argmax(gaps))][name]
        return chosen


def _joined(members: Sequence[HexagonTarget]) -> dict[str, str]:
    return {k: ",".join(m.spec.options[k] for m in members) for k in ("soc_model", "arch")}


def _worst(figures: Sequence[Figure]) -> Figure:
    for figure in figures:
        if figure.value is None:
            return figure
    return max(figures, key=lambda f: f.value or 0.0)
