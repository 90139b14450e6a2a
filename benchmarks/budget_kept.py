"""Are deadlines and energy allowances kept, at a better quality than any fixed path keeps them?

10,000 real requests at five deadlines with another process loading the machine in bursts, then as
many replayed ones in bursts of requests and slowdowns, and as many with an energy store and
modelled joules. For each real request every fixed path answers one as well, in turn, on
a runner of its own, so that all meet the same load and none learns from another.

A deadline counts where some fixed path misses it at most 1 % of the time. Qualities are those of
the artifact's manifest; without `--artifact`, the zoo's elastic ResNet-56 is compiled first.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import _burst_load
from benchmarks._elastic import elastic_artifact
from benchmarks.harness import save
from edgebudget.make_trace import make
from edgebudget.simulate import Samples, Store, prepare_front, replay, usual_ms
from edgebudget_runtime.policy import (
    Fixed,
    Front,
    Policy,
    best_within,
    deadline,
    paced,
    prepare,
)
from edgebudget_runtime.profile import Profile

_DEADLINES = 5
_MISSES = 0.01
_POWER_W = 1.0

# (policy, deadline in milliseconds) -> (sub-network that answered, milliseconds)
Serve = Callable[[Policy, float], tuple[str, float]]


def main(arguments: list[str]) -> int:
    """Serve, replay, and compare with every fixed path."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.budget_kept")
    parser.add_argument("--artifact", type=Path)
    parser.add_argument("--real", type=int, default=10_000)
    parser.add_argument("--simulated", type=int, default=10_000)
    parser.add_argument("--loaders", type=int, default=1, help="processes that load the machine")
    options = parser.parse_args(arguments)
    artifact = elastic_artifact(options.artifact)
    if artifact is None:
        return 0
    with tempfile.TemporaryDirectory(prefix="edgebudget-") as folder:
        front, samples, servers = _compiled(artifact, Path(folder))
        unknown = [o.id for o in front.options if o.quality is None]
        if unknown:
            sys.stderr.write(f"the quality of {', '.join(unknown)} is not known\n")
            return 1
        usual = sorted(usual_ms(samples, o.path) for o in front.options)
        deadlines = [float(d) for d in np.geomspace(2 * usual[0], 2 * usual[-1], _DEADLINES)]
        with _burst_load.running(options.loaders):
            real = _real(front, servers, deadlines, options.real)
    simulated = _simulated(front, samples, deadlines, options.simulated)
    energy = _energy(front, samples, options.simulated)
    checks = {
        f"{name}: {text}": ok
        for name, found in (("real", real), ("simulated", simulated), ("energy", energy))
        for text, ok in _checks(found).items()
    }
    save(
        "budget_kept",
        {"subject": artifact.name,
         "deadlines_ms": deadlines, "loaders": options.loaders, "real": real,
         "simulated": simulated, "energy": energy, "ok": checks},
    )  # fmt: skip
    for text, ok in checks.items():
        sys.stderr.write(f"{'ok  ' if ok else 'MISS'} {text}\n")
    return 0 if all(checks.values()) else 1


def _real(
    front: Front, servers: Mapping[str, Serve], deadlines: Sequence[float], count: int
) -> dict[str, Any]:
    """Misses and mean quality of every policy at every deadline."""
    quality = {o.id: o.quality for o in front.options if o.quality is not None}
    policies: dict[str, Policy] = {"chosen": deadline, **{id: Fixed(id) for id in quality}}
    missed = {n: np.zeros(len(deadlines), int) for n in policies}
    total = {n: np.zeros(len(deadlines)) for n in policies}
    asked = np.zeros(len(deadlines), int)
    names = list(policies)
    for i in range(count):
        k = i % len(deadlines)
        asked[k] += 1
        for name in names[i % len(names) :] + names[: i % len(names)]:
            kind = "chosen" if name == "chosen" else "fixed"
            answered, ms = servers[kind](policies[name], deadlines[k])
            missed[name][k] += ms > deadlines[k]
            total[name][k] += quality[answered]
    fixed = [n for n in names if n != "chosen"]
    counts = np.any([missed[n] <= _MISSES * asked for n in fixed], axis=0)

    def summary(name: str) -> dict[str, Any]:
        requests = max(int(asked[counts].sum()), 1)
        return {
            "miss_share": float(missed[name][counts].sum() / requests),
            "quality": float(total[name][counts].sum() / requests),
            "misses_by_deadline": missed[name].tolist(),
            "quality_by_deadline": (total[name] / np.maximum(asked, 1)).tolist(),
        }

    return {
        "requests_by_deadline": asked.tolist(),
        "deadline_counts": counts.tolist(),
        "policies": {n: summary(n) for n in names},
    }


def _simulated(
    front: Front, samples: Samples, deadlines: Sequence[float], count: int
) -> dict[str, Any]:
    """The same without hardware, with requests that come in bursts too."""
    rate = 100.0 / max(usual_ms(samples, o.path) for o in front.options)  # one tenth busy
    requests = list(make("bursts", count=count, rate_per_s=rate, deadlines_ms=deadlines))
    found = {}
    for name, policy in _policies(front, deadline).items():
        done = replay(requests, front, samples, policy, name=name)
        # A miss that no path could have avoided is none.
        found[name] = {**dataclasses.asdict(done), "miss_share": done.avoidable / done.requests}
    return {"policies": found, "rate_per_s": rate}


def _energy(front: Front, samples: Samples, count: int) -> dict[str, Any]:
    """An energy store that gains what the mean of the cheapest and the dearest path takes."""
    modelled = prepare(
        [
            dataclasses.replace(o, energy_mj=_POWER_W * usual_ms(samples, o.path))
            for o in front.options
        ]
    )
    rate = 100.0 / max(modelled.energy_mj)
    income_mj = (min(modelled.energy_mj) + max(modelled.energy_mj)) / 2
    # The trace's own bursts ask more often: the mean rate is that of the made requests.
    requests = list(make("bursts", count=count, rate_per_s=rate))
    seen = count / requests[-1].at_s
    store = Store(capacity_mj=200 * income_mj, rate_mw=income_mj * seen)
    found = {}
    for name, policy in {**_policies(modelled, paced), "greedy": best_within}.items():
        done = replay(requests, modelled, samples, policy, name=name, store=store)
        found[name] = {**dataclasses.asdict(done), "miss_share": done.overspent / done.requests}
    return {"policies": found, "store": dataclasses.asdict(store), "power_w": _POWER_W}


def _policies(front: Front, chosen: Policy) -> dict[str, Policy]:
    return {"chosen": chosen, **{o.id: Fixed(o.id) for o in front.options}}


def _checks(found: Mapping[str, Any]) -> dict[str, bool]:
    policies = dict(found["policies"])
    chosen = policies.pop("chosen")
    policies.pop("greedy", None)  # not a fixed path
    rivals = [p["quality"] for p in policies.values() if p["miss_share"] <= _MISSES]
    return {
        "misses at most 1 %": chosen["miss_share"] <= _MISSES,
        "better than the best fixed path that misses at most 1 %": bool(rivals)
        and chosen["quality"] > max(rivals),
    }


def _compiled(artifact: Path, folder: Path) -> tuple[Front, Samples, dict[str, Serve]]:
    """A runner for the policy and one for the fixed paths, on an input of seeded noise."""
    from edgebudget_runtime.runner import Runner

    runners = {n: Runner(artifact, threads=1, profile=folder / n) for n in ("chosen", "fixed")}
    rng = np.random.default_rng(0)
    given = {
        t.name: rng.normal(size=[d or 1 for d in t.shape]).astype(t.dtype)
        for t in runners["chosen"].inputs
    }
    for runner in runners.values():
        runner.warm_up()
        runner.calibrate(given)
    manifest = runners["chosen"].manifest
    samples = Profile.decode((folder / "chosen").read_bytes()).samples_ms

    def server(runner: Runner) -> Serve:
        def serve(policy: Policy, deadline_ms: float) -> tuple[str, float]:
            start = time.perf_counter()
            outcome = runner.run(given, latency_ms=deadline_ms, policy=policy)
            return outcome.subnetwork, (time.perf_counter() - start) * 1e3

        return serve

    return prepare_front(manifest, samples), samples, {n: server(r) for n, r in runners.items()}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
