"""The command line that the recipes of students share, who learn from teachers' answers."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgebudget_models.checkpoint import M, load_into, save
from edgebudget_models.entry import Split
from edgebudget_models.recipes.cifar_views import load_pictures
from edgebudget_models.recipes.distillation import Settings, Teachers, scores, train


def parser(description: str | None, settings: Settings) -> argparse.ArgumentParser:
    """What every student's recipe takes."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--data", type=Path, required=True, help="root/{train,test}/<class>/*.jpg")
    made.add_argument("--teachers", type=Path, required=True, help="folder of teachers' answers")
    made.add_argument("--out", type=Path, required=True)
    made.add_argument("--report", type=Path, help="write a JSON file")
    made.add_argument("--scores", type=Path, help="write all scores (.npz)")
    made.add_argument("--device", default="cuda")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--epochs", type=int, default=settings.epochs)
    made.add_argument("--start", type=Path, help="weights to go on from")
    made.add_argument("--rate", type=float, default=settings.rate)
    return made


def started(model: M, weights: Path | None) -> M:
    """`model` with `weights`, or as it is."""
    return model if weights is None else load_into(model, weights)


def run(
    build: Callable[[], nn.Module],
    arguments: argparse.Namespace,
    settings: Settings,
    kept_back: int,
    half: bool = False,
    finish: Callable[[nn.Module], nn.Module] = lambda model: model,
) -> None:
    """Train, make the final network by `finish`, save it, and say how good it is.

    With `half` the weights are stored, and looked at, in half precision.
    """
    device = torch.device(arguments.device)
    pictures = load_pictures(arguments.data, "train", kept_back, device)
    teachers = Teachers(sorted(arguments.teachers.glob("*.npy")), device)
    torch.manual_seed(arguments.seed)
    model = build().to(device)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    settings = replace(settings, epochs=arguments.epochs, rate=arguments.rate)
    train(model, pictures, settings, arguments.seed, teachers)
    model = finish(model)
    if half:
        model = model.half()
    save(model, arguments.out)
    model = model.float()
    torch.backends.cudnn.allow_tf32 = False
    found: dict[str, Tensor] = {}
    report: dict[str, object] = {"epochs": settings.epochs, "seed": arguments.seed}
    looked_at: tuple[tuple[str, Split], ...] = (
        ("kept back", "calibration"),
        ("test", "evaluation"),
    )
    for name, split in looked_at:
        seen = load_pictures(arguments.data, split, kept_back, device)
        answers = scores(model, seen.pixels)
        right = (answers.argmax(2) == seen.labels).float().mean(1)
        report[name] = [round(value, 4) for value in right.tolist()]
        key = name.replace(" ", "_")
        found |= {f"{key}_scores": answers, f"{key}_labels": seen.labels}
    sys.stderr.write(json.dumps(report) + "\n")
    if arguments.report is not None:
        arguments.report.write_text(json.dumps(report, indent=1) + "\n")
    if arguments.scores is not None:
        arrays: dict[str, Any] = {k: v.cpu().numpy() for k, v in found.items()}
        np.savez_compressed(arguments.scores, **arrays)
