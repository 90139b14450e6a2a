"""Data sets: divided soundly, checked sample by sample, pictures prepared as promised."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from edgebudget import data_sources, datasets
from edgebudget.image_folder import FolderDataset
from edgebudget.preprocessing import Preprocessing, preprocessing_for
from edgebudget.program import TensorSpec
from edgebudget.user_code import load_function
from edgebudget.workload import Array, Dataset
from edgebudget_runtime import manifest, preprocess
from edgebudget_runtime.errors import ArtifactError, UsageError

RNG = np.random.default_rng(11)
SPEC = TensorSpec("image", (1, 3, 4, 6))


def npz(folder: Path, **arrays: Array) -> Path:
    file = folder / "data.npz"
    np.savez(file, **arrays)
    return file


def pictures(count: int, dtype: str = "float32") -> Array:
    return RNG.normal(size=(count, 3, 4, 6)).astype(dtype)


def load(file: Path, seed: int = 0) -> datasets.Splits:
    return data_sources.load_npz(file, (SPEC,), seed)


def given_set(dataset: Dataset | None) -> Dataset:
    assert dataset is not None
    return dataset


def indices(dataset: Dataset | None) -> set[int]:
    assert isinstance(dataset, datasets.Subset)
    return set(dataset.indices)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([None, 0, 1, 2]), min_size=2, max_size=60), st.integers(0, 99))
def test_a_division_is_disjoint_whole_and_in_proportion(
    labels: list[int | None], seed: int
) -> None:
    share, rest = datasets.divide(labels, seed)
    assert sorted(share + rest) == list(range(len(labels)))
    assert share
    assert rest
    if len(labels) >= 15:
        taken = Counter(labels[i] for i in share)
        for label, total in Counter(labels).items():
            assert abs(taken[label] - 0.2 * total) <= 0.5 + 1e-9
    assert datasets.divide(labels, seed) == (share, rest)


def test_a_single_set_is_divided_and_says_so(tmp_path: Path) -> None:
    splits = load(npz(tmp_path, image=pictures(50), labels=np.arange(50) % 5))
    data = splits.data
    assert (len(given_set(data.calibration)), len(given_set(data.evaluation))) == (10, 40)
    assert not indices(data.calibration) & indices(data.evaluation)
    assert not indices(data.train) & indices(data.evaluation)
    assert "10 samples for calibration and 40 for evaluation" in splits.notes[0]


def test_prefixed_arrays_are_separate_sets(tmp_path: Path) -> None:
    file = npz(tmp_path, image=pictures(3), train_image=pictures(600), train_labels=np.zeros(600))
    data = load(file, seed=4).data
    assert (len(given_set(data.train)), len(given_set(data.evaluation))) == (600, 3)
    calibration = indices(data.calibration)
    assert len(calibration) == datasets.CALIBRATION_COUNT
    assert calibration == indices(load(file, seed=4).data.calibration)
    assert calibration != indices(load(file, seed=5).data.calibration)


def test_evaluation_alone_beside_calibration_is_kept_apart(tmp_path: Path) -> None:
    data = load(npz(tmp_path, evaluation_image=pictures(4), calibration_image=pictures(7))).data
    assert (len(given_set(data.calibration)), len(given_set(data.evaluation))) == (7, 4)
    assert data.train is None


@pytest.mark.parametrize(
    ("arrays", "code", "what"),
    [
        ({"image": pictures(2), "labels": np.zeros(3)}, "EB548", "different lengths"),
        ({"a": pictures(2), "b": pictures(2)}, "EB548", "no array for the model's input 'image'"),
        ({"image": np.array(["a", "b"])}, "EB548", "type <U1"),
        ({"image": np.full((2, 3, 4, 6), np.nan)}, "EB549", "image holds NaN"),
        ({"image": pictures(2), "labels": np.array([0, np.inf])}, "EB549", "labels holds"),
        ({"image": np.array([{}, {}], dtype=object)}, "EB540", "refused: it holds object"),
        ({"image": np.zeros((0, 3, 4, 6), np.float32)}, "EB545", "no sample"),
    ],
)
def test_faulty_arrays_are_refused(
    tmp_path: Path, arrays: dict[str, Array], code: str, what: str
) -> None:
    with pytest.raises(ArtifactError, match=f"{code}.*{what}"):
        load(npz(tmp_path, **arrays))


def test_a_damaged_npz_is_refused(tmp_path: Path) -> None:
    file = npz(tmp_path, image=pictures(3))
    for data in (file.read_bytes()[:-60], b"", b"not an archive"):
        file.write_bytes(data)
        with pytest.raises(ArtifactError, match="EB541"):
            load(file)


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (np.zeros((4, 6, 3), np.float32), r"NHWC \[4, 6, 3\], the model wants NCHW \[3, 4, 6\]"),
        (np.zeros((1, 3, 4, 6), np.float32), r"\[1, 3, 4, 6\](.|\n)*leave the batch"),
        (np.zeros((3, 5, 6), np.float32), r"\[3, 5, 6\], the model wants NCHW \[3, 4, 6\]"),
        (np.zeros((3, 4, 6), np.uint8), "is uint8, the model wants float32"),
    ],
)
def test_samples_that_do_not_fit_say_what_was_found_and_wanted(value: Array, what: str) -> None:
    checked = datasets.Checked(datasets.Arrays("d", {"image": value[None]}), (SPEC,))
    with pytest.raises(ArtifactError, match=f"EB548.*{what}"):
        checked.sample(0)


def test_wider_floats_are_converted_and_bad_values_refused() -> None:
    wide = datasets.Arrays("d", {"image": pictures(2, "float64")})
    assert datasets.Checked(wide, (SPEC,)).sample(0).inputs["image"].dtype == np.float32
    wide.inputs["image"][1, 0, 0, 0] = np.inf
    with pytest.raises(ArtifactError, match=r"EB549.*sample 1"):
        datasets.Checked(wide, (SPEC,)).sample(1)


def test_digests_follow_the_values() -> None:
    values = pictures(3)
    first = datasets.Arrays("a", {"image": values}, np.arange(3))
    again = datasets.Arrays("b", {"image": values.copy()}, np.arange(3))
    other = datasets.Arrays("a", {"image": values}, np.arange(3)[::-1])
    assert first.digest() == again.digest() != other.digest()


BODY = """
import numpy as np
import torch

X = np.ones((6, 3, 4, 6), np.float32)

def stacked():
    return X, np.arange(6)

def listed():
    return [(torch.ones(3, 4, 6), i) for i in range(6)]

def splits():
    return {"train": listed(), "test": stacked(), "calibration": None}

def inputs_only():
    return [{"image": x} for x in X]

def wrong():
    return 3

def broken():
    class Data:
        def __len__(self): return 2
        def __getitem__(self, i): raise OSError("disk on fire")
    return {"train": Data(), "test": Data()}
"""


def user(folder: Path, name: str) -> datasets.Splits:
    file = folder / "mydata.py"
    file.write_text(BODY)
    return data_sources.load_function_data(load_function(f"{file}:{name}", "data"), (SPEC,), 0)


@pytest.mark.parametrize("name", ["stacked", "listed", "inputs_only"])
def test_user_data_in_several_forms(tmp_path: Path, name: str) -> None:
    data = user(tmp_path, name).data
    evaluation = datasets.Checked(given_set(data.evaluation), (SPEC,))
    sample = evaluation.sample(0)
    assert sample.inputs["image"].shape == (3, 4, 6)
    assert (sample.target is None) == (name == "inputs_only")
    assert len(evaluation) + len(given_set(data.train)) == 6


def test_user_splits_are_kept(tmp_path: Path) -> None:
    data = user(tmp_path, "splits").data
    assert len(given_set(data.train)) == len(given_set(data.evaluation)) == 6
    assert len(given_set(data.calibration)) == 6


def test_faults_of_user_data_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"EB163.*mydata\.py:\d+: wrong\(\) returned int"):
        user(tmp_path, "wrong")
    with pytest.raises(ArtifactError, match=r"EB545.*disk on fire"):
        given_set(user(tmp_path, "broken").data.evaluation).sample(0)


def saved(file: Path, size: tuple[int, int], mode: str = "RGB") -> Path:
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    Image.fromarray(RNG.integers(0, 256, shape).astype(np.uint8)).save(file)
    return file


OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "bgr, 0 to 255": {"color": "BGR", "range": (0, 255), "mean": (1, 2, 3), "std": (4, 5, 6)},
    "channels last": {"layout": "NHWC", "range": (-1, 1)},
    "stretch": {"resize": "stretch"},
    "grey": {"color": "grey", "mean": (0.5,), "std": (0.25,)},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("size", [(6, 4), (9, 5), (5, 13)])
def test_pictures_become_what_the_runtime_makes_of_the_manifest(
    tmp_path: Path, options: dict[str, Any], size: tuple[int, int]
) -> None:
    how = Preprocessing(size=(4, 6), **options)
    channels = 1 if how.color == "grey" else 3
    shape = (1, channels, 4, 6) if how.layout == "NCHW" else (1, 4, 6, channels)
    file = saved(tmp_path / "a.png", size)
    ours = FolderDataset("d", tmp_path, [(file, None)], how, TensorSpec("image", shape)).sample(0)
    tensor = manifest.Tensor("image", shape, "float32")
    theirs = preprocess.read_image(file, how.to_json(), tensor)
    assert ours.inputs["image"] == pytest.approx(theirs[0], abs=1e-6, rel=1e-6)


def test_what_the_runtime_cannot_do_it_refuses(tmp_path: Path) -> None:
    how = Preprocessing(size=(4, 6), shorter_side=8)
    tensor = manifest.Tensor("image", (1, 3, 4, 6), "float32")
    with pytest.raises(UsageError, match="EB176"):
        preprocess.read_image(saved(tmp_path / "a.png", (9, 9)), how.to_json(), tensor)


def test_options_follow_the_model_then_its_source_then_the_user() -> None:
    made = preprocessing_for(TensorSpec("x", (1, 8, 9, 3)), {}, "", "d")
    assert (made.layout, made.size, made.color, made.range) == ("NHWC", (8, 9), "RGB", (0.0, 1.0))
    assert preprocessing_for(TensorSpec("x", (1, 3, 8, 8), "uint8"), {}, "", "d").range[1] == 255
    described = {"layout": "NCHW", "color": "RGB", "mean": [0.5] * 3, "resize": "none: whole"}
    made = preprocessing_for(SPEC, described, "std=2,2,2&color=bgr&range=-1,1", "d")
    assert (made.mean, made.std, made.color) == ((0.5,) * 3, (2.0,) * 3, "BGR")
    assert made.range == (-1.0, 1.0)


@pytest.mark.parametrize(
    ("query", "what"),
    [
        ("maen=1", r"unknown picture option 'maen'(.|\n)*did you mean 'mean'"),
        ("color=red", "color=red"),
        ("mean=a", "mean=a"),
        ("mean=1,2", "mean=1,2"),
        ("std=0", "no std of 0"),
        ("range=1,0", "range"),
        ("size=2.5", r"size=2\.5"),
        ("shorter_side=5", "less than size"),
    ],
)
def test_options_that_make_no_sense_are_refused(query: str, what: str) -> None:
    with pytest.raises(UsageError, match=f"EB165(.|\n)*{what}"):
        preprocessing_for(SPEC, {}, query, "imagefolder:x")


def test_pictures_that_cannot_fit_the_input_are_refused() -> None:
    with pytest.raises(ArtifactError, match=r"EB548.*\[3, 9, 9\].*wants \[3, 4, 6\]"):
        preprocessing_for(SPEC, {}, "size=9", "d")
    with pytest.raises(ArtifactError, match=r"EB548.*no picture"):
        preprocessing_for(TensorSpec("x", (1, 128), "int64"), {}, "", "d")


def folder_of(folder: Path, bad: int) -> list[tuple[Path, int | None]]:
    files = [saved(folder / f"{i}.png", (6, 4)) for i in range(10)]
    for file in files[:bad]:
        file.write_bytes(file.read_bytes()[:60])
    return [(f, None) for f in files]


def test_unreadable_pictures_are_skipped_counted_and_named(tmp_path: Path) -> None:
    found = FolderDataset("d", tmp_path, folder_of(tmp_path, 2), Preprocessing(size=(4, 6)), SPEC)
    assert (len(found), found.skipped) == (8, 2)
    assert found.notes == ("d: skipped 2 unreadable pictures (0.png, 1.png)",)


def test_a_drawn_set_replaces_unreadable_pictures(tmp_path: Path) -> None:
    listed = folder_of(tmp_path, 2)
    how = Preprocessing(size=(4, 6))
    assert len(FolderDataset("d", tmp_path, listed, how, SPEC, limit=5)) == 5


def test_only_unreadable_pictures_are_refused(tmp_path: Path) -> None:
    how = Preprocessing(size=(4, 6))
    with pytest.raises(ArtifactError, match=r"EB545.*none of its 10 pictures"):
        len(FolderDataset("d", tmp_path, folder_of(tmp_path, 10), how, SPEC))


def test_a_folders_digest_follows_pictures_and_preprocessing(tmp_path: Path) -> None:
    listed, how = folder_of(tmp_path, 0), Preprocessing(size=(4, 6))
    first = FolderDataset("d", tmp_path, listed, how, SPEC).digest()
    assert FolderDataset("e", tmp_path, listed, how, SPEC).digest() == first
    other = Preprocessing(size=(4, 6), std=(2.0,))
    assert FolderDataset("d", tmp_path, listed, other, SPEC).digest() != first
    saved(listed[3][0], (6, 4))
    assert FolderDataset("d", tmp_path, listed, how, SPEC).digest() != first


def test_pictures_beyond_the_cache_are_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed, how = folder_of(tmp_path, 0), Preprocessing(size=(4, 6))
    cached = FolderDataset("d", tmp_path, listed, how, SPEC)
    monkeypatch.setattr("edgebudget.image_folder.CACHE_BYTES", 100)
    uncached = FolderDataset("d", tmp_path, listed, how, SPEC)
    for i in range(10):
        assert np.array_equal(cached.sample(i).inputs["image"], uncached.sample(i).inputs["image"])
