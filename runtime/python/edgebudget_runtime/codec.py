"""Frozen dataclasses to plain JSON and back, with nothing guessed on the way in."""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from edgebudget_runtime.errors import ArtifactError

_SHOWN = 60  # characters of an offending value worth showing


def wrong(path: str, expected: str, found: Any) -> ArtifactError:
    """The error for one field that is not what it must be."""
    text = repr(found)
    shown = text if len(text) <= _SHOWN else text[:_SHOWN] + "…"
    return ArtifactError(
        "EB507",
        f"manifest.json at {path}: expected {expected}, found {shown}",
        hint="the manifest was damaged or edited by hand; compile again",
    )


@cache
def hints(kind: type) -> Mapping[str, Any]:
    """Field name to resolved type, for one dataclass."""
    resolved = get_type_hints(kind)
    return {f.name: resolved[f.name] for f in fields(kind)}


def encode(kind: Any, value: Any) -> Any:
    """Plain JSON values of `value`, which has the type `kind`.

    Numbers in float fields become floats, so that 5 and 5.0 give the same bytes.
    """
    if is_dataclass(kind):
        assert isinstance(kind, type)
        return {name: encode(k, getattr(value, name)) for name, k in hints(kind).items()}
    if value is None or kind is Any:
        return value
    origin, args = get_origin(kind), get_args(kind)
    if origin is tuple:
        return [encode(args[0], v) for v in value]
    if origin is Mapping:
        return {k: encode(args[1], v) for k, v in value.items()}
    if origin in (Union, types.UnionType):
        return encode(_only(args), value)
    return float(value) if kind is float else value


def decode(kind: Any, value: Any, path: str = "$") -> Any:
    """An object of type `kind` from plain JSON values.

    Raises:
        ArtifactError: EB507 a field is missing, unknown, of the wrong type or impossible.
    """
    if is_dataclass(kind):
        assert isinstance(kind, type)
        return _decode_object(kind, value, path)
    if kind is Any:
        return value
    origin, args = get_origin(kind), get_args(kind)
    if origin is tuple:
        if not isinstance(value, list):
            raise wrong(path, "a list", value)
        return tuple(decode(args[0], v, f"{path}[{i}]") for i, v in enumerate(value))
    if origin is Mapping:
        if not isinstance(value, dict):
            raise wrong(path, "an object", value)
        return {k: decode(args[1], v, f"{path}[{k!r}]") for k, v in value.items()}
    if origin in (Union, types.UnionType):
        return None if value is None else decode(_only(args), value, path)
    if origin is Literal:
        if not isinstance(value, str) or value not in args:
            raise wrong(path, "one of " + ", ".join(map(str, args)), value)
        return value
    return _decode_scalar(kind, value, path)


def _decode_object(kind: type, value: Any, path: str) -> Any:
    if not isinstance(value, dict):
        raise wrong(path, "an object", value)
    known = hints(kind)
    for name in value:
        if name not in known:
            raise wrong(path, f"only the fields {', '.join(known)}", name)
    parts: dict[str, Any] = {}
    for name, field_kind in known.items():
        if name not in value:
            raise wrong(path, f"a field {name!r}", sorted(value))
        parts[name] = decode(field_kind, value[name], f"{path}.{name}")
    try:
        return kind(**parts)
    except ValueError as e:  # the class's own rules
        raise wrong(path, str(e), value) from None


def _decode_scalar(kind: type, value: Any, path: str) -> Any:
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise wrong(path, "a finite number", value)
        return number
    names = {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}
    if type(value) is not kind:
        raise wrong(path, names[kind], value)
    return value


def _only(args: tuple[Any, ...]) -> Any:
    """The one type beside None in an optional field."""
    (kind,) = (a for a in args if a is not types.NoneType)
    return kind
