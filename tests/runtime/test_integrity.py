"""The files of an artifact are the ones that were compiled, or it is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgebudget_runtime import Manifest, integrity
from edgebudget_runtime.errors import ArtifactError


def code(folder: Path) -> str:
    with pytest.raises(ArtifactError) as caught:
        integrity.verify(folder, Manifest.load(folder))
    return caught.value.code


def test_a_whole_artifact_passes(artifact: Path) -> None:
    integrity.verify(artifact, Manifest.load(artifact))


def test_one_flipped_bit(artifact: Path) -> None:
    file = artifact / "segments/head.onnx"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert code(artifact) == "EB502"


def test_a_truncated_file(artifact: Path) -> None:
    file = artifact / "segments/head.onnx"
    file.write_bytes(file.read_bytes()[:-1])
    assert code(artifact) == "EB502"


def test_a_missing_file(artifact: Path) -> None:
    (artifact / "segments/head.onnx").unlink()
    assert code(artifact) == "EB504"


def test_a_folder_in_place_of_a_file(artifact: Path) -> None:
    (artifact / "segments/head.onnx").unlink()
    (artifact / "segments/head.onnx").mkdir()
    assert code(artifact) == "EB504"


def test_links_in_a_circle(artifact: Path) -> None:
    file = artifact / "segments/head.onnx"
    file.unlink()
    file.symlink_to(file)
    assert code(artifact) == "EB504"


@pytest.mark.parametrize("linked", ["segments/head.onnx", "segments"])
def test_a_link_out_of_the_folder(artifact: Path, linked: str) -> None:
    moved = (artifact / linked).rename(artifact.parent / "elsewhere")
    (artifact / linked).symlink_to(moved)
    assert code(artifact) == "EB503"


def test_a_link_inside_the_folder_is_fine(artifact: Path) -> None:
    moved = (artifact / "segments/head.onnx").rename(artifact / "shared.onnx")
    (artifact / "segments/head.onnx").symlink_to(moved)
    integrity.verify(artifact, Manifest.load(artifact))
