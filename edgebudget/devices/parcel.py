"""What is sent to a device: the runtime, the artifact and the job, in one zip file."""

from __future__ import annotations

import struct
import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, cast

import edgebudget_runtime
from edgebudget_runtime import integrity
from edgebudget_runtime.manifest import FILE, Manifest
from edgebudget_runtime.measure.job import Job

ARTIFACT = "artifact"
JOB = "job.json"


def pack(job: Job, folder: Path) -> BinaryIO:
    """The length in 8 bytes, big-endian, and the zip, in a file without a name.

    Of the artifact's folder only what its manifest lists is sent.

    Raises:
        ArtifactError: EB500 to EB507 the folder is not a whole artifact.
    """
    manifest = Manifest.load(folder)
    files = {f.file: f for s in manifest.segments for f in s.files()}
    paths = {name: integrity.locate(folder, name) for name in files}
    out = cast(BinaryIO, tempfile.TemporaryFile())
    out.write(bytes(8))
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        runtime = Path(edgebudget_runtime.__file__).parent
        for source in sorted(runtime.rglob("*.py")):
            archive.write(source, f"{runtime.name}/{source.relative_to(runtime).as_posix()}")
        archive.write(folder / FILE, f"{ARTIFACT}/{FILE}")
        for name, path in sorted(paths.items()):
            archive.write(path, f"{ARTIFACT}/{name}")
        archive.writestr(JOB, replace(job, folder=ARTIFACT, counters=()).encode())
    size = out.tell() - 8
    out.seek(0)
    out.write(struct.pack(">Q", size))
    out.seek(0)
    return out
