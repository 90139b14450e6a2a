"""Measure an artifact on a device, and make a profile of what came back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgebudget.energy import LOCAL_COUNTERS
from edgebudget.events import Emit, Finished, Started, ignore
from edgebudget.profile_collect import collect
from edgebudget.profile_layers import layer_times
from edgebudget_runtime import profile
from edgebudget_runtime.errors import EdgeBudgetError
from edgebudget_runtime.measure.job import Job
from edgebudget_runtime.profile import Profile

if TYPE_CHECKING:
    from edgebudget.devices import DeviceLink
    from edgebudget.profile_subject import Subject


@dataclass(frozen=True, slots=True)
class Measured:
    """A profile, and why it is only a part of one, if so."""

    profile: Profile
    error: EdgeBudgetError | None


def measure(
    subject: Subject,
    device: DeviceLink,
    *,
    threads: int | None = None,
    seconds: float = 5.0,
    layers: bool = True,
    energy: bool = True,
    emit: Emit = ignore,
) -> Measured:
    """Measure every path of an artifact.

    Args:
        subject: The artifact.
        device: Where.
        threads: Of the engine; None: as a runner would.
        seconds: For timing; layers and energy take about as long again.
        layers: Whether to look into paths.
        energy: Whether to read energy counters.
        emit: Listens.

    Raises:
        EdgeBudgetError: nothing could be timed: EB640 to EB644 the device, EB5xx the artifact.
    """
    job = Job(
        folder=str(subject.folder),
        provider=subject.provider,
        threads=threads,
        seconds=seconds,
        layers=layers,
        energy=energy,
        family=subject.target.family,
        counters=LOCAL_COUNTERS if device.name == "local" else (),
    )
    work = f"measure on {device.name}"
    emit(Started(work))
    found = collect(device.lines(job, subject.folder))
    own = subject.manifest.target.engine
    if own != subject.target.engine:
        found.notes.append(f"{subject.target.name} stands in for {own}, which was not timed")
    files = {s.id: subject.folder / s.file for s in subject.manifest.segments}
    made = found.profile(
        profile.digest(subject.folder),
        device.name,
        subject.target.name,
        layer_times(files, found.kernels),
    )
    emit(Finished(work, "" if found.error is None else "stopped early"))
    return Measured(made, found.error)
