"""Find targets: built-ins by TOML description, third parties by entry point."""

from __future__ import annotations

import difflib
import importlib
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from edgebudget.layer_time import LayerTime
from edgebudget.target import Target, TargetSpec
from edgebudget_runtime.errors import EdgeBudgetError, TargetError, UnsupportedError, UsageError

# Families that a user may well ask for; building them is not done, and saying so beats a
# "did you mean". Each is a whole name, or a prefix up to ":", "-" or "/".
_PLANNED = ("npu:coreml", "cpu:openvino")


@dataclass(frozen=True, slots=True)
class _BuiltIn:
    factory: str  # "module:attribute", called with the spec
    spec: TargetSpec
    combine: str = ""  # the same, called with the targets of several devices: FAMILY/A+B
    is_device: bool = False  # one of a family's, not its own or another name


def names() -> tuple[str, ...]:
    """Every name that `get` accepts, without importing any target.

    Raises:
        UsageError: EB141, two targets have the same name.
    """
    return tuple(sorted({*_built_in(), *_third_party()}))


def families() -> tuple[str, ...]:
    """One name of each family of devices, its own, without importing any target.

    Raises:
        UsageError: EB141, two targets have the same name.
    """
    found = dict[str, str]()
    for name, target in _built_in().items():
        if not target.is_device:  # of a family's own names, the longest says most
            found[target.spec.name] = max(name, found.get(target.spec.name, ""), key=len)
    return tuple(sorted({*found.values(), *_third_party()}))


def get(name: str) -> Target:
    """Import and return one target.

    Raises:
        UsageError: EB140 no target has this name, EB141 two targets have the same name, EB146
            devices are joined that cannot share a file.
        UnsupportedError: EB240, this target is not built yet.
        TargetError: EB602, a third party's target cannot be loaded.
    """
    found = _built_in().get(name)
    if found is not None:
        make: Callable[[TargetSpec], Target] = _attribute(found.factory)
        return make(found.spec)
    if "+" in name:
        return _combined(name)
    entry = _third_party().get(name)
    if entry is not None:
        return _load(entry)
    raise _refusal(name)


def _attribute(place: str) -> Any:
    module, _, attr = place.partition(":")
    return getattr(importlib.import_module(module), attr)


def _combined(name: str) -> Target:
    """Several devices of one family as one target: `npu:hexagon/A+B`."""
    family, _, devices = name.partition("/")
    wanted = [d if "/" in d else f"{family}/{d}" for d in devices.split("+")]
    for one in wanted:
        if one not in _built_in():
            raise _refusal(one)
    combine = {_built_in()[one].combine for one in wanted}
    if len(combine) > 1 or "" in combine or len(set(wanted)) < len(wanted):
        raise UsageError(
            "EB146",
            f"{name!r} does not name several devices of one family that can share a file",
            hint="join different devices of one NPU family: "
            "npu:hexagon/snapdragon-8-gen2+snapdragon-8-gen3",
        )
    make: Callable[[list[Target]], Target] = _attribute(combine.pop())
    return make([get(one) for one in wanted])


@cache
def _built_in() -> Mapping[str, _BuiltIn]:
    spec = find_spec("edgebudget_targets")
    folders = list(spec.submodule_search_locations or []) if spec else []
    found: dict[str, _BuiltIn] = {}
    for file in sorted(f for folder in folders for f in Path(folder).glob("*.toml")):
        found |= _describe(tomllib.loads(file.read_text(encoding="utf-8")))
    return found


def _describe(table: Mapping[str, Any]) -> dict[str, _BuiltIn]:
    """Names of one description file: each device, then the bare name and its aliases."""
    base, factory, shared = table["name"], table["factory"], table["spec"]
    devices: Mapping[str, Mapping[str, Any]] = table.get("devices", {})
    if not devices:
        only = _BuiltIn(factory, _spec(base, shared, {}, ""))
        return dict.fromkeys([base, *table.get("aliases", [])], only)
    start = base + table.get("separator", "/")
    found = {
        f"{start}{key}": _BuiltIn(
            factory,
            _spec(f"{start}{key}", shared, own, key),
            table.get("combine", ""),
            is_device=True,
        )
        for key, own in devices.items()
    }
    default = replace(found[start + table["default"]], is_device=False)
    return found | dict.fromkeys([base, *table.get("aliases", [])], default)


def _spec(name: str, shared: Mapping[str, Any], own: Mapping[str, Any], device: str) -> TargetSpec:
    merged = {"max_fallback": None, **shared, **own, "name": name}
    if times := merged.pop("layer_times", None):
        merged["layer_time"] = LayerTime.read(times, device)
    merged["options"] = {**shared.get("options", {}), **own.get("options", {})}
    for key in ("activation_dtypes", "weight_dtypes", "tells"):
        merged[key] = tuple(merged.get(key, ()))
    return TargetSpec(**merged)


def _third_party() -> dict[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group="edgebudget.targets"):
        if entry.name in _built_in() or entry.name in found:
            other = found[entry.name].value if entry.name in found else "a built-in target"
            raise UsageError(
                "EB141",
                f"two targets are called {entry.name!r}: {other}, {entry.value}",
                hint="uninstall one of the packages",
            )
        found[entry.name] = entry
    return found


def _load(entry: EntryPoint) -> Target:
    try:
        target: Target = entry.load()()
        assert target.spec.name, "its spec has no name"
    except Exception as e:  # a stranger's code may raise anything
        raise TargetError(
            "EB602",
            f"target {entry.name!r} ({entry.value}) cannot be loaded: {type(e).__name__}: {e}",
            hint="repair or uninstall the package that brings it",
        ) from e
    return target


def _refusal(name: str) -> EdgeBudgetError:
    known = names()
    devices = [n for n, known_as in _built_in().items() if known_as.is_device]
    families = [n for n in known if n not in devices]
    there = f"there are {', '.join(families)}, and {len(devices)} devices such as {devices[0]}"
    for planned in _PLANNED:
        if name == planned or name.startswith((f"{planned}:", f"{planned}-", f"{planned}/")):
            return UnsupportedError("EB240", f"target {name!r} is not built yet", hint=there)
    # People also type a device alone, without its family.
    short = {n.rpartition("/")[2]: n for n in known}
    close = difflib.get_close_matches(name.lower(), [*known, *short], n=1, cutoff=0.5)
    meant = f"did you mean {short.get(close[0], close[0])!r}? " if close else ""
    return UsageError(
        "EB140",
        f"no target is called {name!r}",
        hint=f"{meant}{there} (`edgebudget targets` lists them)",
    )
