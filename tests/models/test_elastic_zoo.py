"""The networks of the zoo whose work can vary, and the recipes that made them."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from edgebudget_models import catalogue
from edgebudget_models.cifar import CLASSES
from edgebudget_models.cifar_elastic_net import BLOCKS, TAPS, ElasticResNet, Tap
from edgebudget_models.cifar_mobilenet_net import CifarMobileNet, ElasticMobileNet
from edgebudget_models.cifar_resnet_net import CifarResNet
from edgebudget_models.cifar_vit_net import VisionTransformer
from edgebudget_models.image_folder import list_split
from edgebudget_models.recipes import cifar10_mobilenet_elastic as mobilenet_recipe
from edgebudget_models.recipes import cifar10_resnet56_elastic as recipe
from edgebudget_models.recipes import cifar10_vit, cifar_teachers, cifar_views, distillation

REPOSITORY = Path(__file__).resolve().parents[2]


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _data_folder() -> Path:
    given = os.environ.get("EDGEBUDGET_DATA")
    roots = [Path(given)] if given else [REPOSITORY / "data", REPOSITORY.parent / "shared/data"]
    for root in roots:
        if (root / "cifar10").exists():
            return root / "cifar10"
    pytest.skip(f"no cifar10 in {', '.join(map(str, roots))} (set EDGEBUDGET_DATA)")


@pytest.mark.parametrize(
    ("model", "macs"),
    [
        (ElasticResNet(TAPS[:1]), 21_676_672),
        (ElasticResNet(TAPS), 42_910_976),
        (ElasticMobileNet((5,)), 28_643_840),
        (ElasticMobileNet((5, 8)), 44_487_680),
    ],
)
def test_cost_up_to_an_exit(model: ElasticResNet | ElasticMobileNet, macs: int) -> None:
    model = model.eval().to("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.early(torch.empty(1, 3, 32, 32, device="meta"))
    assert counter.get_total_flops() == 2 * macs


@pytest.mark.parametrize("name", ["cifar10-resnet56-elastic", "cifar10-mobilenet-elastic"])
def test_exits_are_named_as_they_are_returned(name: str) -> None:
    entry = catalogue.get(name)
    assert entry.outputs == ("scores.exit1", "scores.exit2", "scores")
    with torch.no_grad():
        answers = entry.load(None)(_noise(2, 3, 32, 32))
    assert isinstance(answers, tuple)
    assert len(answers) == 3


def test_body_of_the_elastic_network_is_a_resnet56() -> None:
    elastic = {k: v.shape for k, v in ElasticResNet().state_dict().items()}
    plain = {k: v.shape for k, v in CifarResNet(BLOCKS).state_dict().items()}
    del plain["linear.weight"]
    assert all(elastic[name] == shape for name, shape in plain.items())


def test_an_exit_does_not_depend_on_what_comes_after() -> None:
    model = ElasticResNet((Tap(1, 0, 1), Tap(2, 1, 0), Tap(12, 0, 0))).eval()
    x = _noise(2, 3, 32, 32)
    with torch.no_grad():
        before = model(x)
        for block in [*list(model.layer1)[2:], *model.layer2, *model.layer3]:
            for parameter in block.parameters():
                parameter.mul_(1.5)
        after = model(x)
    same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert same == [True, True, False, False]


def test_mobilenet_exits_build_on_earlier_ones_only() -> None:
    model = ElasticMobileNet((3, 6, 12)).eval()
    x = _noise(2, 3, 32, 32)
    with torch.no_grad():
        before = model(x)
        for parameter in [*model.features[3].parameters(), *model.rungs[1].parameters()]:
            parameter.mul_(1.5)
        after = model(x)
    same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert same == [True, False, False, False]


@pytest.mark.parametrize("family", ["resnet", "mobilenet"])
def test_last_answer_is_shared_between_body_and_last_exit(family: str) -> None:
    torch.manual_seed(0)
    body, made = {
        "resnet": (CifarResNet(BLOCKS), recipe),
        "mobilenet": (CifarMobileNet(), mobilenet_recipe),
    }[family]
    student = made.student(body).eval()
    x = _noise(4, 3, 32, 32)
    with torch.no_grad():
        exit1, exit2, *_, alone = student(x)
        torch.testing.assert_close(alone, body.eval()(x))
        answers = made.finished(student)(x)
    expected = (1 - made.SHARE) * alone + made.SHARE * exit2
    for answer, wanted in zip(answers, (exit1, exit2, expected), strict=True):
        torch.testing.assert_close(answer, wanted, rtol=1e-4, atol=1e-4)


def test_transformer_skips_layers_only_while_training() -> None:
    torch.manual_seed(0)
    model = VisionTransformer(32, depth=3, heads=2, drop=0.9)
    x = _noise(16, 3, 32, 32)
    with torch.no_grad():
        assert not torch.equal(model(x), model(x))
        model.eval()
        whole = model(x)
        torch.testing.assert_close(model(x[:1]), whole[:1], rtol=1e-4, atol=1e-5)
        model.layers = torch.nn.Sequential(*list(model.layers)[:2])
        assert model(x).shape == whole.shape


@pytest.mark.parametrize(
    "name", ["cifar10-resnet56-elastic", "cifar10-mobilenet-elastic", "cifar10-vit"]
)
def test_networks_export_and_answer_the_same(name: str) -> None:
    model = catalogue.get(name).load(None)
    x = _noise(1, 3, 32, 32)
    with torch.no_grad():
        exported = torch.export.export(model, (x,)).module()
        torch.testing.assert_close(exported(x), model(x))


@pytest.mark.parametrize(
    ("name", "top1"),
    [
        ("cifar10-resnet56-elastic", (0.83, 0.84, 0.87)),
        ("cifar10-mobilenet-elastic", (0.84, 0.86, 0.87)),
        ("cifar10-vit", (0.82,)),
    ],
)
def test_packaged_weights_classify(name: str, top1: tuple[float, ...]) -> None:
    entry = catalogue.get(name)
    data = entry.data("evaluation", _data_folder())
    samples = [data.sample(index) for index in range(0, len(data), 25)]
    labels = torch.tensor([int(np.asarray(label)) for _, label in samples])
    with torch.no_grad():
        answers = entry.load(None)(torch.from_numpy(np.stack([x["image"] for x, _ in samples])))
    answers = answers if isinstance(answers, tuple) else (answers,)
    for scores, least in zip(answers, top1, strict=True):
        assert (scores.argmax(1) == labels).float().mean().item() >= least


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five training pictures and one test picture a class."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 5), ("test", 1)):
        for name in CLASSES:
            (tmp_path / part / name).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 256, (32, 32, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{index}.png")
    return tmp_path


def test_keeping_more_back_keeps_the_same_and_more(folder: Path) -> None:
    few = set(list_split(folder, "calibration", CLASSES, 5))
    many = set(list_split(folder, "calibration", CLASSES, 10))
    train = set(list_split(folder, "train", CLASSES, 10))
    assert (len(few), len(many), len(train)) == (5, 10, 40)
    assert few < many
    assert not many & train


def test_views_repeat_and_say_what_they_mixed() -> None:
    count = 64
    pictures = cifar_views.Pictures(_noise(count, 32, 32, 3), torch.arange(count) % 10)
    first, again, other = (cifar_views.view(pictures, number) for number in (3, 3, 4))
    assert torch.equal(first.pixels, again.pixels)
    assert not torch.equal(first.pixels, other.pixels)
    shares = cifar_views.targets(pictures, first)
    torch.testing.assert_close(shares.sum(1), torch.ones(count))
    whole = first.share == 1
    assert 0 < int(whole.sum()) < count
    assert torch.equal(shares[whole].argmax(1), pictures.labels[whole])
    assert bool((first.share >= 0.5).all())


def test_recipes_run_from_teacher_to_weights(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (cifar_teachers, recipe, mobilenet_recipe, cifar10_vit):
        monkeypatch.setattr(module, "SETTINGS", replace(module.SETTINGS, epochs=1, batch=20))
        monkeypatch.setattr(module, "KEPT_BACK", 10)
    monkeypatch.setattr(cifar_teachers, "WIDTH", 1)
    answers, weights, report = tmp_path / "answers", tmp_path / "w", tmp_path / "r.json"
    answers.mkdir()
    common = ["x", "--data", str(folder), "--device", "cpu"]

    def call(main: object, *more: str) -> None:
        monkeypatch.setattr(sys, "argv", [*common, *more])
        assert callable(main)
        main()

    call(cifar_teachers.main, "--out", str(answers / "0.npy"), "--views", "2")
    assert np.load(answers / "0.npy", allow_pickle=False).shape == (2, 40, 10)
    taught = ("--teachers", str(answers), "--out")
    body = tmp_path / "body"
    call(recipe.main, *taught, str(body), "--static", "9")
    call(recipe.main, *taught, str(weights), "--start", str(body), "--report", str(report))
    catalogue.get("cifar10-resnet56-elastic").load(weights)
    assert len(json.loads(report.read_text())["test"]) == 3
    call(mobilenet_recipe.main, *taught, str(body), "--static")
    call(mobilenet_recipe.main, *taught, str(weights), "--start", str(body))
    assert weights.stat().st_size < 10_000_000
    catalogue.get("cifar10-mobilenet-elastic").load(weights)
    call(cifar10_vit.main, *taught, str(weights))
    assert weights.stat().st_size < 10_000_000
    catalogue.get("cifar10-vit").load(weights)


def test_students_need_teachers() -> None:
    with pytest.raises(ValueError, match="train teachers first"):
        distillation.Teachers((), torch.device("cpu"))
