"""The report says everything the manifest says, escapes it, and needs nothing else."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgebudget import report_svg
from edgebudget.report import render
from edgebudget.report_markup import amount, ratio, si, tag
from edgebudget_runtime import manifest as m
from edgebudget_runtime.cost import UNKNOWN, Cost, counted

VOID = {"meta", "br"}


class Page(HTMLParser):
    """Checks that every element is closed, and collects text and attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.names: set[str] = set()
        self.words = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.names |= {name for name, _ in attrs}
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def test_says_everything(artifact: Path) -> None:
    manifest = m.Manifest.load(artifact)
    page = Page(render(manifest))
    files = [f for s in manifest.segments for f in s.files()]
    wanted = [
        "All 2 limits hold",
        *(f.sha256 for f in files),
        *manifest.notes,
        *(p.name for p in manifest.passes),
        *(n.what for p in manifest.passes for n in (*p.did, *p.declined)),
        *(n.why for p in manifest.passes for n in p.declined),
        *(c.label for c in manifest.candidates),
        *(x.why for x in (manifest.placement.fallback if manifest.placement else ())),
        *manifest.provenance.versions,
        *manifest.provenance.data.values(),
        "median of 50 runs",
        "0.9000",
        "0.8800 to 0.9200",
    ]
    for text in wanted:
        assert text in page.words


def test_needs_nothing_else_and_repeats(artifact: Path) -> None:
    text = render(m.Manifest.load(artifact))
    page = Page(text)
    assert not page.names & {"src", "href", "srcset", "onload", "onclick"}
    assert not page.tags.keys() & {"script", "link", "img", "iframe", "object"}
    assert not re.search(r"url\(|@import|https?:", text)
    assert text == render(m.Manifest.load(artifact))


def named(plain: m.Manifest, text: str) -> m.Manifest:
    """A manifest with `text` wherever free text may stand."""
    note = m.Note(text, text, text)
    return dataclasses.replace(
        plain,
        name=text,
        notes=(text,),
        candidates=(dataclasses.replace(plain.candidates[0], label=text),),
        passes=(dataclasses.replace(plain.passes[0], did=(note,), config={text: text}),),
        layers_after=(m.Layer(text, text, 6.0, 6.0, text),),
        placement=m.Placement("npu", {text: 1}, (m.FallbackNode(text, text, text, text),)),
        target=m.TargetInfo(text, text, text),
    )


@given(
    st.text(min_size=1, max_size=9)
    | st.sampled_from(["<script>x</script>", '"><img src=x>', "</style>", "\ud800"])
)
@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=25
)
def test_no_text_becomes_markup(artifact: Path, text: str) -> None:
    plain = m.Manifest.load(artifact)
    page = render(named(plain, text))
    assert page.encode("utf-8")
    assert Page(page).tags == Page(render(named(plain, "x"))).tags


def test_a_missed_limit_is_not_hidden(artifact: Path) -> None:
    plain = m.Manifest.load(artifact)
    missed = m.ProvenLimit("energy_mj", 5.0, "mean", UNKNOWN, False)
    page = Page(render(dataclasses.replace(plain, limits=(*plain.limits, missed))))
    assert "1 of 3 limits not proven" in page.words
    assert "All" not in page.words.split("limits not proven")[0]


def test_a_bare_manifest_still_makes_a_page(artifact: Path) -> None:
    plain = m.Manifest.load(artifact)
    bare = dataclasses.replace(
        plain,
        limits=(),
        quality_limits=(),
        placement=None,
        passes=(),
        candidates=(),
        layers_before=(),
        layers_after=(),
        notes=(),
        baseline=m.Baseline(Cost()),
        subnetworks=(m.SubNetwork("main", ("stem",), Cost(), None, None),),
    )
    words = Page(render(bare)).words
    assert "No limit was asked for" in words
    assert "quality was not evaluated" in words


def test_a_limit_of_zero_and_of_everything(artifact: Path) -> None:
    plain = m.Manifest.load(artifact)
    limits = (
        m.ProvenLimit("fallback_nodes", 0.0, "max", counted(0, "placed"), True),
        m.ProvenLimit("fallback_nodes", 0.0, "max", counted(3, "placed"), False),
    )
    quality = (m.ProvenQuality("max_drop", 0.01, None, False),)
    page = Page(render(dataclasses.replace(plain, limits=limits, quality_limits=quality)))
    assert "2 of 3 limits not proven" in page.words


finite = st.floats(-1e15, 1e15, allow_nan=False)


@given(st.lists(finite, min_size=1, max_size=5), st.booleans())
def test_axes_hold_their_values_and_have_few_ticks(values: list[float], zero: bool) -> None:
    values = [abs(v) for v in values] if zero else values
    axis = report_svg.axis(values, 0.0, 100.0, zero=zero)
    assert all(-1e-6 <= axis.at(v) <= 100 + 1e-6 for v in values)
    assert all(-1e-3 <= axis.at(t) <= 100 + 1e-3 for t in axis.ticks)
    assert len(axis.ticks) <= 8


@given(
    st.lists(
        st.builds(
            m.Candidate,
            st.text(max_size=20),
            st.floats(0, 1e12),
            st.none() | st.floats(-1, 1),
            st.booleans(),
        ),
        min_size=1,
        max_size=8,
    ).filter(lambda cs: any(c.quality is not None for c in cs)),
    st.none() | st.floats(1, 1e12),
)
@settings(deadline=None, max_examples=40)
def test_any_candidates_can_be_drawn(cands: list[m.Candidate], bound: float | None) -> None:
    page = Page(report_svg.scatter(cands, "top1", bound))
    assert page.tags["circle"] == len(cands)


def test_numbers_for_people() -> None:
    assert amount("macs", 49.83e9) == "49.83 GMACs"
    assert amount("size_bytes", 4_000_000) == "4 MB"
    assert amount("size_bytes", 1500) == "1.5 KB"
    assert amount("latency_ms", 9.123456) == "9.123 ms"
    assert amount("params", None) == "unknown"
    assert si(999.0) == "999"
    assert ratio(200, 100) == "−50.0\u00a0%"  # noqa: RUF001
    assert ratio(None, 3) == ""
    assert ratio(0, 3) == ""
    assert ratio(0, 0) == "same"


def test_attributes_are_escaped_too() -> None:
    with pytest.raises(AssertionError):
        Page("<p>")
    assert tag("p", "a<b", class_='"x"') == '<p class="&quot;x&quot;">a&lt;b</p>'
