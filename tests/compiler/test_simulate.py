"""Replays are exact where arithmetic tells the answer, and rank policies as they should."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgebudget import make_trace
from edgebudget.cli import main
from edgebudget.simulate import Store, prepare_front, replay, segment_samples
from edgebudget_runtime import manifest as m
from edgebudget_runtime.cost import Cost, Figure, counted
from edgebudget_runtime.device_id import here
from edgebudget_runtime.errors import UsageError
from edgebudget_runtime.policy import Policy, named
from edgebudget_runtime.profile import Profile, digest, save
from edgebudget_runtime.trace import Request, Writer, read

Capture = pytest.CaptureFixture[str]


def manifest(latencies: tuple[float | None, ...] = (2.0, 4.0, 8.0)) -> m.Manifest:
    """One chain of three exits."""
    ids = ("s0", "s1", "s2")
    segments = tuple(
        m.Segment(s, f"segments/{s}.onnx", "0" * 64, 1, (), (), macs=10.0) for s in ids
    )
    subnetworks = tuple(
        m.SubNetwork(
            f"exit{k + 1}",
            ids[: k + 1],
            Cost(
                macs=counted(10.0 * (k + 1), "counted"),
                latency_ms=Figure(value=ms, evidence="unknown" if ms is None else "measured"),
            ),
            m.Quality("accuracy", 0.7 + 0.1 * k, 0.0, 1.0, 100),
            None,
        )
        for k, ms in enumerate(latencies)
    )
    point = m.OperatingPoint("half", ids, {"s0": 0.8, "s1": 0.8}, {}, Cost(), None, None)
    return m.Manifest(
        name="chain",
        target=m.TargetInfo("cpu", "onnxruntime-cpu", "here"),
        workload=m.WorkloadInfo("chain", "classification", "accuracy", "0" * 64),
        preprocessing={},
        segments=segments,
        subnetworks=subnetworks,
        limits=(),
        quality_limits=(),
        placement=None,
        baseline=m.Baseline(Cost()),
        passes=(),
        candidates=(),
        layers_before=(),
        layers_after=(),
        provenance=m.Provenance({}, 0),
        exits=tuple(m.Exit(s, "scores", "max_softmax", 1.0) for s in ids[:2]),
        operating_points=(point,),
    )


CHAIN = manifest()
SAMPLES = segment_samples(CHAIN, None)
FRONT = prepare_front(CHAIN, SAMPLES)
# As measured on a calm device, with some jitter.
JITTERED = {
    s: tuple(float(x) for x in ms * np.random.default_rng(i).lognormal(0.0, 0.08, 200))
    for i, (s, ms) in enumerate([("s0", 2.0), ("s1", 2.0), ("s2", 4.0)])
}


def policy(name: str) -> Policy:
    return named(name, CHAIN)


def run(requests: list[Request], name: str, **more: Any) -> Any:
    return replay(requests, FRONT, SAMPLES, policy(name), name=name, **more)


def test_a_manifest_tells_what_each_segment_takes() -> None:
    assert SAMPLES == {"s0": (2.0,), "s1": (2.0,), "s2": (4.0,)}
    with pytest.raises(UsageError, match="EB184"):
        segment_samples(manifest((None, None, None)), None)
    # Only the whole is known: shared out by MACs.
    assert segment_samples(manifest((None, None, 9.0)), None)["s2"] == (3.0,)


def test_requests_wait_for_each_other() -> None:
    requests = [Request(at_s=0.0, latency_ms=9.0), Request(at_s=0.002, latency_ms=9.0)]
    found = run(requests, "fixed:exit3")
    assert (found.late, found.avoidable) == (1, 1)  # 6 ms of waiting and 8 of its own
    assert (found.p50_ms, found.ran) == (11.0, {"exit3": 2})
    assert found.quality == pytest.approx(0.9)
    assert found.quality_in_time == pytest.approx(0.45)


def test_a_deadline_that_nothing_keeps_is_not_avoidable() -> None:
    found = run([Request(at_s=0.0, latency_ms=1.0), Request(at_s=1.0, slowdown=2, latency_ms=3)],
                "deadline")  # fmt: skip
    assert (found.late, found.avoidable, found.ran) == (2, 0, {"exit1": 2})


def test_a_chain_ends_where_it_is_sure_enough() -> None:
    sure = [{"s0": 0.9}, {"s0": 0.5, "s1": 0.9}, {"s0": 0.5, "s1": 0.5}]
    right = [{"exit1": 1.0}, {"exit2": 1.0}, {"exit3": 0.0}]
    requests = [
        Request(at_s=float(i), confidence=s, quality=q)
        for i, (s, q) in enumerate(zip(sure, right, strict=True))
    ]
    found = run(requests, "point:half")
    assert found.ran == {"exit1": 1, "exit2": 1, "exit3": 1}
    assert found.quality == pytest.approx(2 / 3)


def test_energy_is_counted_and_paced() -> None:
    front = prepare_front(CHAIN, SAMPLES, power_w=0.5)  # 1, 2 and 4 mJ
    requests = [Request(at_s=6.0 * (i // 60) + 0.01 * (i % 60)) for i in range(3000)]
    store = Store(capacity_mj=150.0, rate_mw=20.0)  # 2 mJ a request, which come in groups of 60
    found: dict[str, Any] = {
        n: replay(requests, front, SAMPLES, policy(n), name=n, store=store)
        for n in ("paced", "fixed:exit3", "best")
    }
    assert found["fixed:exit3"].energy_mj == 4.0
    assert found["fixed:exit3"].overspent > 1000
    paced, greedy = found["paced"], found["best"]
    assert paced.energy_mj == pytest.approx(2.0, rel=0.05)
    assert paced.overspent == 0
    assert greedy.overspent > 0  # what comes late in a group finds the store empty
    assert paced.quality > greedy.quality
    with pytest.raises(UsageError, match="EB184"):
        run(requests, "paced", store=store)


def test_an_allowance_in_the_trace_is_kept_where_energy_is_known() -> None:
    requests = [Request(at_s=0.0, energy_mj=2.5)]
    front = prepare_front(CHAIN, SAMPLES, power_w=0.5)
    found = replay(requests, front, SAMPLES, policy("deadline"), name="")
    assert (found.ran, found.overspent) == ({"exit2": 1}, 0)
    unknown = run(requests, "deadline")
    assert (unknown.overspent, unknown.energy_mj) == (1, None)


@pytest.mark.parametrize("kind", ["bursts", "throttling"])
def test_choosing_beats_every_fixed_path_that_is_as_punctual(kind: str) -> None:
    requests = list(
        make_trace.make(kind, count=6000, rate_per_s=8, deadlines_ms=(5, 7, 9, 14, 24), seed=1)
    )
    found: dict[str, Any] = {
        n: replay(requests, FRONT, JITTERED, policy(n), name=n)
        for n in ("deadline", "fixed:exit1", "fixed:exit2", "fixed:exit3")
    }
    chosen = found.pop("deadline")
    assert chosen.avoidable / chosen.requests <= 0.01
    punctual = [r for r in found.values() if r.avoidable / r.requests <= 0.01]
    assert all(chosen.quality > r.quality for r in punctual)


def test_replays_and_traces_repeat() -> None:
    def once() -> Any:
        made = make_trace.make("bursts", count=300, rate_per_s=50, deadlines_ms=(5, 9), seed=3)
        return replay(made, FRONT, JITTERED, policy("deadline"), name="", seed=2)

    assert once() == once()


@pytest.mark.parametrize("kind", make_trace.KINDS)
def test_made_traces(kind: str, tmp_path: Path) -> None:
    made = list(make_trace.make(kind, count=2000, rate_per_s=10, energy_mj=5.0, seed=0))
    with Writer(tmp_path / "t") as writer:
        for request in made:
            writer.write(request)
    assert list(read(tmp_path / "t")) == made
    slow = {r.slowdown for r in made}
    assert (max(slow) >= 1.9) == (kind in ("bursts", "throttling"))
    assert 1.0 in slow
    assert (made[-1].energy_mj == pytest.approx(1.0, rel=0.01)) == (kind == "battery")


@pytest.mark.parametrize(
    "wrong",
    [{"kind": "x"}, {"rate_per_s": 0}, {"deadlines_ms": (-1,)}, {"kind": "battery"}, {"count": 0}],
)
def test_traces_that_cannot_be_made(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="EB184"):
        make_trace.make(**{"kind": "steady", "count": 1, "rate_per_s": 1.0, **wrong})


def test_the_command(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEBUDGET_CACHE", str(tmp_path / "cache"))
    artifact, trace = tmp_path / "a", tmp_path / "t.jsonl"
    artifact.mkdir()
    CHAIN.save(artifact)
    arguments = ["simulate", str(trace), "--make", "bursts", "--count", "200"]
    assert main(arguments) == 0
    assert len(list(read(trace))) == 200
    arguments += ["--artifact", str(artifact), "--json"]
    assert main([*arguments, "--power", "0.5", "--policy", "deadline", "--policy", "paced"]) == 0
    capsys.readouterr()
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    names = ["deadline", "best", "fixed:exit1", "fixed:exit2", "fixed:exit3"]
    assert [r["policy"] for r in found] == names
    profile = Profile(artifact=digest(artifact), device=here("e", "1", 1), samples_ms=JITTERED)
    save(profile, tmp_path / "cache" / "profiles" / f"{digest(artifact)[:32]}-x.json")
    assert main(["simulate", str(trace), "--artifact", str(artifact)]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("200 requests\n")
    assert "profile " in err


@pytest.mark.parametrize(
    ("more", "code"),
    [
        ([], "EB184"),
        (["--artifact", "A", "--policy", "x"], "EB180"),
        (["--artifact", "A", "--profile", "none"], "EB184"),
        (["--artifact", "A", "--battery", "1J"], "EB184"),
        (["--artifact", "A", "--income", "1"], "EB184"),
        (["--artifact", "A"], "EB183"),
        (["--make", "steady", "--deadlines", "x"], "EB184"),
    ],
)
def test_the_command_refuses(
    more: list[str], code: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEBUDGET_CACHE", str(tmp_path / "cache"))
    CHAIN.save(tmp_path)
    given = [str(tmp_path) if x == "A" else x for x in more]
    assert main(["simulate", str(tmp_path / "t.jsonl"), *given]) != 0
    out, err = capsys.readouterr()
    assert out == ""
    assert f"[{code}]" in err
