"""A target from somebody else's package: found by its entry point, compiled for end to end."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

PLUGIN = Path(__file__).parent / "example_plugin"
_DIGITS = ["digits", "--target", "cpu:example", "--latency", "10s", "--max-drop", "5%"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The distribution as an installer leaves it: its package, and metadata with entry points."""
    site = tmp_path_factory.mktemp("site")
    about = tomllib.loads((PLUGIN / "pyproject.toml").read_text())["project"]
    (package,) = tomllib.loads((PLUGIN / "pyproject.toml").read_text())["tool"]["setuptools"][
        "packages"
    ]
    shutil.copytree(PLUGIN / package, site / package)
    info = site / f"{about['name'].replace('-', '_')}-{about['version']}.dist-info"
    info.mkdir()
    head = f"Metadata-Version: 2.1\nName: {about['name']}\nVersion: {about['version']}\n"
    (info / "METADATA").write_text(head)
    lines = []
    for group, entries in about["entry-points"].items():
        lines += [f"[{group}]", *(f"{k} = {v}" for k, v in entries.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return site


def _edgebudget(site: Path, cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(site), *(p for p in sys.path if p)])
    code = "import sys; from edgebudget.cli import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": path, "EDGEBUDGET_CACHE": str(cache)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_it_is_three_files() -> None:
    files = [p for p in PLUGIN.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert len(files) + 1 <= 3  # and this test


def test_it_is_listed_beside_the_built_in_ones(installed: Path, tmp_path: Path) -> None:
    done = _edgebudget(installed, tmp_path, "targets", "--json")
    assert done.returncode == 0, done.stderr
    found = {x["name"]: x for x in json.loads(done.stdout)}
    assert found["cpu:example"]["available"]
    assert found["cpu:example"]["engine"] == "onnx-reference"
    absent = _edgebudget(tmp_path, tmp_path, "targets", "--json")
    assert "cpu:example" not in absent.stdout


def test_digits_compile_for_it_and_the_proof_is_its_own(installed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = _edgebudget(installed, tmp_path / "cache", "compile", *_DIGITS, "--out", str(out),
                       "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    assert answer["holds"]
    assert answer["target"]["name"] == "cpu:example"
    assert answer["cost"]["latency_ms"]["evidence"] == "measured"
    assert "ONNX reference" in answer["cost"]["latency_ms"]["how"]
    assert answer["placement"]["processor"] == "example"
    assert answer["quality"]["value"] > 0.9
    manifest = json.loads((out / "manifest.json").read_text())
    assert "lowered by the example plug-in" in manifest["notes"]


def test_a_plugin_that_cannot_be_imported_is_named(installed: Path, tmp_path: Path) -> None:
    broken = tmp_path / "site"
    shutil.copytree(installed, broken)
    (broken / "edgebudget_example" / "__init__.py").write_text("import no_such_engine\n")
    done = _edgebudget(broken, tmp_path / "cache", "compile", *_DIGITS, "--out",
                       str(tmp_path / "o"))  # fmt: skip
    assert done.returncode == 6
    assert "EB602" in done.stderr
    assert "no_such_engine" in done.stderr
    assert "Traceback" not in done.stderr
