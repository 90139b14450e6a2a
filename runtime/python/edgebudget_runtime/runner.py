"""Runner: answers inputs with an artifact under a budget, and says what that took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType

import numpy as np

from edgebudget_runtime import engine, executorch_program, inputs, policy
from edgebudget_runtime.async_runner import Threads
from edgebudget_runtime.batch import Answers, Batch, check_batch
from edgebudget_runtime.cost import Cost, Resource
from edgebudget_runtime.device_id import here
from edgebudget_runtime.errors import EdgeBudgetError, UsageError
from edgebudget_runtime.inputs import Array, Inputs
from edgebudget_runtime.manifest import Manifest, Tensor
from edgebudget_runtime.outcome import Item, Outcome, limits, missed, violations, wall
from edgebudget_runtime.planner import Planner, View
from edgebudget_runtime.policy import Policy
from edgebudget_runtime.profiling import Given, Profiling
from edgebudget_runtime.sessions import Sessions
from edgebudget_runtime.stream import Late, Stream
from edgebudget_runtime.telemetry import Telemetry
from edgebudget_runtime.walk import Segments, Way, Wish

__all__ = ["Item", "Outcome", "Runner"]


class Runner:
    """Runs one artifact folder. One runner may serve many threads at once.

    The CPU runs any artifact: an integer graph made for an NPU gives the same integers there,
    and the outcome says that the CPU stood in. `providers` picks other ONNX Runtime providers,
    in order; a node may only go to a provider that is listed. `provider_options` go to the
    first of them.

    Of an artifact with several sub-networks, `policy` (a name as "deadline", "best", "paced",
    "fixed:ID", "point:ID", or a function, see `edgebudget_runtime.policy`) chooses one for each
    input. `profile` is what segments cost on this device: by default a file in the user's cache
    folder, measured in the background when a deadline is first asked for; a path, a `Profile`,
    or False for none (`profile_note` says why one was left aside). Segments are loaded when
    first needed; with `memory_limit_bytes`, those unused longest are dropped to stay within it.
    `power_w` is the device's mean power while it answers, in watts: energy is then modelled as
    that times the usual latency here, and is what the manifest says until the device is measured.
    `trace` names a file that gets a line of JSON for each answer. `threads` are the engine's for
    one input, `workers` those of `run_async`. `clock` gives seconds.

    Raises:
        ArtifactError: EB500 to EB507 the folder is not a whole artifact: no sub-network has all
            its files (`verify=False` skips the hashes, never the manifest); EB509, on first use,
            the engine refuses a file.
        UsageError: EB175 a provider is not here, EB174 `threads` or another number is not
            positive, EB180 there is no such policy, EB183 the trace cannot be written.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        threads: int | None = None,
        verify: bool = True,
        providers: Sequence[str] = (engine.CPU,),
        provider_options: Mapping[str, str] | None = None,
        policy: str | Policy = "deadline",
        profile: Given = None,
        memory_limit_bytes: int | None = None,
        workers: int | None = None,
        power_w: float | None = None,
        trace: Path | str | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        _positive(threads=threads, memory_limit_bytes=memory_limit_bytes, workers=workers)
        if not providers:
            raise UsageError("EB175", "no provider is named", hint=f"use {engine.CPU}")
        self.folder = Path(folder)
        self.manifest = Manifest.load(self.folder)
        self._sessions = Sessions(
            self.folder,
            self.manifest,
            verify=verify,
            providers=tuple(providers),
            options=provider_options,
            threads=threads,
            limit_bytes=memory_limit_bytes,
        )
        self._segments = Segments(self.manifest, self._sessions, clock)
        self._clock, self._providers = clock, tuple(providers)
        self._threads = Threads(workers)
        self._telemetry = Telemetry(None if trace is None else Path(trace), clock)
        device = here(*self._engine_version(), threads or engine.default_threads())
        told = power_w is not None or len(self.manifest.subnetworks) > 1
        self._profiling = Profiling(
            self.folder, self.manifest, device, profile if told else False, self._drifted, power_w
        )
        self._power_w = power_w
        self._max_batch = min((s.max_batch for s in self.manifest.segments), default=1)
        self._engine_name = self._engine()
        self._named: dict[str, Policy] = {}
        self._policy = self._resolved(policy)
        planner = self._profiling.planner
        if not planner.without(planner.whole.places, self._sessions.damaged):
            raise next(iter(self._sessions.damaged.values()))
        self.inputs: tuple[Tensor, ...] = next(iter(planner.takes))
        last = self.manifest.segment(self.manifest.subnetworks[0].path[-1])
        self.outputs = tuple(t for t in last.outputs if t.name in self._segments.outputs)

    def run(
        self,
        inputs: Inputs,
        *,
        latency_ms: float | None = None,
        energy_mj: float | None = None,
        macs: float | None = None,
        policy: str | Policy | None = None,
        strict: bool = False,
    ) -> Outcome:
        """Answer one input of the shape in the manifest, batch dimension included.

        The policy picks the sub-network, and is asked again at every exit with what is left. If
        a segment fails or time runs out after an exit, its answer stands and the outcome is
        `degraded`. A limit that is missed is reported in the outcome; with `strict` it raises.
        The first call also loads the model: call `warm_up` before timing counts.

        Raises:
            UsageError: EB170 to EB173 the inputs are not what the model takes, EB174 closed or a
                limit is not positive, EB180 and EB181 the policy cannot be followed.
            ArtifactError: EB502 to EB504, EB509 no sub-network could answer.
            MissedError: EB490 `strict`, and a limit was missed.
        """
        return self._run(inputs, latency_ms, energy_mj, macs, policy, strict, None)

    def run_batch(
        self,
        inputs: Inputs | Sequence[Inputs],
        *,
        energy_mj: float | None = None,
        macs: float | None = None,
        policy: str | Policy | None = None,
    ) -> Outcome:
        """Answer N inputs; outputs are [N, ...], and `spent` is the mean of one.

        Takes arrays [N, ...], or a list of what `run` takes. Runs as many at a time as the
        model's own batch dimension holds, or as its files were made to take; inputs that end at
        an exit make room for others. Limits are for each input; `items` says where each ended.

        Raises:
            UsageError, ArtifactError: as `run`.
        """
        start = self._clock()
        wish = Wish(self._resolved(policy), start, None, energy_mj)
        planner = self._profiling.planner
        batch, tensors, places = self._joined(planner, inputs)
        size = next((t.shape[0] for t in tensors if t.shape), 1)
        count = check_batch(batch, tensors, size)
        view = self._view(planner, places, macs, energy_mj)
        group = Batch(self._segments, planner, wish, size or count, count, self._max_batch)
        answers = group.go(batch, view)
        self._telemetry.counters.add("batch inputs", count)
        return self._batch_outcome(planner, answers, start, limits(None, energy_mj, macs))

    async def run_async(
        self,
        inputs: Inputs,
        *,
        latency_ms: float | None = None,
        energy_mj: float | None = None,
        macs: float | None = None,
        policy: str | Policy | None = None,
        strict: bool = False,
    ) -> Outcome:
        """`run` on a thread of the runner's own; `latency_ms` counts from when that is free."""
        call = partial(self._run, inputs, latency_ms, energy_mj, macs, policy, strict, None)
        return await self._threads.call(call)

    def stream(
        self,
        source: Iterable[Inputs],
        *,
        rate_hz: float,
        watts: float | None = None,
        joules: float | None = None,
        late: Late = "drop",
        policy: str | Policy | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> Stream:
        """Answer inputs that come `rate_hz` times a second; see `Stream`.

        Raises:
            UsageError: EB182 the energy allowance makes no sense, EB185 the rate is not positive.
        """
        chosen = policy if policy is not None or watts is joules is None else "paced"
        resolved = self._resolved(chosen)

        def answer(
            given: Inputs, left_ms: float, left_mj: float | None, fill: float | None
        ) -> Outcome:
            return self._run(given, left_ms, left_mj, None, resolved, False, fill)

        return Stream(answer, source, rate_hz, watts, joules, late, self._clock, sleep)

    def calibrate(self, inputs: Inputs) -> None:
        """Measure every segment on this device now, in about two seconds, on one input.

        Raises:
            UsageError: as `run`, and EB187 nothing could be measured.
        """
        state, _, _ = self._accepted(self._profiling.planner, inputs)
        self._profiling.measure(self._segments, state)

    def warm_up(self) -> None:
        """Load segments now rather than at the first answer: every one that the memory holds."""
        paths = [s.path for s in self.manifest.subnetworks]
        ids = dict.fromkeys(s for path in paths for s in path)
        for id in ids if self._sessions.all_fit else paths[0]:
            try:
                self._sessions.get(id)
            except EdgeBudgetError:
                if len(paths) == 1:
                    raise  # else the others serve, and outcomes say why

    @property
    def counters(self) -> dict[str, int]:
        """What has happened so far: requests, paths, limits broken, ... by name."""
        counts = self._telemetry.counters.counts()
        latencies = self._profiling.planner.latencies
        own = {"evictions": self._sessions.evictions, "discarded times": latencies.discarded}
        return counts | {k: v for k, v in own.items() if v}

    @property
    def open_segments(self) -> tuple[str, ...]:
        """The segments that are loaded, the longest unused one first."""
        return self._sessions.open_ids

    @property
    def profile_note(self) -> str:
        """Why no profile is in use, or could not be kept; empty where all is well."""
        return self._profiling.note

    def close(self) -> None:
        """Free the models. Calls that are running end normally; later ones are refused."""
        self._threads.close()
        self._profiling.close()
        self._segments.close()
        self._sessions.close()
        self._telemetry.close()

    def __enter__(self) -> Runner:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _run(
        self,
        given: Inputs,
        latency_ms: float | None,
        energy_mj: float | None,
        macs: float | None,
        chosen: str | Policy | None,
        strict: bool,
        fill: float | None,
    ) -> Outcome:
        start = self._clock()
        asked = limits(latency_ms, energy_mj, macs)
        wish = Wish(self._resolved(chosen), start, latency_ms, energy_mj, fill)
        planner = self._profiling.planner
        state, _, places = self._accepted(planner, given)
        timed = latency_ms is not None or (energy_mj is not None and self._power_w is not None)
        if timed and self._profiling.wanted:
            self._profiling.start(self._segments, state)
        way = Way(self._segments, planner, self._view(planner, places, macs, energy_mj), wish)
        way.go(state)
        seconds = self._clock() - start
        outcome = self._outcome(planner, way, seconds, asked)
        if way.observed and not (way.opened or way.degraded):
            planner.latencies.observe_path(way.ran, seconds * 1e3, way.slowdown, way.busy)
        self._telemetry.answered(outcome, start, latency_ms, energy_mj, way.slowdown)
        if strict and outcome.broke:
            raise missed(outcome.broke[0])
        return outcome

    def _outcome(
        self, planner: Planner, way: Way, seconds: float, asked: Mapping[Resource, float]
    ) -> Outcome:
        macs, energy = planner.spent(way.all_ran)
        spent = Cost(macs=macs, energy_mj=energy, latency_ms=wall(seconds, 1))
        broke = violations(asked, spent)
        return Outcome(
            outputs=way.best,
            ran=way.all_ran,
            spent=spent,
            broke=broke,
            engine=self._engine_name,
            subnetwork=planner.name(way.answered),
            exit=way.answered[-1],
            confidence=way.confidence,
            degraded=way.degraded,
            why=way.why or ("there is nothing smaller" if broke else ""),
        )

    def _batch_outcome(
        self, planner: Planner, answers: Answers, start: float, asked: Mapping[Resource, float]
    ) -> Outcome:
        count = len(answers.paths)
        macs, energy = planner.mean_spent(answers.ran, answers.paths)
        latency = wall((self._clock() - start) / count, count)
        spent = Cost(macs=macs, energy_mj=energy, latency_ms=latency)
        items = tuple(
            Item(planner.name(path), path[-1], sure)
            for path, sure in zip(answers.paths, answers.confidences, strict=True)
        )
        ends = {i.subnetwork: i.exit for i in items}
        (name, end) = next(iter(ends.items())) if len(ends) == 1 else ("", "")
        return Outcome(
            outputs={
                k: np.stack([rows[i] for i in range(count)]) for k, rows in answers.outputs.items()
            },
            ran=tuple(answers.ran),
            spent=spent,
            broke=violations(asked, spent),
            engine=self._engine_name,
            subnetwork=name,
            exit=end,
            degraded=answers.degraded,
            why=answers.why,
            items=items,
        )

    def _view(
        self, planner: Planner, places: tuple[int, ...], macs: float | None, energy: float | None
    ) -> View:
        if macs is not None:
            places = planner.within_macs(places, macs)
        return planner.view(places)

    def _accepted(
        self, planner: Planner, given: Inputs
    ) -> tuple[dict[str, Array], tuple[Tensor, ...], tuple[int, ...]]:
        """Inputs by name, and the options that take them."""
        named = given if isinstance(given, Mapping) else {self.inputs[0].name: given}
        tensors, places = planner.accepting(named)
        state = inputs.named(given, tensors)
        inputs.check(state, tensors)
        return state, tensors, places

    def _joined(
        self, planner: Planner, given: Inputs | Sequence[Inputs]
    ) -> tuple[dict[str, Array], tuple[Tensor, ...], tuple[int, ...]]:
        """One array [N, ...] for each input, and the options that take them."""
        if isinstance(given, Mapping | np.ndarray):
            named = given if isinstance(given, Mapping) else {self.inputs[0].name: given}
            tensors, places = planner.accepting(named, rows=True)
            return inputs.named(given, tensors), tensors, places
        accepted = [self._accepted(planner, g) for g in given]
        if not accepted:
            raise UsageError("EB171", "the batch is empty", hint="give at least one input")
        _, tensors, places = accepted[0]
        if any(other != tensors for _, other, _ in accepted):
            raise UsageError(
                "EB171",
                "the inputs of a batch have different sizes",
                hint="batch inputs of one size only",
            )
        joined = {t.name: np.concatenate([s[t.name] for s, _, _ in accepted]) for t in tensors}
        return joined, tensors, places

    def _resolved(self, chosen: str | Policy | None) -> Policy:
        if chosen is None:
            return self._policy
        if not isinstance(chosen, str):
            return chosen
        if chosen not in self._named:
            self._named[chosen] = policy.named(chosen, self.manifest)
        return self._named[chosen]

    def _drifted(self, factor: float) -> None:
        self._telemetry.counters.add("drifts")

    def _engine_version(self) -> tuple[str, str]:
        if executorch_program.is_needed(self.manifest):
            return "executorch", executorch_program.installed_version()
        return self._providers[0], engine.VERSION

    def _engine(self) -> str:
        if executorch_program.is_needed(self.manifest):
            return f"executorch {executorch_program.installed_version()}"
        used = f"onnxruntime {self._providers[0]}"
        own = self.manifest.target.engine
        stands_in = self._providers[0] == engine.CPU and own != engine.CPU_TARGET
        return f"{used}, standing in for {own}" if stands_in else used


def _positive(**numbers: int | None) -> None:
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise UsageError("EB174", f"{name}={number} is not positive", hint="use 1 or more")
