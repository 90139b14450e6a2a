"""Every way an artifact can answer, with what it costs and how good it is.

Sub-networks come with the figures of the worst case; operating points, which leave their chain
where an input is easy, with means.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from edgebudget_runtime.cost import UNKNOWN, Cost, Figure
from edgebudget_runtime.manifest import Candidate, Manifest, Quality
from edgebudget_runtime.profile import Profile, path_energy


@dataclass(frozen=True, slots=True)
class Way:
    """One sub-network, or one operating point (`mean`). Latency is this device's, if known."""

    id: str
    mean: bool
    macs: Figure
    latency_ms: Figure
    energy_mj: Figure
    size_bytes: Figure
    quality: Quality | None
    shares: Mapping[str, float]  # of an operating point: where inputs ended
    certified: str = ""
    p99_ms: Figure = UNKNOWN  # of a sub-network that `profile` ran often enough

    def as_dict(self) -> dict[str, object]:
        """Plain data for `--json`."""
        figures = {
            k: {"value": f.value, "evidence": f.evidence}
            for k, f in (
                ("macs", self.macs),
                ("latency_ms", self.latency_ms),
                ("p99_ms", self.p99_ms),
                ("energy_mj", self.energy_mj),
                ("size_bytes", self.size_bytes),
            )
        }
        quality = None
        if self.quality is not None:
            q = self.quality
            quality = {"metric": q.metric, "value": q.value, "low": q.low, "high": q.high}
        return {
            "id": self.id,
            "statistic": "mean" if self.mean else "worst case",
            **figures,
            "quality": quality,
            "shares": dict(self.shares),
            "certified": self.certified,
        }


def ways(manifest: Manifest, profile: Profile | None = None) -> tuple[Way, ...]:
    """Sub-networks and operating points by rising MACs; latency and energy from a profile."""
    found = []
    for sub in manifest.subnetworks:
        latency = _latency(sub.path, profile) or sub.cost.latency_ms
        energy = sub.cost.energy_mj
        if profile is not None and sub.id in profile.energy:
            energy = profile.energy[sub.id]
        elif energy.value is None:
            energy = path_energy(sub, latency.value, None)
        cost = sub.cost
        found.append(
            Way(
                sub.id, False, cost.macs, latency, energy, cost.size_bytes, sub.quality, {},
                p99_ms=_p99(sub.id, profile),
            )
        )  # fmt: skip
    for point in manifest.operating_points:
        cost = point.mean_cost
        certified = ""
        if (c := point.certificate) is not None:
            certified = f"at most {c.max_drop:.3g} lost at {c.confidence:.3g} ({c.count} samples)"
        found.append(
            Way(
                point.id, True, cost.macs, _mean(point.shares, point.path, profile, cost),
                cost.energy_mj, cost.size_bytes, point.quality, point.shares, certified,
            )
        )  # fmt: skip
    return tuple(sorted(found, key=lambda w: (w.macs.value or 0.0, w.id)))


def as_candidates(found: tuple[Way, ...], best: str) -> list[Candidate]:
    """For the plot of quality against MACs."""
    return [
        Candidate(w.id, w.macs.value or 0.0, w.quality.value if w.quality else None, w.id == best)
        for w in found
    ]


def _p99(id: str, profile: Profile | None) -> Figure:
    """99th percentile of a path that `edgebudget profile` ran as a whole."""
    detail = None if profile is None else profile.detail
    if profile is None or detail is None or id not in detail.paths:
        return UNKNOWN
    found = detail.paths[id]
    if found.p99_ms is None:
        return replace(UNKNOWN, how=f"{found.runs} runs are too few")
    return Figure(
        value=found.p99_ms,
        evidence="measured",
        how=f"99th percentile of {found.runs} runs on {detail.where}",
        device=profile.device.cpu,
        count=found.runs,
    )


def _latency(path: tuple[str, ...], profile: Profile | None) -> Figure | None:
    """The sum of the segments' medians on this device."""
    if profile is None or not set(path) <= set(profile.samples_ms):
        return None
    samples = [sorted(profile.samples_ms[i]) for i in path]
    return Figure(
        value=sum(s[len(s) // 2] for s in samples),
        evidence="measured",
        how=f"sum of {len(path)} segments' medians on this device",
        device=profile.device.cpu,
        count=min(len(s) for s in samples),
    )


def _mean(
    shares: Mapping[str, float], path: tuple[str, ...], profile: Profile | None, cost: Cost
) -> Figure:
    """Latency weighed by where inputs ended; without a profile what the manifest knows."""
    each = [_latency(path[: i + 1], profile) for i in range(len(path))]
    if any(f is None for f in each):
        return cost.latency_ms
    values = [f.value or 0.0 for f in each if f is not None]
    weights = [shares.get(i, 0.0) for i in path]
    first = each[0]
    if first is None or sum(weights) <= 0:
        return UNKNOWN
    return Figure(
        value=sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights),
        evidence="modelled",
        how="segments' medians on this device, weighed by where evaluation inputs ended",
        device=first.device,
        count=first.count,
    )
