"""Every tool looks into the same source folders."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
TOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
WHERE = TOOLS["setuptools"]["packages"]["find"]["where"]


def test_tools_agree_on_the_source_folders() -> None:
    assert TOOLS["mypy"]["mypy_path"].split(":") == WHERE[1:]
    assert TOOLS["pyright"]["extraPaths"] == WHERE[1:]
    assert TOOLS["ruff"]["src"] == WHERE


def test_mypy_and_coverage_see_every_package() -> None:
    packages = {
        p.name
        for where in WHERE
        for p in (ROOT / where).iterdir()
        if p.name.startswith("edgebudget") and (p / "__init__.py").exists()
    }
    assert set(TOOLS["coverage"]["run"]["source_pkgs"]) == packages
    assert set(WHERE[1:]) <= set(TOOLS["mypy"]["files"])


def test_every_package_is_typed() -> None:
    for name in TOOLS["coverage"]["run"]["source_pkgs"]:
        (found,) = (ROOT / w / name for w in WHERE if (ROOT / w / name).is_dir())
        assert (found / "py.typed").exists()
