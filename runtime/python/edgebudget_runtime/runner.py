"""Runner: answers inputs with an artifact, and says what that took."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any

import numpy as np

from edgebudget_runtime import engine, inputs, integrity
from edgebudget_runtime.budget import Budget, Limit, Violation
from edgebudget_runtime.cost import Cost, Figure
from edgebudget_runtime.errors import ArtifactError, MissedError, UsageError
from edgebudget_runtime.inputs import Array, Inputs
from edgebudget_runtime.manifest import Manifest, Segment, Tensor


@dataclass(frozen=True, slots=True)
class Outcome:
    """The answer, and what it took.

    `engine` names what ran it, and what it stood in for when that is not the artifact's own.
    """

    outputs: dict[str, Array]
    ran: tuple[str, ...]  # segment ids
    spent: Cost  # of one input
    broke: tuple[Violation, ...]
    engine: str


class Runner:
    """Runs one artifact folder. One runner may serve many threads at once.

    The CPU runs any artifact: an integer graph made for an NPU gives the same integers there,
    and the outcome says that the CPU stood in. `providers` picks other ONNX Runtime providers,
    in order; a node may only go to a provider that is listed. `provider_options` go to the
    first of them.

    Raises:
        ArtifactError: EB500 to EB507 the folder is not a whole artifact (`verify=False` skips
            the hashes, never the manifest); EB509, on first use, the engine refuses a file.
        UsageError: EB175 a provider is not here, EB174 `threads` is not positive.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        threads: int | None = None,
        verify: bool = True,
        providers: Sequence[str] = (engine.CPU,),
        provider_options: Mapping[str, str] | None = None,
    ) -> None:
        if threads is not None and threads < 1:
            raise UsageError("EB174", f"threads={threads} is not positive", hint="use 1 or more")
        if not providers:
            raise UsageError("EB175", "no provider is named", hint=f"use {engine.CPU}")
        self.folder = Path(folder)
        self.manifest = Manifest.load(self.folder)
        if verify:
            integrity.verify(self.folder, self.manifest)
        self._threads, self._providers, self._options = threads, tuple(providers), provider_options
        self._path = tuple(self.manifest.segment(i) for i in self.manifest.subnetworks[0].path)
        self.inputs = _free_inputs(self._path)
        self.outputs = self._path[-1].outputs
        self._sessions: dict[str, Any] = {}
        self._lock = Lock()
        self._closed = False

    def run(
        self, inputs: Inputs, *, latency_ms: float | None = None, strict: bool = False
    ) -> Outcome:
        """Answer one input of the shape in the manifest, batch dimension included.

        A missed `latency_ms` is reported in the outcome; with `strict` it raises. The first
        call also loads the model: call `warm_up` before timing counts.

        Raises:
            UsageError: EB170 to EB173 the inputs are not what the model takes, EB174 closed.
            MissedError: EB490 `strict`, and the answer took longer than `latency_ms`.
        """
        start = time.perf_counter()
        outputs = self._answer(inputs)
        spent = self._spent(time.perf_counter() - start, 1)
        limits = () if latency_ms is None else (Limit("latency_ms", latency_ms),)
        broke = Budget(limits=limits).violations(spent)
        if strict and broke:
            raise MissedError(
                "EB490",
                f"the answer took {spent.latency_ms.value:.3g} ms, more than {latency_ms:.3g} ms",
                hint="allow more time, or compile to a smaller --latency",
            )
        return Outcome(outputs, tuple(s.id for s in self._path), spent, broke, self._engine())

    def run_batch(self, inputs: Inputs | Sequence[Inputs]) -> Outcome:
        """Answer N inputs; outputs are [N, ...], and `spent` is the mean of one.

        Takes arrays [N, ...], or a list of what `run` takes. Runs as many at a time as the
        model's own batch dimension holds.

        Raises:
            UsageError: as `run`.
        """
        batch = self._joined(inputs)
        start = time.perf_counter()
        counts = {len(a) for a in batch.values() if a.ndim}
        if len(counts) != 1 or any(not a.ndim for a in batch.values()) or 0 in counts:
            raise UsageError(
                "EB171",
                "the inputs of a batch do not have one common first dimension of 1 or more: "
                + ", ".join(f"{k} {list(a.shape)}" for k, a in batch.items()),
                hint="stack the inputs: [N, ...]",
            )
        (count,) = counts
        size = next((t.shape[0] for t in self.inputs if t.shape), 1) or count
        parts = [
            self._answer(_chunk(batch, start, size), keep=min(size, count - start))
            for start in range(0, count, size)
        ]
        outputs = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
        spent = self._spent((time.perf_counter() - start) / count, count)
        return Outcome(outputs, tuple(s.id for s in self._path), spent, (), self._engine())

    def warm_up(self) -> None:
        """Load every segment now rather than at the first answer."""
        for segment in self._path:
            self._session(segment)

    def close(self) -> None:
        """Free the models. Calls that are running end normally; later ones are refused."""
        with self._lock:
            self._closed = True
            self._sessions.clear()

    def __enter__(self) -> Runner:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _answer(self, given: Inputs, keep: int | None = None) -> dict[str, Array]:
        """Run the path; `keep` drops the padding of a batch."""
        state = inputs.named(given, self.inputs)
        inputs.check(state, self.inputs)
        for segment in self._path:
            feed = {t.name: state[t.name] for t in segment.inputs}
            state.update(engine.run_session(self._session(segment), feed))
        return {t.name: state[t.name][:keep] if keep else state[t.name] for t in self.outputs}

    def _session(self, segment: Segment) -> Any:
        with self._lock:
            if self._closed:
                raise UsageError(
                    "EB174", "this runner is closed", hint="open the artifact again with Runner"
                )
            if segment.id not in self._sessions:
                self._sessions[segment.id] = self._open(segment)
            return self._sessions[segment.id]

    def _open(self, segment: Segment) -> Any:
        session = engine.open_session(
            integrity.locate(self.folder, segment.file),
            providers=self._providers,
            options=self._options,
            threads=self._threads,
        )
        for kind, described, found in (
            ("inputs", segment.inputs, session.get_inputs()),
            ("outputs", segment.outputs, session.get_outputs()),
        ):
            if {t.name for t in described} != {f.name for f in found}:
                raise ArtifactError(
                    "EB509",
                    f"{segment.file} has the {kind} {', '.join(f.name for f in found)}, "
                    f"manifest.json says {', '.join(t.name for t in described)}",
                    hint="the artifact is damaged or was changed; compile again",
                )
        return session

    def _joined(self, given: Inputs | Sequence[Inputs]) -> dict[str, Array]:
        """One array [N, ...] for each input."""
        if isinstance(given, Mapping | np.ndarray):
            return inputs.named(given, self.inputs)
        items = [inputs.named(g, self.inputs) for g in given]
        if not items:
            raise UsageError("EB171", "the batch is empty", hint="give at least one input")
        for item in items:
            inputs.check(item, self.inputs)
        return {t.name: np.concatenate([i[t.name] for i in items]) for t in self.inputs}

    def _spent(self, seconds: float, count: int) -> Cost:
        latency = Figure(
            value=seconds * 1e3,
            evidence="measured",
            how="wall time, checks included" + (", mean of a batch" if count > 1 else ""),
            device=platform.machine(),
            count=count,
        )
        return Cost(macs=self.manifest.subnetworks[0].cost.macs, latency_ms=latency)

    def _engine(self) -> str:
        used = f"onnxruntime {self._providers[0]}"
        own = self.manifest.target.engine
        stands_in = self._providers[0] == engine.CPU and own != "onnxruntime-cpu"
        return f"{used}, standing in for {own}" if stands_in else used


def _free_inputs(path: Sequence[Segment]) -> tuple[Tensor, ...]:
    """What a path takes from outside: inputs that no earlier segment gives."""
    made: set[str] = set()
    free: dict[str, Tensor] = {}
    for segment in path:
        for tensor in segment.inputs:
            if tensor.name not in made:
                free.setdefault(tensor.name, tensor)
        made.update(t.name for t in segment.outputs)
    return tuple(free.values())


def _chunk(batch: Mapping[str, Array], start: int, size: int) -> dict[str, Array]:
    """`size` inputs from `start`; the last one is repeated where they run out."""
    parts = {k: a[start : start + size] for k, a in batch.items()}
    short = size - len(next(iter(parts.values())))
    if short <= 0:
        return parts
    return {k: np.concatenate([p, np.repeat(p[-1:], short, axis=0)]) for k, p in parts.items()}
