"""Which predictor speaks about this device, and what is said where there is none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from edgebudget.layer_loads import NodeTimes
from edgebudget.predictor import Predictor, read
from edgebudget_runtime.cost import Figure
from edgebudget_runtime.errors import EdgeBudgetError, TargetError
from edgebudget_runtime.profile import cache_folder

if TYPE_CHECKING:
    from edgebudget.kernels import Kernel
    from edgebudget.target import TellsKernels
    from edgebudget_runtime.device_id import Device

# Of one core without a calibration: an order of magnitude, no more.
_FLOAT_MACS_PER_US, _INTEGER_MACS_PER_US, _BYTES_PER_US, _KERNEL_US = 2e4, 6e4, 1e4, 0.5


def user_file(device: Device) -> Path:
    """Where a calibration of this device is kept."""
    return cache_folder() / "predictors" / f"{device.fingerprint}.json"


def find(device: Device) -> tuple[Predictor | None, str]:
    """The user's own predictor, or a shipped one, of exactly this device, engine and version.

    None comes with the reason: nothing was calibrated, or only for something else.
    """
    why = ""
    for file in _files(device):
        try:
            found = read(file)
            found.check(device)
        except EdgeBudgetError as e:
            why = why or f"{file.name} is left aside: {e.what}"
            continue
        return found, ""
    return None, why or "nothing was calibrated here: run `edgebudget calibrate`"


def _files(device: Device) -> Iterator[Path]:
    """Candidates, the user's first; others of the same processor only say what differs."""
    spec = find_spec("edgebudget_targets")
    shipped = (
        [Path(f) / "predictors" for f in (spec.submodule_search_locations or [])] if spec else []
    )
    folders = [user_file(device).parent, *shipped]
    named = [f / f"{device.fingerprint}.json" for f in folders]
    yield from (f for f in named if f.is_file())
    for folder in folders:
        for file in sorted(folder.glob("*.json")) if folder.is_dir() else ():
            if file not in named and _same_cpu(file, device):
                yield file


def _same_cpu(file: Path, device: Device) -> bool:
    try:
        return read(file).device.cpu == device.cpu
    except EdgeBudgetError:
        return False


def adopt(file: Path, device: Device) -> Predictor:
    """Check a predictor that came from elsewhere, and keep it as the user's own.

    Raises:
        ArtifactError: EB585, it is not a predictor of this schema.
        TargetError: EB652, it belongs to another device, engine or version.
    """
    found = read(file)
    found.check(device)
    found.save(user_file(device))
    return found


def predicted(target: TellsKernels, file: Path) -> Figure:
    """The modelled latency of a lowered file, by a predictor or else by a bare roofline.

    Raises:
        ArtifactError: EB510, the engine refuses the file.
    """
    device = target.device()
    kernels = target.kernels(file)
    found, why = find(device)
    return roofline(kernels, device, why) if found is None else found.figure(kernels)


def node_times(device: Device, named: Sequence[tuple[str, Kernel]]) -> NodeTimes:
    """What a device's predictor says of each node; `named` are its kernels by node.

    Raises:
        TargetError: EB653, no predictor speaks about this device.
    """
    found, why = find(device)
    if found is None:
        raise TargetError("EB653", f"no predictor of {device.cpu}: {why}", hint="calibrate it")
    return by_node(found, named)


def by_node(predictor: Predictor, named: Sequence[tuple[str, Kernel]]) -> NodeTimes:
    """What a predictor says of each node, its kernels together."""
    ms = dict[str, float]()
    for (name, _), us in zip(named, predictor.microseconds([k for _, k in named]), strict=True):
        ms[name] = ms.get(name, 0.0) + float(us) / 1e3
    how = f"predicted for {predictor.device.cpu}, whole networks {predictor.errors.words}"
    return NodeTimes(ms, "modelled", how)


def roofline(kernels: Sequence[Kernel], device: Device, why: str) -> Figure:
    """A sum of the larger of computing and moving, at rates that no one measured here."""
    us = 0.0
    for k in kernels:
        integer = k.kind.startswith("Q") or "nteger" in k.kind
        rate = _INTEGER_MACS_PER_US if integer else _FLOAT_MACS_PER_US
        us += max(k.macs / rate, k.moved / _BYTES_PER_US) + _KERNEL_US
    return Figure(
        value=us / 1e3,
        evidence="modelled",
        how=f"roofline, uncalibrated: its error is unknown; {why}",
        device=device.cpu,
    )
