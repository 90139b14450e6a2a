"""The recipes run from end to end, in miniature."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from edgebudget_models import cifar10_resnet20, iqa_photos
from edgebudget_models.cifar import CLASSES
from edgebudget_models.recipes import cifar10_resnet20 as resnet_recipe
from edgebudget_models.recipes import digits as digits_recipe
from edgebudget_models.recipes import picture_training
from edgebudget_models.recipes import uhd_iqa as iqa_recipe
from edgebudget_models.uhd_iqa_net import UhdIqa


@pytest.mark.slow
def test_digits_recipe_reaches_its_accuracy() -> None:
    model = digits_recipe.train(seed=0)
    images, labels = digits_recipe._tensors("evaluation")
    with torch.no_grad():
        assert (model(images).argmax(1) == labels).float().mean().item() >= 0.97


def test_classifier_recipe_writes_weights_that_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    for name in CLASSES:
        for part in ("train", "test"):
            (tmp_path / part / name).mkdir(parents=True)
            for index in range(8):
                pixels = rng.integers(0, 256, (32, 32, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{index}.png")
    out, report = tmp_path / "w.safetensors", tmp_path / "r.json"
    command = ["x", "--data", str(tmp_path), "--out", str(out), "--report", str(report)]
    monkeypatch.setattr(sys, "argv", [*command, "--device", "cpu"])
    picture_training.run(
        cifar10_resnet20.ENTRY, replace(resnet_recipe.SETTINGS, epochs=1, batch=20), None
    )
    assert json.loads(report.read_text())["pictures"] == 80
    cifar10_resnet20.ENTRY.load(out)


def test_quality_recipe_learns_with_fixed_statistics_at_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small = (2, 1, 352, 384)
    for name in ("CROPS", "WHOLE"):
        monkeypatch.setattr(iqa_recipe, name, small)
    for name in ("CYCLE", "SETTLED_CYCLE"):
        monkeypatch.setattr(iqa_recipe, name, (small,))
    monkeypatch.setattr(iqa_recipe, "SETTLE_BATCHES", 1)
    photo = iqa_photos.builtin("train")[0]
    cells = iqa_photos.as_cells(iqa_photos.grid(photo.pixels(), photo.region, 1.0, 0.5, 0.5))
    torch.manual_seed(0)
    model = UhdIqa()
    before = [p.clone() for p in model.parameters()]
    iqa_recipe.train(model, cells, steps=2, seed=0, rate=1e-3)
    assert not model.training
    changed = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert sum(changed) > len(changed) // 2
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
