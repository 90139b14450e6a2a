"""How the CIFAR-10 classifiers are trained: everything on the device, pictures as uint8."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgebudget_models import cifar
from edgebudget_models.checkpoint import save
from edgebudget_models.entry import Split, ZooEntry
from edgebudget_models.image_folder import FolderData

SOURCE_SIZE = 32  # pixels a side of the pictures as they are


@dataclass(frozen=True, slots=True)
class Settings:
    """`sizes` are (share of the run, pixels a side): the pictures are enlarged to that side."""

    epochs: int
    sizes: tuple[tuple[float, int], ...]
    batch: int = 256
    rate: float = 0.2
    decay: float = 5e-4
    smoothing: float = 0.0
    warm_up: float = 0.05


def load_pictures(root: Path, split: Split, device: torch.device) -> tuple[Tensor, Tensor]:
    """Normalised pictures [N, 3, 32, 32] and their classes [N]."""
    data = FolderData(root, split, cifar.CLASSES, cifar.recipe(SOURCE_SIZE))
    pictures, labels = data.raw()
    scaled = torch.from_numpy(pictures).to(device).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (cifar.MEAN, cifar.STD))
    return ((scaled - mean) / std).contiguous(), torch.from_numpy(labels).to(device)


def augment(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Move each picture by up to four pixels and mirror every second."""
    count, device = len(pictures), pictures.device
    padded = F.pad(pictures, (4, 4, 4, 4))
    corner = torch.randint(0, 9, (2, count, 1), generator=generator, device=device)
    line = torch.arange(SOURCE_SIZE, device=device)
    rows, columns = corner[0] + line, corner[1] + line
    mirrored = torch.rand(count, 1, generator=generator, device=device) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    index = torch.arange(count, device=device)[:, None, None]
    return padded[index, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def enlarge(pictures: Tensor, size: int) -> Tensor:
    """Bilinear, as the entry's own pre-processing does."""
    if size != pictures.shape[-1]:
        pictures = F.interpolate(pictures, size=(size, size), mode="bilinear")
    return pictures.contiguous(memory_format=torch.channels_last)


def top1(model: nn.Module, pictures: Tensor, labels: Tensor, size: int) -> float:
    """The share of pictures whose highest score is their class's, in float32."""
    right = 0
    with torch.no_grad():
        for start in range(0, len(labels), 250):
            part = slice(start, start + 250)
            scores = model(enlarge(pictures[part], size))
            right += int((scores.argmax(1) == labels[part]).sum())
    return right / len(labels)


def train(
    model: nn.Module, data: tuple[Tensor, Tensor], settings: Settings, seed: int, seconds: float
) -> int:
    """Fit `model` in place, over the settings' epochs or for about `seconds`; steps taken."""
    pictures, labels = data
    generator = torch.Generator(pictures.device).manual_seed(seed)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": settings.decay},
        {"params": vectors},
    ]
    optimizer = torch.optim.SGD(groups, settings.rate, momentum=0.9, nesterov=True)
    per_epoch = len(labels) // settings.batch
    started, steps, done = time.monotonic(), 0, 0.0
    model.train()
    while done < 1.0:
        order = torch.randperm(len(labels), generator=generator, device=pictures.device)
        for index in range(per_epoch):
            batch = order[index * settings.batch : (index + 1) * settings.batch]
            elapsed = (time.monotonic() - started) / seconds if seconds else 0.0
            done = elapsed or steps / (settings.epochs * per_epoch)
            if done >= 1.0:
                break
            for group in optimizer.param_groups:
                group["lr"] = settings.rate * _share_of_rate(done, settings.warm_up)
            size = next(side for until, side in settings.sizes if done < until)
            with torch.autocast(pictures.device.type, torch.bfloat16):
                scores = model(enlarge(augment(pictures[batch], generator), size))
            loss = F.cross_entropy(
                scores.float(), labels[batch], label_smoothing=settings.smoothing
            )
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            steps += 1
        if steps // per_epoch % 10 == 0:
            sys.stderr.write(f"epoch {steps / per_epoch:.0f}, {done:.0%}, loss {loss.item():.3f}\n")
    model.eval()
    return steps


def _share_of_rate(done: float, warm_up: float) -> float:
    if done < warm_up:
        return done / warm_up
    return 0.5 * (1 + math.cos(math.pi * (done - warm_up) / (1 - warm_up)))


def run(entry: ZooEntry, settings: Settings, description: str | None) -> None:
    """The command line of a recipe: train, test on the evaluation split, save."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, required=True, help="root/{train,test}/<class>/*.jpg")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--report", type=Path, help="write a JSON file")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=0.0, help="instead of the epochs")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    data = load_pictures(arguments.data, "train", device)
    torch.manual_seed(arguments.seed)
    model = entry.build().to(device)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    steps = train(model, data, settings, arguments.seed, arguments.seconds)
    save(model, arguments.out)
    held_out = load_pictures(arguments.data, "evaluation", device)
    report = {
        "name": entry.name,
        "epochs": round(steps * settings.batch / len(data[1]), 1),
        "seed": arguments.seed,
        "top1": round(top1(model, *held_out, settings.sizes[-1][1]), 4),
        "pictures": len(held_out[1]),
        "training pictures": len(data[1]),
    }
    sys.stderr.write(json.dumps(report) + "\n")
    if arguments.report is not None:
        arguments.report.write_text(json.dumps(report, indent=1) + "\n")
