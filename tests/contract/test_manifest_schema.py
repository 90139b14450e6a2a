"""`runtime/manifest.schema.json` says what the Python reader takes.

It is made from the dataclasses: `EDGEBUDGET_GOLDEN=1 pytest tests/contract/test_manifest_schema.py`
writes it anew after a change, to be reviewed as code.
"""

from __future__ import annotations

import json
import os
import types
from collections.abc import Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgebudget_runtime import codec
from edgebudget_runtime.errors import ArtifactError
from edgebudget_runtime.manifest import SCHEMA, Manifest

jsonschema: Any = pytest.importorskip("jsonschema")
FILE = Path(__file__).parents[2] / "runtime/manifest.schema.json"
SCALARS = {str: "string", int: "integer", float: "number", bool: "boolean"}
Schema = dict[str, Any]


def schema_of(kind: Any, definitions: Schema) -> Schema:
    """The JSON schema of one type; dataclasses go to `definitions`."""
    origin, args = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        assert isinstance(kind, type)
        if kind.__name__ not in definitions:
            definitions[kind.__name__] = {}  # stops recursion
            fields = codec.hints(kind)
            definitions[kind.__name__] = {
                "type": "object",
                "description": (kind.__doc__ or "").split("\n")[0],
                "properties": {k: schema_of(v, definitions) for k, v in fields.items()},
                "required": sorted(fields),
                "additionalProperties": False,
            }
        return {"$ref": f"#/$defs/{kind.__name__}"}
    if kind is Any:
        return {}
    if origin is tuple:
        return {"type": "array", "items": schema_of(args[0], definitions)}
    if origin is Mapping:
        return {"type": "object", "additionalProperties": schema_of(args[1], definitions)}
    if origin in (Union, types.UnionType):
        return {"anyOf": [schema_of(a, definitions) for a in args]}
    if origin is Literal:
        return {"enum": list(args)}
    return {"type": "null" if kind is types.NoneType else SCALARS[kind]}


def made() -> str:
    definitions: Schema = {}
    top = schema_of(Manifest, definitions)
    definitions["Manifest"]["properties"]["schema"] = {"const": SCHEMA}
    whole = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "edgebudget artifact manifest",
        "description": "Types only; a reader also checks hashes, paths and references.",
        **top,
        "$defs": definitions,
    }
    return json.dumps(whole, indent=1, sort_keys=True) + "\n"


def test_the_file_is_up_to_date() -> None:
    if os.environ.get("EDGEBUDGET_GOLDEN"):
        FILE.write_text(made())
    assert FILE.read_text() == made()


@pytest.fixture(scope="module")
def validator() -> Any:
    schema = json.loads(FILE.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_a_manifest_is_valid(artifact: Path, validator: Any) -> None:
    validator.validate(json.loads((artifact / "manifest.json").read_text()))


@given(data=st.data())
@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=100
)
def test_what_the_schema_refuses_the_reader_refuses(
    artifact: Path, validator: Any, data: st.DataObject
) -> None:
    raw = json.loads((artifact / "manifest.json").read_text())
    parent = raw
    while True:
        key = data.draw(st.sampled_from(sorted(parent) if isinstance(parent, dict) else [0]))
        inner = parent[key]
        if not isinstance(inner, dict | list) or not inner or data.draw(st.booleans()):
            break
        parent = inner
    values = st.sampled_from([None, True, 3, 2.5, "text", [], {}, [1], {"a": 1}])
    parent[key] = data.draw(values)
    if validator.is_valid(raw):
        return  # the reader may still refuse: it also checks meaning
    with pytest.raises(ArtifactError):
        Manifest.decode(json.dumps(raw).encode())
