"""A picture file becomes the model's input, or a clear refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgebudget_runtime.errors import ArtifactError, UsageError
from edgebudget_runtime.manifest import Tensor
from edgebudget_runtime.preprocess import read_image

Array = np.ndarray[Any, Any]
INPUT = Tensor("image", (1, 3, 4, 6), "float32")
HOW: dict[str, Any] = {
    "layout": "NCHW",
    "color": "RGB",
    "range": [0.0, 1.0],
    "mean": [0.5, 0.25, 0.0],
    "std": [0.5, 0.25, 2.0],
    "resize": "none: the whole picture",
}


@pytest.fixture
def levels() -> Array:
    values: Array = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    return values


@pytest.fixture
def file(tmp_path: Path, levels: Array) -> Path:
    path = tmp_path / "photo.png"
    Image.fromarray(levels).save(path)
    return path


def test_scales_normalises_and_orders(file: Path, levels: Array) -> None:
    x = read_image(file, HOW, INPUT)
    scaled = levels.astype(np.float32) / np.float32(255)
    mean, std = (np.array(HOW[k], np.float32) for k in ("mean", "std"))
    wanted = (scaled - mean) / std
    assert x.dtype == np.float32
    assert x.flags.c_contiguous
    np.testing.assert_array_equal(x, wanted.transpose(2, 0, 1)[None])


def test_layout_colour_and_range(file: Path, levels: Array) -> None:
    how = {"layout": "NHWC", "color": "BGR", "range": [0, 255], "resize": "none"}
    x = read_image(file, how, Tensor("x", (1, 4, 6, 3), "float32"))
    np.testing.assert_array_equal(x[0], levels[..., ::-1].astype(np.float32))
    raw = read_image(file, how, Tensor("x", (1, 4, 6, 3), "uint8"))
    np.testing.assert_array_equal(raw[0], levels[..., ::-1])
    grey = read_image(file, {**HOW, "color": "grey", "mean": 0, "std": 1}, INPUT_GREY)
    assert grey.shape == (1, 1, 4, 6)


INPUT_GREY = Tensor("image", (1, 1, 4, 6), "float32")


def test_the_shorter_side_is_fitted_and_the_centre_kept(tmp_path: Path) -> None:
    picture: Array = np.zeros((40, 100, 3), np.uint8)
    picture[:, 30:70] = 255  # the centre square is white
    Image.fromarray(picture).save(tmp_path / "wide.png")
    how = {**HOW, "mean": 0.0, "std": 1.0, "resize": "shorter side to 8, centre crop 8x8"}
    square = Tensor("image", (1, 3, 8, 8), "float32")
    assert read_image(tmp_path / "wide.png", how, square)[..., 1:-1].min() == 1.0
    stretched = read_image(tmp_path / "wide.png", {**how, "resize": "stretch"}, square)
    assert stretched[..., 0].max() == 0.0


@pytest.mark.parametrize(
    ("how", "tensor", "code"),
    [
        ({}, INPUT, "EB176"),
        ({**HOW, "resize": "some other way"}, INPUT, "EB176"),
        ({**HOW, "resize": None}, INPUT, "EB176"),
        ({**HOW, "mean": [0.0, 0.0]}, INPUT, "EB176"),
        ({**HOW, "range": [0.0]}, INPUT, "EB176"),
        ({**HOW, "range": [1.0, 1.0]}, INPUT, "EB176"),
        ({**HOW, "std": 0.0}, INPUT, "EB176"),
        (HOW, Tensor("x", (1, 5), "float32"), "EB176"),
        (HOW, Tensor("x", (1, 3, None, 6), "float32"), "EB176"),
        (HOW, INPUT_GREY, "EB176"),
        (HOW, Tensor("x", (1, 3, 8, 8), "float32"), "EB177"),
    ],
    ids=str,
)
def test_refuses_to_guess(file: Path, how: dict[str, Any], tensor: Tensor, code: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_image(file, how, tensor)
    assert caught.value.code == code


def test_a_file_that_is_no_picture(tmp_path: Path, file: Path) -> None:
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "cut.png").write_bytes(file.read_bytes()[:60])
    for name in ("text.png", "cut.png", "missing.png"):
        with pytest.raises(ArtifactError, match="EB508"):
            read_image(tmp_path / name, HOW, INPUT)
