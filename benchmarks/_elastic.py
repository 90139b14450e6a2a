"""The elastic artifact that several benchmarks look at, compiled once for the data at hand."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

from benchmarks.harness import ROOT, data_folder
from edgebudget_models import catalogue
from edgebudget_runtime.errors import ArtifactError
from edgebudget_runtime.manifest import Manifest

MODEL = "cifar10-resnet56-elastic"


def elastic_artifact(given: Path | None) -> Path | None:
    """The folder given, or one in build/ of this very data, compiled now if it is not there.

    None without data.
    """
    if given is not None:
        Manifest.load(given)
        return given
    root = data_folder() / "cifar10"
    if not (root / "test").is_dir():
        sys.stderr.write(f"skipped: no CIFAR-10 folder at {root} (set EDGEBUDGET_DATA)\n")
        return None
    entry = catalogue.get(MODEL)
    seen = "".join(entry.data(part, root).digest() for part in ("train", "evaluation"))
    data = hashlib.sha256(seen.encode()).hexdigest()[:12]
    folder = ROOT / "build" / f"bench-elastic-{data}"
    try:
        Manifest.load(folder)
    except ArtifactError:
        folder.parent.mkdir(exist_ok=True)
        command = [str(Path(sys.executable).parent / "edgebudget"), "compile", MODEL]
        command += ["--data", f"imagefolder:{root}", "--target", "cpu", "--out", str(folder)]
        subprocess.run([*command, "--force"], check=True)
    return folder
