"""`targets`, `passes`, `models`, `doctor` and `cache`."""

from __future__ import annotations

import ast
import dataclasses
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgebudget.cli import options as o
from edgebudget.cli.output import write, write_json, write_table
from edgebudget.cli.progress import listening
from edgebudget_runtime.errors import EdgeBudgetError

if TYPE_CHECKING:
    from edgebudget.cache import Entry
    from edgebudget.target import Availability

_DAY_S = 86_400.0


def register(app: typer.Typer) -> None:
    """Add this file's commands."""
    for command in (targets, passes, models, doctor):
        app.command()(command)
    app.add_typer(_cache, name="cache")


def targets(as_json: o.Json = False) -> None:
    """List where a model can be compiled for, and whether that works here."""
    with listening():
        found = _targets()
    if as_json:
        write_json(found)
        return
    rows = [
        [
            x["name"],
            x["device"],
            x["engine"],
            "yes" if x["available"] else "no",
            "" if x["available"] else f"{x['why']}; {x['install']}".strip("; "),
        ]
        for x in found
    ]
    write_table(["target", "device", "engine", "works here", ""], rows)


def _targets() -> list[dict[str, Any]]:
    from edgebudget import target_registry

    asked: dict[str, Availability] = {}  # the devices of an engine share one answer
    found: list[dict[str, Any]] = []
    for name in target_registry.names():
        try:
            target = target_registry.get(name)
            spec = target.spec
            state = asked.get(spec.engine) or target.available()
            asked[spec.engine] = state
        except EdgeBudgetError as e:
            found.append({"name": name, "device": "", "engine": "", "available": False,
                          "why": e.what, "install": e.hint})  # fmt: skip
            continue
        found.append(
            {
                **{k: v for k, v in dataclasses.asdict(spec).items() if k != "name"},
                "name": name,
                "means": spec.name,
                "available": state.ok,
                "version": state.version,
                "why": state.why,
                "install": state.install,
            }
        )
    return found


def passes(as_json: o.Json = False) -> None:
    """List the transformations a plan can be made of."""
    from edgebudget import registry

    found = [
        {"name": name, "summary": _summary(place.partition(":")[0]), "module": place}
        for name, place in sorted(registry.names().items())
    ]
    if as_json:
        write_json(found)
    else:
        write_table(["pass", "what it does"], [[x["name"], x["summary"]] for x in found])


def _summary(module: str) -> str:
    """The first line of a module's docstring, without importing the module."""
    spec = find_spec(module)
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        return ""
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    return (ast.get_docstring(tree) or "").partition("\n")[0]


def models(as_json: o.Json = False) -> None:
    """List the models of the zoo."""
    from edgebudget_models import catalogue

    found: list[dict[str, Any]] = []
    for name in catalogue.names():
        entry = catalogue.get(name)
        found.append(
            {
                "name": name,
                "task": entry.task,
                "metric": entry.metric,
                "input_shape": list(entry.input_shape),
                "needs_data": entry.needs_data,
                "weights": entry.weights_path.is_file(),
                "summary": entry.summary,
            }
        )
    if as_json:
        write_json(found)
        return
    rows = [
        [
            x["name"],
            f"{x['task']} ({x['metric']})",
            "x".join(map(str, x["input_shape"])),
            "--data" if x["needs_data"] else "built in",
            "yes" if x["weights"] else "no",
            x["summary"],
        ]
        for x in found
    ]
    write_table(["model", "task", "input", "data", "weights", ""], rows)


def doctor(as_json: o.Json = False) -> None:
    """Say what works on this machine, and how to get what does not."""
    from edgebudget.doctor import diagnose

    with listening():
        found = diagnose()
    if as_json:
        write_json(found)
        return
    marks = {True: "ok", False: "missing", None: "optional"}
    rows = [
        [x["kind"], x["name"], marks[x["ok"]], x["version"],
         "; ".join(t for t in (x["why"], x["install"]) if t)]
        for x in found
    ]  # fmt: skip
    write_table(["", "", "", "version", ""], rows)


_cache = typer.Typer(help="Look at and clean what compiles keep to resume from.")


@_cache.command("ls")
def cache_ls(as_json: o.Json = False) -> None:
    """List what is kept, the least recently used first."""
    from edgebudget.cache import Cache

    cache = Cache()
    _show_entries(str(cache.folder), cache.ls(), "kept", as_json)


@_cache.command("gc")
def cache_gc(
    max_size: Annotated[
        str | None, typer.Option("--max-size", help="Keep at most this much: 2GB.")
    ] = None,
    older_than_days: Annotated[
        float | None, typer.Option("--older-than-days", min=0, help="Remove what is unused since.")
    ] = None,
    as_json: o.Json = False,
) -> None:
    """Remove old entries, and what killed compiles left behind."""
    from edgebudget.cache import Cache
    from edgebudget_runtime.budget import Budget

    limit = Budget.parse(size=max_size).limit("size_bytes")
    cache = Cache()
    gone = cache.gc(
        max_bytes=None if limit is None else int(limit),
        older_than_s=None if older_than_days is None else older_than_days * _DAY_S,
    )
    _show_entries(str(cache.folder), list(gone), "removed", as_json)


def _show_entries(folder: str, entries: list[Entry], what: str, as_json: bool) -> None:
    total = sum(e.bytes for e in entries)
    if as_json:
        listed = [dataclasses.asdict(e) for e in entries]
        write_json({"folder": folder, what: listed, "bytes": total})
        return
    if entries:
        write_table(["entry", "bytes"], [[e.key[:16], str(e.bytes)] for e in entries])
    write(f"{len(entries)} entries {what}, {total / 1e6:.1f} MB, in {folder}")
