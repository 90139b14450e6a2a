"""Traces come back as they were written, and damaged ones are refused with their line."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgebudget_runtime.errors import ArtifactError, UsageError
from edgebudget_runtime.trace import Counters, Done, Request, Writer, line, read

HEADER = '{"schema": 1, "kind": "edgebudget trace"}\n'
positive = st.floats(0, 1e6)
names = st.text('abé\n"', max_size=5)
done = st.builds(
    Done,
    ran=st.lists(names, max_size=3).map(tuple),
    latency_ms=positive,
    energy_mj=st.none() | positive,
    broke=st.just(("latency_ms",)) | st.just(()),
    why=names,
)
requests = st.builds(
    Request,
    at_s=positive,
    input=names,
    latency_ms=st.none() | positive,
    energy_mj=st.none() | positive,
    slowdown=st.floats(1e-3, 1e3),
    quality=st.dictionaries(names, st.floats(-1, 1), max_size=3),
    confidence=st.dictionaries(names, st.floats(-1, 1), max_size=3),
    done=st.none() | done,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(items=st.lists(requests, max_size=8))
def test_a_trace_comes_back(items: list[Request], tmp_path: Path) -> None:
    items = sorted(items, key=lambda r: r.at_s)
    file = tmp_path / "t.jsonl"
    with Writer(file) as writer:
        for item in items:
            writer.write(item)
    assert writer.dropped == 0
    assert list(read(file)) == items


def test_a_line_says_only_what_is_known() -> None:
    assert line(Request(at_s=0.5, latency_ms=2)) == b'{"at_s":0.5,"latency_ms":2.0}\n'


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("", 1),
        ("[]\n", 1),
        (HEADER.replace("1", "2"), 1),
        (HEADER + '{"at_s": 1}\n{"at_s": 0.5}\n', 3),
        (HEADER + '{"at_s": -1}\n', 2),
        (HEADER + '{"at_s": NaN}\n', 2),
        (HEADER + '{"at_s": 1, "latency_ms": -1}\n', 2),
        (HEADER + '{"at_s": 1, "slowdown": 0}\n', 2),
        (HEADER + '{"at_s": 1, "what": 0}\n', 2),
        (HEADER + '{"at_s": 1, "quality": [1]}\n', 2),
        (HEADER + '{"at_s": 1, "done": {}}\n', 2),
        (HEADER + '{"at_s": 1, "input": "' + "x" * 70_000 + '"}\n', 2),
        (HEADER + "[" * 60_000 + "\n", 2),
        (HEADER + '{"at_s": 1', 2),
    ],
)
def test_a_damaged_trace_is_refused(text: str, number: int, tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    file.write_text(text)
    with pytest.raises(ArtifactError, match=f"EB582.* line {number}:"):
        list(read(file))


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="EB183"):
        list(read(tmp_path / "none.jsonl"))
    with pytest.raises(UsageError, match="EB183"):
        Writer(tmp_path / "none" / "t.jsonl")


def test_what_cannot_be_written_is_dropped_and_counted(tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    with Writer(file, most_bytes=100) as writer:
        for i in range(10):
            writer.write(Request(at_s=float(i)))
        writer.write(Request(at_s=11.0, done=Done(ran=("a",), latency_ms=math.inf)))
    writer.write(Request(at_s=12.0))
    kept = list(read(file))
    assert 0 < len(kept) < 10
    assert writer.dropped == 12 - len(kept)
    assert file.stat().st_size <= 100


def test_counters_count_paths_and_broken_limits() -> None:
    counters = Counters()
    counters.add_done(("a", "b"), ("latency_ms",))
    counters.add_done(("a", "b"), (), degraded=True)
    counters.add("drifts", 3)
    assert counters.counts() == {
        "broke latency_ms": 1,
        "degraded": 1,
        "drifts": 3,
        "ran a+b": 2,
        "requests": 2,
    }
