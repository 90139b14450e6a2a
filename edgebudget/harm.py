"""Do no harm: a step that costs quality and buys nothing on this target is taken back."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgebudget import registry
from edgebudget.energy_estimate import energy_of
from edgebudget.events import Said
from edgebudget.pipeline import Built, Setting, run_steps
from edgebudget.plan import Step
from edgebudget.program import PassRecord
from edgebudget_runtime.cost import Resource
from edgebudget_runtime.errors import InfeasibleError

if TYPE_CHECKING:
    from edgebudget.target import Target

_WORTH = 0.97  # a saving under 3 % is within the noise of one measurement
_STATIC: tuple[Resource, ...] = ("macs", "params", "size_bytes", "memory_bytes")


def undo_harm(
    setting: Setting, target: Target, start: Built, built: Built, steps: Sequence[Step]
) -> tuple[Built, tuple[PassRecord, ...]]:
    """Rebuild without the lossy steps that improve no budgeted resource on this target.

    Where no limit is set on what a step saves, latency measured on the target decides: the two
    files run interleaved; an energy that is limited and falls will do as well. Returns the program
    and the record of each step undone, with why.
    """
    undone: dict[str, PassRecord] = {}
    if built.cut:  # rebuilding would train again, and there is no time left
        return built, ()
    for step in steps:
        if setting.late:
            break
        record = next((r for r in built.records if r.name == step.name), None)
        if record is None or not record.did or registry.get(step.name).equivalence != "lossy":
            continue
        if step.name == "recover" or _saves(setting, record):
            continue  # recover buys quality, which is what it is for
        if record.name == "quantize_int8" and not target.spec.float_fallback:
            continue  # this target computes in integers only
        kept = [s for s in steps if s.name not in {*undone, step.name}]
        try:
            without = run_steps(setting, start, kept)
        except InfeasibleError:
            continue  # a later step cannot reach its bound without this one
        if why := _no_faster(setting, target, built, without, step.name):
            undone[step.name] = replace(record, undone=why)
            setting.emit(Said("warning", f"{step.name} undone: {why}"))
            built = without
    return built, tuple(undone.values())


def _saves(setting: Setting, record: PassRecord) -> bool:
    """Whether a step lowered a countable resource that the user put a limit on."""
    for resource in _STATIC:
        before, after = record.before.get(resource).value, record.after.get(resource).value
        if setting.budget.limit(resource) is None or before is None or after is None:
            continue
        if after < before * _WORTH:
            return True
    return False


def _no_faster(setting: Setting, target: Target, built: Built, without: Built, name: str) -> str:
    """Why a step does not pay on this target; empty when it does, or cannot be measured."""
    source = setting.workload.data.calibration
    if source is None or target.spec.family != "cpu":
        return ""
    inputs = {k: v[None] for k, v in source.sample(0).inputs.items()}
    with tempfile.TemporaryDirectory(prefix="edgebudget-") as folder:
        new = target.lower(built.program, Path(folder), "with")
        old = target.lower(without.program, Path(folder), "without")
        if setting.budget.limit("energy_mj") is not None:
            mj, was = (energy_of(target, f, inputs).value for f in (new.file, old.file))
            if mj is not None and was is not None and mj < was * _WORTH:
                return ""
        ratio = target.compare(new.file, old.file, inputs)
    if ratio is None or ratio < _WORTH:
        return ""
    return f"no faster on {target.spec.device} when measured beside the same network without it"
