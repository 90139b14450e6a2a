"""Folders of labelled pictures: splits, faults, pre-processing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgebudget_models.cifar import MEAN, STD, recipe
from edgebudget_models.entry import SPLITS
from edgebudget_models.image_folder import FolderData

CLASSES = ("cat", "dog")


def _fill(folder: Path, count: int, size: tuple[int, int] = (32, 32)) -> None:
    folder.mkdir(parents=True)
    for index in range(count):
        level = (index * 37 + len(folder.name)) % 256
        Image.new("RGB", size, (level, 10, 200)).save(folder / f"{index}.png")


def _flat(root: Path, count: int = 40) -> Path:
    for name in CLASSES:
        _fill(root / name, count)
    return root


def _paths(root: Path) -> dict[str, set[Path]]:
    data = {split: FolderData(root, split, CLASSES, recipe(32)) for split in SPLITS}
    return {split: {path for path, _ in d._listed} for split, d in data.items()}


@pytest.mark.parametrize("nested", [True, False])
def test_splits_are_disjoint_and_cover_the_folder(tmp_path: Path, nested: bool) -> None:
    if nested:
        _flat(tmp_path / "train")
        _flat(tmp_path / "test", 10)
    else:
        _flat(tmp_path)
    paths = _paths(tmp_path)
    assert sum(map(len, paths.values())) == len(set.union(*paths.values()))
    assert set.union(*paths.values()) == set(tmp_path.rglob("*.png"))
    if nested:
        assert paths["evaluation"] == set((tmp_path / "test").rglob("*.png"))


def test_samples_are_normalised_and_repeat(tmp_path: Path) -> None:
    for name in CLASSES:
        _fill(tmp_path / name, 20, (64, 48))
    data = FolderData(tmp_path, "train", CLASSES, recipe(32))
    inputs, label = data.sample(3)
    image = inputs["image"]
    assert image.shape == (3, 32, 32)
    assert image.dtype == np.float32
    np.testing.assert_allclose(image[1], (10 / 255 - MEAN[1]) / STD[1], rtol=1e-5)
    assert label is not None
    assert label.dtype == np.int64
    again = FolderData(tmp_path, "train", CLASSES, recipe(32))
    assert np.array_equal(again.sample(3)[0]["image"], image)
    assert again.digest() == data.digest()
    pictures, labels = data.raw()
    assert pictures.shape == (len(data), 32, 32, 3)
    assert labels.shape == (len(data),)


def test_digest_follows_the_bytes(tmp_path: Path) -> None:
    _flat(tmp_path)
    data = FolderData(tmp_path, "train", CLASSES, recipe(32))
    before = data.digest()
    path, _ = data._listed[0]
    Image.new("RGB", (32, 32), (1, 2, 3)).save(path)
    assert FolderData(tmp_path, "train", CLASSES, recipe(32)).digest() != before


def test_unreadable_pictures_are_skipped_and_counted(tmp_path: Path) -> None:
    _flat(tmp_path / "train")
    _flat(tmp_path / "test", 8)
    good = (tmp_path / "test/cat/0.png").read_bytes()
    (tmp_path / "test/cat/cut.png").write_bytes(good[: len(good) // 2])
    (tmp_path / "test/dog/text.jpg").write_text("not a picture")
    data = FolderData(tmp_path, "evaluation", CLASSES, recipe(32))
    assert (len(data), data.skipped) == (16, 2)


def test_folders_without_a_task_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        FolderData(tmp_path / "none", "train", CLASSES, recipe(32))
    with pytest.raises(ValueError, match="no pictures"):
        FolderData(tmp_path, "train", CLASSES, recipe(32))
    _fill(tmp_path / "cat", 30)
    with pytest.raises(ValueError, match="at least two classes"):
        len(FolderData(tmp_path, "train", CLASSES, recipe(32)))
    (tmp_path / "horse").mkdir()
    with pytest.raises(ValueError, match="'horse' is none of cat, dog"):
        FolderData(tmp_path, "train", CLASSES, recipe(32))
