"""What an artifact's segments cost on this device: a file of its own, outside the artifact.

A profile is a hint. One that is damaged, or that belongs to another artifact, device or engine,
is left aside with a reason, and the device is measured again.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from edgebudget_runtime import codec
from edgebudget_runtime.cost import Figure
from edgebudget_runtime.device_id import Device
from edgebudget_runtime.errors import ArtifactError
from edgebudget_runtime.integrity import sha256
from edgebudget_runtime.latency_bound import SIZE
from edgebudget_runtime.manifest import FILE, SubNetwork
from edgebudget_runtime.profile_detail import Detail

SCHEMA = 2
_WITHOUT_DETAIL = 1  # the schema before there was any
_MOST_BYTES = 8_000_000
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MOST_ROUNDS = 200  # of calibration: enough for a bound to exist


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Latencies of each segment, free of slowdowns, and the energy of each sub-network."""

    artifact: str  # SHA-256 of manifest.json
    device: Device
    samples_ms: Mapping[str, tuple[float, ...]]  # segment -> latencies, oldest first
    energy: Mapping[str, Figure] = field(default_factory=dict)  # sub-network -> millijoules
    detail: Detail | None = None  # None: nobody looked closer
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        if not _SHA256.fullmatch(self.artifact):
            raise ValueError("a SHA-256 of 64 hexadecimal digits")
        for segment, samples in self.samples_ms.items():
            if not 0 < len(samples) <= SIZE or not all(0 < x < math.inf for x in samples):
                raise ValueError(f"1 to {SIZE} positive latencies of segment {segment!r}")
        for id, figure in self.energy.items():
            if figure.value is not None and not 0 <= figure.value < math.inf:
                raise ValueError(f"an energy of sub-network {id!r} of 0 or more")

    def encode(self) -> bytes:
        """Canonical JSON: equal profiles give equal bytes."""
        plain = codec.encode(Profile, self)
        return (json.dumps(plain, indent=1, sort_keys=True, allow_nan=False) + "\n").encode("ascii")

    @staticmethod
    def decode(data: bytes) -> Profile:
        """Read a profile; anything unexpected is refused.

        Raises:
            ArtifactError: EB580 it is not a profile of this schema.
        """
        if len(data) > _MOST_BYTES:
            raise _damaged(f"is larger than {_MOST_BYTES // 1_000_000} MB")
        try:
            raw = json.loads(data.decode("utf-8"))
        except (ValueError, RecursionError) as e:
            raise _damaged(f"is not JSON: {type(e).__name__}") from None
        if isinstance(raw, dict) and raw.get("schema") == _WITHOUT_DETAIL and "detail" not in raw:
            raw |= {"schema": SCHEMA, "detail": None}
        if not isinstance(raw, dict) or raw.get("schema") != SCHEMA:
            raise _damaged(f"is not of schema {SCHEMA}")
        try:
            profile: Profile = codec.decode(Profile, raw)
        except ArtifactError as e:
            raise _damaged(f"does not read as one{e.what.removeprefix('manifest.json')}") from None
        return profile


def digest(folder: Path) -> str:
    """What ties a profile to an artifact: the SHA-256 of its manifest, which lists all hashes."""
    return sha256(folder / FILE)


def cache_folder() -> Path:
    """EDGEBUDGET_CACHE, or edgebudget's part of the user's cache folder."""
    named = os.environ.get("EDGEBUDGET_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return (Path(named) if named else Path(base) / "edgebudget").expanduser()


def default_folder() -> Path:
    """Where profiles are kept."""
    return cache_folder() / "profiles"


def default_file(artifact: str, device: Device) -> Path:
    """The file of the profile of an artifact (its digest) on a device."""
    return default_folder() / f"{artifact[:32]}-{device.fingerprint}.json"


def load(
    file: Path, artifact: str, device: Device, segments: Sequence[str]
) -> tuple[Profile | None, str]:
    """The profile of this artifact on this device, or None and the reason why not.

    Never raises: a profile is worth no answer.
    """
    try:
        with file.open("rb") as f:
            data = f.read(_MOST_BYTES + 1)
    except FileNotFoundError:
        return None, "there is no profile yet"
    except OSError as e:
        return None, f"the profile cannot be read: {e.strerror or e}"
    try:
        found = Profile.decode(data)
        _check_own(found, artifact, device, segments)
    except ArtifactError as e:
        return None, e.what
    return found, ""


def read(file: Path, artifact: str, segments: Sequence[str]) -> Profile:
    """A profile that the user names: of this artifact, on whatever device.

    Raises:
        ArtifactError: EB580 it cannot be read, EB581 it is of another artifact.
    """
    try:
        with file.open("rb") as f:
            data = f.read(_MOST_BYTES + 1)
    except OSError as e:
        raise _damaged(f"{file} cannot be read: {e.strerror or e}") from e
    found = Profile.decode(data)
    _check_own(found, artifact, found.device, segments)
    return found


def save(profile: Profile, file: Path) -> str:
    """Write a profile whole or not at all; the reason why it could not be kept, or "".

    Never raises: a full disk is no reason to give no answer.
    """
    why = write_whole(file, profile.encode())
    return f"the profile {why}" if why else ""


def write_whole(file: Path, data: bytes) -> str:
    """Write a file aside and rename it; why that failed, or ""."""
    temporary = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=file.parent, prefix=".profile-")
        temporary = Path(name)
        with os.fdopen(handle, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(file)
    except OSError as e:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink()
        return f"cannot be written: {e.strerror or e}"
    return ""


def calibrate(
    run_segment: Callable[[str], object],
    segments: Sequence[str],
    budget_s: float = 2.0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, tuple[float, ...]]:
    """Time segments in turn, A B C A B C ..., for at most about `budget_s`.

    `run_segment(id)` runs one segment once. The first run of each is dropped if there is another.
    A segment whose next run would end too late is left out; one that never ran is not in the
    result. Milliseconds, oldest first.
    """
    began = clock()
    found: dict[str, list[float]] = {s: [] for s in segments}
    last_s = dict.fromkeys(segments, 0.0)
    for _ in range(_MOST_ROUNDS + 1):
        ran = False
        for segment in segments:
            if clock() - began + last_s[segment] >= budget_s:
                continue
            start = clock()
            run_segment(segment)
            seconds = clock() - start
            ran = True
            if 0 < seconds < math.inf:  # else the clock jumped
                last_s[segment] = seconds
                found[segment].append(seconds * 1e3)
        if not ran:
            break
    return {s: tuple(v[1:] or v) for s, v in found.items() if v}


def path_energy(sub: SubNetwork, latency_ms: float | None, power_w: float | None) -> Figure:
    """Energy of one input on one sub-network.

    From the mean power in watts that the user states, else what the manifest knows, else unknown.
    """
    if power_w is None or latency_ms is None:
        return sub.cost.energy_mj
    return Figure(
        value=power_w * latency_ms,  # W x ms = mJ
        evidence="modelled",
        how=f"{power_w:g} W, as stated, times {latency_ms:.4g} ms, the usual latency here",
    )


def _check_own(profile: Profile, artifact: str, device: Device, segments: Sequence[str]) -> None:
    if profile.artifact != artifact:
        raise _foreign("another artifact")
    if profile.device != device:
        ours, theirs = device, profile.device
        parts = [n for n in Device.__slots__ if getattr(ours, n) != getattr(theirs, n)]
        raise _foreign(
            "another device or engine: "
            + ", ".join(f"{n} {getattr(theirs, n)!r}, here {getattr(ours, n)!r}" for n in parts)
        )
    if not set(profile.samples_ms) <= set(segments):
        raise _foreign("other segments")


def _damaged(what: str) -> ArtifactError:
    return ArtifactError("EB580", f"the profile {what}", hint="delete it: it will be made again")


def _foreign(whose: str) -> ArtifactError:
    return ArtifactError(
        "EB581", f"the profile is of {whose}", hint="it is left aside and made again"
    )
