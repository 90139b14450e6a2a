"""What the CIFAR-10 entries share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebudget_models.entry import PACKAGE, Split, ZooData, ZooEntry

if TYPE_CHECKING:
    from torch import nn

    from edgebudget_models.image_folder import PictureRecipe

# In alphabetical order: labels 0..9.
CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
# Training pictures that students and teachers never saw: for calibration and for thresholds.
KEPT_BACK = 5000
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def describe(size: int) -> dict[str, Any]:
    """The pre-processing as plain JSON."""
    return {
        "layout": "NCHW",
        "color": "RGB",
        "range": [0.0, 1.0],
        "mean": list(MEAN),
        "std": list(STD),
        "resize": f"shorter side to {size} (bilinear), centre crop {size}x{size}",
    }


def recipe(size: int) -> PictureRecipe:
    """Pictures of `size` x `size`, normalised."""
    from edgebudget_models.image_folder import PictureRecipe

    return PictureRecipe(size, MEAN, STD)


def folder_data(
    split: Split, root: Path | None, size: int, name: str, kept_back: int | None = None
) -> ZooData:
    """A split of the picture folder `root`; ValueError where there is none."""
    from edgebudget_models.image_folder import CALIBRATION_COUNT, FolderData

    if root is None:
        raise ValueError(f"{name} needs a folder of pictures: root/{{train,test}}/<class>/*.jpg")
    return FolderData(root, split, CLASSES, recipe(size), kept_back or CALIBRATION_COUNT)


def entry(
    name: str,
    summary: str,
    build: Callable[[], nn.Module],
    size: int,
    outputs: tuple[str, ...] = ("scores",),
    kept_back: int | None = None,
) -> ZooEntry:
    """A classifier of CIFAR-10 pictures brought to `size` x `size`.

    `kept_back` is how many training pictures its training never saw.
    """
    packaged = f"{name}.safetensors"

    def load(weights: Path | None = None) -> nn.Module:
        from edgebudget_models.checkpoint import load_into

        return load_into(build(), weights or PACKAGE / "weights" / packaged)

    def data(split: Split, root: Path | None = None) -> ZooData:
        return folder_data(split, root, size, name, kept_back)

    return ZooEntry(
        name=name,
        summary=summary,
        task="classification",
        metric="top1",
        classes=CLASSES,
        input_name="image",
        input_shape=(1, 3, size, size),
        preprocessing=describe(size),
        weights=packaged,
        card=f"{name}.md",
        needs_data=True,
        build=build,
        load=load,
        data=data,
        outputs=outputs,
    )
