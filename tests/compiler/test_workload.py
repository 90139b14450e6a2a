"""From what a user types to a workload, and every faulty folder refused."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgebudget.evaluate import predict, runner_of, score
from edgebudget.workload import Dataset, Workload
from edgebudget.workload_loading import load_workload
from edgebudget_runtime.errors import ArtifactError, EdgeBudgetError, UsageError

MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.head = nn.Linear(3, outputs)

    def forward(self, image):
        return self.head(image.mean((2, 3)))

def classes():
    return Net(3), (1, 3, 6, 8)

def score():
    return Net(1), (1, 3, 6, 8)

class Boxes(nn.Module):
    def forward(self, image):
        flat = image.flatten(1)[:, :20].reshape(-1, 5, 4)
        return {"scores": flat[..., :2].softmax(-1), "boxes": flat}

def detector():
    return Boxes(), (1, 3, 6, 8)

def data():
    images = torch.arange(6 * 144).reshape(6, 3, 6, 8) / 100
    return images, torch.arange(6) / 6

def mean_error(outputs, labels):
    return float(1 / (1 + abs(outputs[:, 0] - labels).mean()))
"""
NAMES = ("ant", "bee", "cat")


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "model.py").write_text(MODEL)
    return f"{tmp_path / 'model.py'}"


def picture(file: Path, level: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(level)
    Image.fromarray(rng.integers(0, 256, (7, 11, 3)).astype(np.uint8)).save(file)


def fill(folder: Path, names: tuple[str, ...] = NAMES, each: int = 10) -> Path:
    for i, name in enumerate(names):
        for k in range(each):
            picture(folder / name / f"{k:02}.png", 100 * i + k)
    return folder


def has(dataset: Dataset | None) -> Dataset:
    assert dataset is not None
    return dataset


def targets(dataset: Dataset | None) -> list[int]:
    found = has(dataset)
    labels = [found.sample(i).target for i in range(len(found))]
    return [int(x) for x in labels if x is not None]


def answers(workload: Workload) -> float:
    """The task's quality of the model against itself or its labels."""
    found = predict(runner_of(workload.program), has(workload.data.evaluation))
    return score(workload.task, found, found).value


def test_a_zoo_model_brings_data_and_task() -> None:
    workload = load_workload("digits")
    assert (workload.name, workload.task.metric) == ("digits", "top1")
    assert len(has(workload.data.calibration)) > 100
    assert len(has(workload.data.evaluation)) > 100
    assert load_workload("digits", data="builtin").digest == workload.digest


def test_train_and_test_folders(model: str, tmp_path: Path) -> None:
    fill(tmp_path / "d" / "train")
    fill(tmp_path / "d" / "test", ("ant", "cat"), each=2)
    workload = load_workload(f"{model}:classes", data=f"imagefolder:{tmp_path / 'd'}?mean=0.5")
    assert workload.task.metric == "top1"
    assert targets(workload.data.evaluation) == [0, 0, 2, 2]
    assert sorted(targets(workload.data.train)) == [0] * 10 + [1] * 10 + [2] * 10
    assert sorted(targets(workload.data.calibration)) == sorted(targets(workload.data.train))
    assert workload.preprocessing["mean"] == [0.5]
    assert workload.notes == ()
    assert 0 <= answers(workload) <= 1


def test_one_folder_of_classes_is_divided_and_says_so(model: str, tmp_path: Path) -> None:
    source = str(fill(tmp_path / "d"))
    workload = load_workload(f"{model}:classes", data=source, seed=1)
    assert sorted(targets(workload.data.calibration)) == [0, 0, 1, 1, 2, 2]
    assert len(has(workload.data.evaluation)) == 24
    assert "divided into 6 samples for calibration and 24 for evaluation" in workload.notes[0]
    data = workload.data
    seen = [
        {has(d).sample(i).inputs["image"].tobytes() for i in range(len(has(d)))}
        for d in (data.train, data.evaluation)
    ]
    assert not seen[0] & seen[1]
    again = load_workload(f"{model}:classes", data=source, seed=1)
    assert has(again.data.calibration).digest() == has(data.calibration).digest()
    other = load_workload(f"{model}:classes", data=source, seed=2)
    assert has(other.data.calibration).digest() != has(data.calibration).digest()


def test_flat_photos_are_unlabelled_and_compared_with_the_original(
    model: str, tmp_path: Path
) -> None:
    for k in range(10):
        picture(tmp_path / "d" / f"{k}.png", k)
    workload = load_workload(f"{model}:classes", data=str(tmp_path / "d"))
    assert workload.task.metric == "fidelity"
    assert workload.task.needs_reference
    assert answers(workload) == 1.0
    found = load_workload(f"{model}:detector", data=str(tmp_path / "d")).task
    assert found.metric == "box_iou"


def test_folders_are_no_labels_where_the_task_needs_none(model: str, tmp_path: Path) -> None:
    fill(tmp_path / "d")
    for source, task in ((f"{model}:detector", None), (f"{model}:classes", "agreement")):
        workload = load_workload(source, data=str(tmp_path / "d"), task=task)
        assert workload.task.needs_reference
        assert targets(workload.data.evaluation) == []


def test_user_data_with_float_labels_is_a_regression(model: str) -> None:
    workload = load_workload(f"{model}:score", data=f"{model}:data")
    assert workload.task.metric == "srcc"
    assert -1 <= answers(workload) <= 1
    own = load_workload(f"{model}:score", data=f"{model}:data", task=f"{model}:mean_error")
    assert own.task.metric == "mean_error"
    assert 0 < answers(own) <= 1


def test_without_data_there_is_none(model: str) -> None:
    data = load_workload(f"{model}:classes").data
    assert (data.calibration, data.train, data.evaluation) == (None, None, None)


def test_unreadable_pictures_are_skipped_and_noted(model: str, tmp_path: Path) -> None:
    fill(tmp_path / "d" / "train")
    fill(tmp_path / "d" / "val")
    (tmp_path / "d" / "val" / "bee" / "03.png").write_bytes(b"\x89PNG nothing more")
    workload = load_workload(f"{model}:classes", data=str(tmp_path / "d"))
    evaluation = workload.data.evaluation
    assert len(has(evaluation)) == 29
    assert getattr(evaluation, "skipped", None) == 1
    assert "skipped 1 unreadable pictures (val/bee/03.png)" in workload.notes[0]


def _nothing(folder: Path) -> None:
    (folder / "ant").mkdir(parents=True)
    (folder / "readme.txt").write_text("no pictures")


def test_flat_photos_serve_a_zoo_classifier_that_is_compared_with_itself(tmp_path: Path) -> None:
    for k in range(10):
        picture(tmp_path / "d" / f"{k}.png", k)
    with pytest.raises(ArtifactError, match="no class folders") as caught:
        load_workload("digits", data=str(tmp_path / "d"))
    assert "--task agreement" in str(caught.value)
    workload = load_workload("digits", data=str(tmp_path / "d"), task="agreement")
    assert workload.task.needs_reference
    assert answers(workload) == 1.0


def _flat(folder: Path) -> None:
    picture(folder / "a.png", 1)


def _strangers(folder: Path) -> None:
    fill(folder / "train", each=1)
    fill(folder / "test", ("ant", "dog"), each=1)


@pytest.mark.parametrize("source", ["{}:classes", "cifar10-resnet20"])
@pytest.mark.parametrize(
    ("make", "code", "what"),
    [
        (_nothing, "EB545", "no pictures"),
        (lambda d: fill(d, ("ant",)), "EB546", "only the class 'ant'"),
        (_flat, "EB546", "no class folders"),
    ],
)
def test_folders_that_cannot_serve_a_classifier(
    model: str, tmp_path: Path, source: str, make: object, code: str, what: str
) -> None:
    if source == "cifar10-resnet20":
        _require_zoo_weights(source)
    assert callable(make)
    make(tmp_path / "d")
    with pytest.raises(ArtifactError, match=f"{code}.*{what}"):
        load_workload(source.format(model), data=str(tmp_path / "d"), task="classification")


def test_more_or_other_classes_than_the_model_has(model: str, tmp_path: Path) -> None:
    fill(tmp_path / "many", ("a", "b", "c", "d"), each=1)
    with pytest.raises(ArtifactError, match=r"EB547.*4 class folders, the model has 3"):
        load_workload(f"{model}:classes", data=str(tmp_path / "many"))
    _strangers(tmp_path / "d")
    with pytest.raises(ArtifactError, match=r"EB547.*'dog' is not among"):
        load_workload(f"{model}:classes", data=str(tmp_path / "d"))


@pytest.mark.parametrize("bad", [-1, 3])
def test_a_label_out_of_range_anywhere_is_found_before_any_work(
    model: str, tmp_path: Path, bad: int
) -> None:
    labels = np.zeros(40, np.int64)
    labels[37] = bad
    images = np.zeros((40, 3, 6, 8), np.float32)
    np.savez(tmp_path / "d.npz", image=images, labels=labels)
    with pytest.raises(ArtifactError, match=rf"EB547.*label {bad} .*0 to 2"):
        load_workload(f"{model}:classes", data=f"npz:{tmp_path / 'd.npz'}")


def test_channels_last_data_is_told_before_any_work(model: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", image=np.zeros((9, 6, 8, 3), np.float32))
    with pytest.raises(ArtifactError, match=r"EB548.*NHWC \[6, 8, 3\].*NCHW \[3, 6, 8\]"):
        load_workload(f"{model}:classes", data=str(tmp_path / "d.npz"))


@pytest.mark.parametrize(
    ("data", "what"),
    [
        ("imagefoldr:x", "EB169(.|\n)*no data at|EB169(.|\n)*did you mean imagefolder:x"),
        ("imagefolder:missing", "EB169.*no folder missing"),
        ("npz:missing.npz", "EB169.*no data file"),
        ("missing", "EB169.*no data at"),
        ("builtin", "EB169.*brings no data"),
    ],
)
def test_data_that_is_not_there(model: str, data: str, what: str) -> None:
    with pytest.raises(UsageError, match=what):
        load_workload(f"{model}:classes", data=data)


def test_every_refusal_is_one_line_with_a_hint(model: str, tmp_path: Path) -> None:
    _nothing(tmp_path / "d")
    for source, data in ((f"{model}:classes", str(tmp_path / "d")), ("digit", None)):
        with pytest.raises(EdgeBudgetError) as caught:
            load_workload(source, data=data)
        assert "\n" not in caught.value.what
        assert caught.value.hint


def test_the_zoos_own_skips_are_noted(tmp_path: Path) -> None:
    name = "cifar10-resnet20"
    _require_zoo_weights(name)
    for part in ("train", "test"):
        fill(tmp_path / "d" / part, ("airplane", "bird"))
    (tmp_path / "d" / "test" / "bird" / "03.png").write_bytes(b"broken")
    workload = load_workload(name, data=str(tmp_path / "d"))
    assert len(has(workload.data.evaluation)) == 19
    assert any("skipped 1 unreadable" in note for note in workload.notes)


def test_importing_the_loader_loads_neither_torch_nor_onnx() -> None:
    code = (
        "import sys, edgebudget.workload_loading as _\n"
        "assert not {'torch', 'onnx', 'transformers', 'scipy', 'PIL'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_folder_of_cifar_pictures_is_read_once(model: str) -> None:
    root = Path(os.environ.get("EDGEBUDGET_DATA", Path(__file__).parents[2] / "data")) / "cifar10"
    if not (root / "test").is_dir():
        pytest.skip(f"no CIFAR-10 folder at {root}: set EDGEBUDGET_DATA")
    workload = load_workload(f"{model}:classes", data=f"imagefolder:{root}", task="agreement")
    evaluation = has(workload.data.evaluation)
    assert len(evaluation) == 5000
    assert len(has(workload.data.calibration)) == 512
    inner = evaluation.inner  # type: ignore[attr-defined]
    assert all(p.pixels.dtype == np.uint8 for p in inner._read[0])


def _require_zoo_weights(name: str) -> None:
    from edgebudget_models import catalogue

    if not catalogue.get(name).weights_path.is_file():
        pytest.skip(f"the weights of {name} are not packaged yet")


def test_pictures_stay_in_memory(model: str, tmp_path: Path) -> None:
    root = fill(tmp_path / "d")
    workload = load_workload(f"{model}:classes", data=str(root))
    shutil.rmtree(root)
    assert has(workload.data.evaluation).sample(0).inputs["image"].shape == (3, 6, 8)
