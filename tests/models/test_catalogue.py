"""Every entry of the zoo keeps its contract."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from edgebudget_models import catalogue
from edgebudget_models.cifar_resnet_net import CifarResNet
from edgebudget_models.digits import DigitsData

REPOSITORY = Path(__file__).resolve().parents[2]


def _data_folder(name: str) -> Path:
    given = os.environ.get("EDGEBUDGET_DATA")
    roots = [Path(given)] if given else [REPOSITORY / "data", REPOSITORY.parent / "shared/data"]
    for root in roots:
        if (root / name).exists():
            return root / name
    pytest.skip(f"no {name} in {', '.join(map(str, roots))} (set EDGEBUDGET_DATA)")


def test_listing_loads_neither_torch_nor_pillow() -> None:
    code = (
        "import sys; from edgebudget_models import catalogue as c;"
        "[c.get(n).summary for n in c.names()]; print({'torch', 'PIL'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


def test_unknown_name() -> None:
    with pytest.raises(KeyError):
        catalogue.get("resnet")


@pytest.mark.parametrize("name", catalogue.names())
def test_packaged_weights_load_and_answer(name: str) -> None:
    entry = catalogue.get(name)
    assert entry.name == name
    assert entry.card_path.is_file()
    assert entry.weights_path.stat().st_size < 10_000_000
    json.dumps(dict(entry.preprocessing))
    model = entry.load(None)
    assert not model.training
    shape = (2, 3, 128, 192) if name == "uhd-iqa" else (2, *entry.input_shape[1:])
    with torch.no_grad():
        answers = model(torch.rand(shape, generator=torch.Generator().manual_seed(0)))
    outputs = answers if isinstance(answers, tuple) else (answers,)
    assert len(outputs) == len(entry.outputs)
    for out in outputs:
        assert out.shape == (2, len(entry.classes) or 1)
        if entry.task == "regression":
            assert bool(((out >= 0) & (out <= 1)).all())


@pytest.mark.parametrize(
    ("name", "macs"),
    [
        ("cifar10-resnet20", 40_551_040),
        ("cifar10-resnet56", 125_485_696),
        ("cifar10-resnet56-elastic", 153_799_168),
        ("cifar10-mobilenet-elastic", 90_411_776),
        ("mobilenet-v2", 299_507_072),
        ("uhd-iqa", 83_117_998_272),
    ],
)
def test_cost_is_the_stated_one(name: str, macs: int) -> None:
    entry = catalogue.get(name)
    model = entry.build().eval().to("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(entry.input_shape, device="meta"))
    assert counter.get_total_flops() == 2 * macs


def test_digits_are_recognised() -> None:
    data = DigitsData("evaluation")
    images = torch.from_numpy(np.stack([data.sample(i)[0]["image"] for i in range(len(data))]))
    labels = np.array([int(np.asarray(data.sample(i)[1])) for i in range(len(data))])
    with torch.no_grad():
        found = catalogue.get("digits").load(None)(images).argmax(1).numpy()
    assert (found == labels).mean() >= 0.97


def test_digits_splits_are_disjoint_and_repeatable() -> None:
    digests = {}
    seen: set[bytes] = set()
    for split in ("calibration", "train", "evaluation"):
        data = catalogue.get("digits").data(split, None)
        assert data.digest() == catalogue.get("digits").data(split, None).digest()
        digests[split] = data.digest()
        pictures = {data.sample(i)[0]["image"].tobytes() for i in range(len(data))}
        assert not pictures & seen
        seen |= pictures
    assert len(set(digests.values())) == 3


@pytest.mark.parametrize(("depth", "blocks", "top1"), [(20, 3, 0.78), (56, 9, 0.80)])
def test_reference_checkpoints_load_and_classify(depth: int, blocks: int, top1: float) -> None:
    weights = _data_folder("weights") / f"resnet{depth}-cifar10.safetensors"
    root = _data_folder("cifar10")
    entry = catalogue.get(f"cifar10-resnet{depth}")
    data = entry.data("evaluation", root)
    samples = [data.sample(i) for i in range(0, len(data), 10)]
    labels = np.array([int(np.asarray(label)) for _, label in samples])
    model = entry.load(weights)
    assert isinstance(model, CifarResNet)
    assert len(model.layer1) == blocks
    with torch.no_grad():
        found = model(torch.from_numpy(np.stack([x["image"] for x, _ in samples]))).argmax(1)
    assert (found.numpy() == labels).mean() >= top1


def test_shortcut_centres_the_old_channels() -> None:
    model = CifarResNet(1).eval()
    block = model.layer2[0]
    for parameter in block.parameters():
        nn.init.zeros_(parameter)
    x = torch.rand(1, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = block(x)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any()
    assert not y[:, 24:].any()
