"""The error table and the codes in the sources are the same."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

from edgebudget_runtime import errors

ROOT = Path(__file__).parents[2]
FOLDERS = ("edgebudget", "runtime/python", "passes", "targets", "models")
TABLE: dict[str, str] = tomllib.loads((ROOT / "runtime/errors.toml").read_text())
PREFIX = {
    "UsageError": "EB1",
    "UnsupportedError": "EB2",
    "PassError": "EB3",
    "InfeasibleError": "EB4",
    "MissedError": "EB4",
    "ArtifactError": "EB5",
    "TargetError": "EB6",
}


def nodes() -> Iterator[tuple[Path, ast.AST]]:
    for folder in FOLDERS:
        for file in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                yield file.relative_to(ROOT), node


def test_the_table_lists_exactly_the_codes_in_the_sources() -> None:
    used = {
        node.value: str(file)
        for file, node in nodes()
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and re.fullmatch(r"EB\d{3}", node.value)
    }
    assert {c: used[c] for c in used.keys() - TABLE.keys()} == {}, "not in runtime/errors.toml"
    assert {c: TABLE[c] for c in TABLE.keys() - used.keys()} == {}, "in no source"


def test_the_table_is_in_order() -> None:
    assert list(TABLE) == sorted(TABLE)


def test_a_code_tells_the_class() -> None:
    wrong = []
    for file, node in nodes():
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
            first, prefix = node.args[0], PREFIX.get(node.func.id)
            code = first.value if isinstance(first, ast.Constant) else None
            if prefix and isinstance(code, str) and not code.startswith(prefix):
                wrong.append(f"{file}:{node.lineno}: {node.func.id} {code}")
    assert wrong == []


def test_every_class_is_checked() -> None:
    classes = {c for c in vars(errors) if c.endswith("Error") and c != "EdgeBudgetError"}
    assert classes == PREFIX.keys()
