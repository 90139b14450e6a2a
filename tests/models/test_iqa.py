"""The data of `uhd-iqa`: metric, distortions, splits, cache."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from edgebudget_models import iqa_metric, iqa_photos
from edgebudget_models.entry import SPLITS, Split
from edgebudget_models.iqa_cache import PictureCache
from edgebudget_models.iqa_data import CROP, IqaData, iqa_data, plan
from edgebudget_models.iqa_distort import KINDS, Distortion, distort


def _cells() -> Tensor:
    photo = iqa_photos.builtin("evaluation")[0]
    return iqa_photos.as_cells(iqa_photos.grid(photo.pixels(), photo.region, 1.0, 0.5, 0.5))


@pytest.fixture(scope="module")
def reference() -> Tensor:
    """A crop full of detail."""
    return iqa_photos.enlarge_crop(_cells(), 100, 180, CROP, CROP)


def test_equal_pictures_have_quality_one(reference: Tensor) -> None:
    blank = torch.zeros(2, 3, 512, 512)
    assert iqa_metric.label(reference, reference).item() == pytest.approx(1.0, abs=1e-6)
    assert iqa_metric.label(blank, blank).tolist() == pytest.approx([1.0, 1.0], abs=1e-6)


def test_too_small_pictures_are_refused() -> None:
    small = torch.zeros(1, 3, 100, 600)
    with pytest.raises(ValueError, match="100 pixels, needed 352"):
        iqa_metric.ms_ssim(small, small)


@pytest.mark.parametrize("kind", KINDS)
def test_quality_falls_with_the_grade_and_spreads(kind: str, reference: Tensor) -> None:
    grades = (0.0, 0.25, 0.5, 0.75, 1.0)
    qualities = [
        iqa_metric.label(reference, distort(reference, [Distortion(kind, g)], 1)).item()
        for g in grades
    ]
    assert all(a > b - 0.02 for a, b in pairwise(qualities))
    assert qualities[0] > 0.8
    assert qualities[-1] < 0.45


@settings(max_examples=12, deadline=None)
@given(kind=st.sampled_from(KINDS), grade=st.floats(0, 1), seed=st.integers(0, 2**31 - 1))
def test_distortions_repeat_and_stay_pictures(kind: str, grade: float, seed: int) -> None:
    picture = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(4))
    out = distort(picture, [Distortion(kind, grade)], seed)
    assert torch.equal(out, distort(picture, [Distortion(kind, grade)], seed))
    assert out.shape == picture.shape
    assert torch.equal((out * 255).round() / 255, out)
    assert 0 <= out.min() <= out.max() <= 1


def test_a_crop_is_cut_out_of_the_whole() -> None:
    cells = _cells()[:, :, :80, :120]
    whole = iqa_photos.enlarge(cells)
    crop = iqa_photos.enlarge_crop(cells, 20, 30, 256, 320)
    # Quantised to 256 levels, so a last-bit difference may move a pixel by one.
    assert (whole[:, :, 200:456, 300:620] - crop).abs().max() <= 1.01 / 255


@pytest.mark.parametrize("split", SPLITS)
def test_plans_repeat_and_cover_photographs_and_kinds(split: Split) -> None:
    recipes = plan(5, split)
    assert recipes == plan(5, split)
    assert {r.photo for r in recipes} == set(range(5))
    singles = [r.distortions[0] for r in recipes if len(r.distortions) == 1]
    assert {d.kind for d in singles} == set(KINDS)
    grades = np.array([d.grade for d in singles if d.kind == "blur"])
    assert np.histogram(grades, 2, (0, 1))[0].min() >= 1
    assert len({r.seed for r in recipes}) == len(recipes)


def test_builtin_splits_use_regions_that_do_not_meet() -> None:
    boxes = [iqa_photos.builtin(split)[0].region for split in SPLITS]
    taken = np.zeros((427, 640), int)
    for box in boxes:
        taken[box.top : box.top + box.height, box.left : box.left + box.width] += 1
    assert taken.max() == 1


def _photographs(root: Path, count: int) -> Path:
    root.mkdir(exist_ok=True)
    for index in range(count):
        rng = np.random.default_rng(index)
        small = Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8))
        small.resize((320, 240)).save(root / f"photo{index}.png")
    return root


def test_folder_splits_are_disjoint_and_stay_when_photographs_come(tmp_path: Path) -> None:
    first = {
        s: {p.name for p in iqa_photos.from_folder(_photographs(tmp_path, 30), s)[0]}
        for s in SPLITS
    }
    assert sum(map(len, first.values())) == len(set.union(*first.values())) == 30
    later = {
        s: {p.name for p in iqa_photos.from_folder(_photographs(tmp_path, 40), s)[0]}
        for s in SPLITS
    }
    assert all(first[s] <= later[s] for s in SPLITS)


def test_small_and_broken_folders(tmp_path: Path) -> None:
    _photographs(tmp_path, 3)
    assert [len(iqa_photos.from_folder(tmp_path, s)[0]) for s in SPLITS] == [1, 1, 1]
    (tmp_path / "text.jpg").write_text("not a picture")
    Image.new("RGB", (50, 50)).save(tmp_path / "tiny.png")
    assert iqa_data("train", tmp_path).skipped == 2
    (tmp_path / "photo0.png").unlink()
    with pytest.raises(ValueError, match="2 usable photographs of 4 files"):
        iqa_data("train", tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        iqa_data("train", tmp_path / "none")


def test_training_crops_repeat_and_are_labelled() -> None:
    data = iqa_data("train")
    (inputs, label), again = data.sample(7), iqa_data("train").sample(7)
    assert inputs["image"].shape == (3, CROP, CROP)
    assert inputs["image"].dtype == np.float32
    assert np.array_equal(inputs["image"], again[0]["image"])
    assert label is not None
    assert label.dtype == np.float32
    assert 0 < float(label) <= 1
    assert data.digest() == iqa_data("train").digest()
    assert len({iqa_data(split).digest() for split in SPLITS}) == 3


def test_a_whole_picture_is_the_same_fresh_cached_and_after_corruption(tmp_path: Path) -> None:
    def data() -> IqaData:
        return iqa_data("evaluation", cache=tmp_path)

    inputs, label = data().sample(0)
    assert inputs["image"].shape == (3, 2160, 3840)
    (stored,) = tmp_path.iterdir()
    kept = stored.read_bytes()
    for spoiled in (kept, kept[:-1], kept[:1000] + b"x" + kept[1001:], b""):
        stored.write_bytes(spoiled)
        repeated, again = data().sample(0)
        assert np.array_equal(repeated["image"], inputs["image"])
        assert again == label
    assert stored.read_bytes() == kept


def test_cache_is_bounded_and_drops_the_longest_unused(tmp_path: Path) -> None:
    cache = PictureCache(tmp_path, limit_bytes=250)
    picture = np.arange(64, dtype=np.uint8).reshape(4, 4, 4)
    cache.put("a", picture, 0.25)
    cache.put("b", picture, 0.5)
    found = cache.get("a")
    assert found is not None
    assert np.array_equal(found[0], picture)
    assert found[1] == 0.25
    cache.put("c", picture, 0.75)
    assert cache.get("b") is None
    assert cache.get("a") is not None
    assert cache.get("c") is not None


def test_a_cache_that_cannot_be_written_is_no_fault(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    cache = PictureCache(blocked)
    cache.put("a", np.zeros((1, 2, 2), np.uint8), 0.0)
    assert cache.get("a") is None
