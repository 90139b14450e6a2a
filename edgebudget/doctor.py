"""What works on this machine, and how to get what does not."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from importlib.metadata import PackageNotFoundError, version
from typing import TypedDict

from edgebudget import target_registry
from edgebudget.cpu_features import cpu_features
from edgebudget.energy import LOCAL_COUNTERS
from edgebudget_runtime.errors import EdgeBudgetError
from edgebudget_runtime.measure.probe import find_counter

_COMPILE = 'pip install "edgebudget[compile]"'
# Distribution -> how to get it; the engines are asked through their targets.
_LIBRARIES = {
    "numpy": "pip install edgebudget",
    "onnxruntime": "pip install edgebudget",
    "torch": _COMPILE,
    "onnx": _COMPILE,
    "onnxscript": _COMPILE,
    "torch-pruning": _COMPILE,
    "transformers": 'pip install "edgebudget[hf]"',
}
_OPTIONAL = {"transformers"}
_DISK_BYTES = 2 * 10**9  # a compile of the largest built-in model with its checkpoints


class Finding(TypedDict):
    """One line of the diagnosis; `ok` is None where a thing is optional and absent."""

    kind: str  # "machine", "library", "engine", "energy"
    name: str
    ok: bool | None
    version: str
    why: str
    install: str


def diagnose() -> list[Finding]:
    """Look at the machine, the libraries and every engine; imports neither torch nor onnx."""
    return [*_machine(), *map(_library, _LIBRARIES), *_engines(), *_energy()]


def _finding(
    kind: str, name: str, ok: bool | None, version: str = "", why: str = "", install: str = ""
) -> Finding:
    return Finding(kind=kind, name=name, ok=ok, version=version, why=why, install=install)


def _machine() -> list[Finding]:
    cpu = cpu_features()
    flags = ", ".join(sorted(cpu.flags)) or "no 8-bit instructions known"
    cores = os.cpu_count() or 1
    slow = "no VNNI: 8-bit models gain little here, and may clip" if cpu.saturates else ""
    found = [
        _finding("machine", "python", True, platform.python_version()),
        _finding("machine", "cpu", True, f"{cpu.model}, {cores} cores ({flags})", slow),
    ]
    for name, folder in (("disk here", "."), ("disk for scratch", tempfile.gettempdir())):
        free = shutil.disk_usage(folder).free
        why = "" if free >= _DISK_BYTES else f"a compile may need {_DISK_BYTES / 1e9:.0f} GB"
        found.append(_finding("machine", name, not why, f"{free / 1e9:.1f} GB free", why))
    return found


def _library(name: str) -> Finding:
    try:
        return _finding("library", name, True, version(name))
    except PackageNotFoundError:
        ok = None if name in _OPTIONAL else False
        return _finding("library", name, ok, "", "not installed", _LIBRARIES[name])


def _engines() -> list[Finding]:
    """One line per engine: the devices of a family share theirs."""
    found: dict[str, Finding] = {}
    for name in target_registry.names():
        if "/" in name:
            continue
        try:
            target = target_registry.get(name)
            engine = f"{target.spec.engine} ({target.spec.family})"
            state = target.available()
        except EdgeBudgetError as e:
            found[name] = _finding("engine", name, False, "", e.what, e.hint)
            continue
        install = "" if state.ok else state.install
        found[engine] = _finding("engine", engine, state.ok, state.version, state.why, install)
    return list(found.values())


def _energy() -> list[Finding]:
    """What this machine tells of its energy, without which that of an inference is unknown."""
    found = []
    for family in ("cpu", "gpu"):
        counter, why = find_counter(family, LOCAL_COUNTERS)
        name = "" if counter is None else counter.name
        found.append(_finding("energy", family, None if counter is None else True, name, why))
    return found
