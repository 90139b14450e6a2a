"""Who may import whom. The lowest layer ships to devices; the zoo imports nobody."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAY_IMPORT = {
    "runtime/python/edgebudget_runtime": {"edgebudget_runtime"},
    "edgebudget": {"edgebudget_runtime", "edgebudget"},
    "passes/edgebudget_passes": {"edgebudget_runtime", "edgebudget", "edgebudget_passes"},
    "targets/edgebudget_targets": {"edgebudget_runtime", "edgebudget", "edgebudget_targets"},
    "models/edgebudget_models": {"edgebudget_models"},
}
# The compiler reaches what is above it by name, through a registry or when a user asks for it.
LATE = {"edgebudget": {"edgebudget_models"}}
RUNTIME_NEEDS = {"numpy", "onnxruntime", "PIL", "onnxruntime_qnn"}  # the last two: lazily


def imports(file: Path) -> list[tuple[str, bool]]:
    """Every top-level package that a file imports, and whether inside a function."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    inner = {
        id(node)
        for f in ast.walk(tree)
        if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(f)
    }
    found: list[tuple[str, bool]] = []
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names.append(node.module)
        found += [(n.split(".")[0], id(node) in inner) for n in names]
    return found


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_point_down(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    for file in files:
        for top, late in imports(file):
            allowed = MAY_IMPORT[folder] | (LATE.get(folder, set()) if late else set())
            if top.startswith("edgebudget"):
                assert top in allowed, f"{file.relative_to(ROOT)} imports {top}"


def test_the_runtime_needs_only_numpy_and_its_engine() -> None:
    for file in sorted((ROOT / "runtime/python/edgebudget_runtime").rglob("*.py")):
        for top, _ in imports(file):
            known = top in sys.stdlib_module_names or top == "edgebudget_runtime"
            assert known or top in RUNTIME_NEEDS, f"{file.relative_to(ROOT)} imports {top}"


@pytest.mark.parametrize("module", ["edgebudget", "edgebudget.cli", "edgebudget.registry"])
def test_importing_loads_neither_torch_nor_onnx(module: str) -> None:
    code = (
        f"import sys, {module};"
        "bad = {'torch', 'onnx', 'onnx_ir', 'onnxscript'} & set(sys.modules);"
        "sys.exit(str(bad) if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
