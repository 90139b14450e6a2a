"""The manifest round-trips, and its reader refuses everything that is not one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgebudget_runtime import Manifest
from edgebudget_runtime.errors import ArtifactError
from edgebudget_runtime.manifest import File, Segment

Json = Any
SAME_FILE = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def test_round_trips_to_the_same_bytes(artifact: Path) -> None:
    data = (artifact / "manifest.json").read_bytes()
    assert Manifest.load(artifact).encode() == data
    assert Manifest.decode(data) == Manifest.load(artifact)


def test_whole_numbers_and_floats_give_the_same_bytes(artifact: Path) -> None:
    loaded = Manifest.load(artifact)
    limit = dataclasses.replace(loaded.limits[0], bound=50)
    assert dataclasses.replace(loaded, limits=(limit,)).encode() == loaded.encode()


def test_a_figure_that_is_no_number_is_never_written(artifact: Path) -> None:
    loaded = Manifest.load(artifact)
    bad = dataclasses.replace(loaded.candidates[0], macs=float("nan"))
    with pytest.raises(ValueError, match="JSON compliant"):
        dataclasses.replace(loaded, candidates=(bad,)).save(artifact)


def places(value: Json, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Every place below the top of a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*path, key)
        if isinstance(inner, dict | list):
            yield from places(inner, (*path, key))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@given(data=st.data())
@settings(SAME_FILE, max_examples=200)
def test_a_mutated_manifest_gives_only_typed_errors(artifact: Path, data: st.DataObject) -> None:
    raw = json.loads((artifact / "manifest.json").read_text())
    place = data.draw(st.sampled_from(sorted(places(raw), key=str)))
    parent = raw
    for key in place[:-1]:
        parent = parent[key]
    last = place[-1]
    match data.draw(st.sampled_from(["drop", "replace", "rename"])):
        case "drop":
            del parent[last]
        case "replace":
            parent[last] = data.draw(json_values)
        case _ if isinstance(parent, dict):
            parent[data.draw(st.text(max_size=5))] = parent.pop(last)
    try:
        manifest = Manifest.decode(json.dumps(raw).encode())
    except ArtifactError as e:
        assert e.code in {"EB500", "EB501", "EB503", "EB507"}  # noqa: PT017 - any other is a bug
    else:  # the mutation was one of free text or a plausible number
        assert Manifest.decode(manifest.encode()) == manifest


@given(st.binary(max_size=200))
def test_bytes_that_are_no_manifest(data: bytes) -> None:
    with pytest.raises(ArtifactError, match=r"EB50[07]"):
        Manifest.decode(data)


@pytest.mark.parametrize(
    ("data", "code", "says"),
    [
        (b"", "EB500", "not valid JSON"),
        (b'{"name": "x', "EB500", "not valid JSON"),
        (b"\xff\xfe{}", "EB500", "UTF-8"),
        (b"[" * 500_000, "EB500", "too deeply"),
        (b"[]", "EB500", "not a JSON object"),
        (b" " * 16_000_001, "EB500", "larger than 16 MB"),
        (b'{"schema": 99}', "EB501", "schema 99, this runtime reads 1"),
        (b'{"schema": true}', "EB507", "a field 'name'"),
        (b'{"a": 1, "a": 2}', "EB500", "twice"),
        (b'{"a": NaN}', "EB500", "not a number"),
        (b'{"a": 1e999}', "EB500", "not a number"),
        (b'{"a": ' + b"9" * 5000 + b"}", "EB500", "not valid JSON"),
    ],
    ids=lambda v: repr(v)[:20],
)
def test_says_what_is_wrong(data: bytes, code: str, says: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        Manifest.decode(data)
    assert caught.value.code == code
    assert says in caught.value.what


def test_names_the_place_and_what_it_found(artifact: Path) -> None:
    raw = json.loads((artifact / "manifest.json").read_text())
    raw["segments"][1]["bytes"] = "many"
    with pytest.raises(ArtifactError, match="EB507") as caught:
        Manifest.decode(json.dumps(raw).encode())
    assert caught.value.what == (
        "manifest.json at $.segments[1].bytes: expected a whole number, found 'many'"
    )


def test_a_folder_without_a_manifest(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="EB500"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize(
    "file",
    ["../x.onnx", "/etc/passwd", "a/../../x", "a//b", "", ".", "a/.", "a\\b", "C:x", "a\0b", "~/x"],
)
def test_a_path_cannot_leave_the_folder(file: str) -> None:
    with pytest.raises(ArtifactError, match="EB503"):
        File(file, "0" * 64, 1)
    with pytest.raises(ArtifactError, match="EB503"):
        Segment("id", file, "0" * 64, 1, (), ())


def test_a_limit_cannot_hold_on_a_value_beyond_it(artifact: Path) -> None:
    limit = Manifest.load(artifact).limits[0]
    with pytest.raises(ValueError, match="holds"):
        dataclasses.replace(limit, bound=5.0)


def test_a_path_names_known_segments(artifact: Path) -> None:
    loaded = Manifest.load(artifact)
    with pytest.raises(ValueError, match="known segments"):
        dataclasses.replace(loaded, segments=loaded.segments[:1])
