"""The elastic artifact that several benchmarks look at, compiled once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks.harness import ROOT, data_folder
from edgebudget_runtime.errors import ArtifactError
from edgebudget_runtime.manifest import Manifest

MODEL = "cifar10-resnet56-elastic"


def elastic_artifact(given: Path | None) -> Path | None:
    """The folder given, or build/bench-elastic, compiled now if it is not there; None: no data."""
    folder = given or ROOT / "build" / "bench-elastic"
    try:
        Manifest.load(folder)
    except ArtifactError:
        if given is not None:
            raise
    else:
        return folder
    root = data_folder() / "cifar10"
    if not (root / "test").is_dir():
        sys.stderr.write(f"skipped: no CIFAR-10 folder at {root} (set EDGEBUDGET_DATA)\n")
        return None
    folder.parent.mkdir(exist_ok=True)
    command = [str(Path(sys.executable).parent / "edgebudget"), "compile", MODEL]
    command += ["--data", f"imagefolder:{root}", "--target", "cpu", "--out", str(folder)]
    subprocess.run([*command, "--force"], check=True)
    return folder
