"""Train `uhd-iqa` on a folder of photographs (a GPU is needed in practice).

`python -m edgebudget_models.recipes.uhd_iqa --data DIR --out FILE --report FILE --steps N`

Trains on the photographs of the `train` split only, making new windows, distortions and labels
at every step on the training device; reports on the `evaluation` split and the built-in photos.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F

from edgebudget_models import iqa_metric, iqa_photos
from edgebudget_models.checkpoint import save
from edgebudget_models.iqa_data import IqaData, iqa_data
from edgebudget_models.iqa_distort import KINDS, Distortion, distort
from edgebudget_models.iqa_photos import GRID
from edgebudget_models.uhd_iqa_net import UhdIqa

# Pictures a step and their size in pixels, in turn: crops as in the `train` split, quarters of
# a picture, whole pictures.
CYCLE = (
    (32, 512, 512),
    (12, 1080, 1920),
    (4, 2160, 3840),
    (12, 1080, 1920),
    (32, 512, 512),
    (4, 2160, 3840),
)
RATE, DECAY = 2e-3, 0.05
WINDOWS = 6  # of each photograph, drawn once
LAST_WHOLE = 0.1  # share of the steps, at the end, on whole pictures only
SCALES = (1.0, 0.75, 0.6)


def grids(data: IqaData, rng: np.random.Generator) -> Tensor:
    """Windows of the photographs on the grid, uint8 [N, 3, 216, 384]."""

    def windows(draw: tuple[int, np.ndarray]) -> list[np.ndarray]:
        photo = data.photos[draw[0]]
        pixels = photo.pixels()
        return [iqa_photos.grid(pixels, photo.region, 0.85 + 0.15 * s, x, y) for s, x, y in draw[1]]

    draws = [(index, rng.random((WINDOWS, 3))) for index in range(len(data.photos))]
    with ThreadPoolExecutor(8) as pool:
        return torch.from_numpy(np.stack([w for ws in pool.map(windows, draws) for w in ws]))


def draw_distortions(rng: np.random.Generator) -> tuple[Distortion, ...]:
    """One distortion, or two weaker ones for every fourth picture."""
    if rng.random() < 0.75:
        return (Distortion(str(rng.choice(KINDS)), float(rng.random())),)
    pair = rng.choice(KINDS, 2, replace=False)
    return tuple(Distortion(str(kind), 0.7 * float(rng.random())) for kind in pair)


def make_batch(
    cells: Tensor, shape: tuple[int, int, int], rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Distorted pictures [N, 3, H, W] and their qualities [N], on the device of `cells`."""
    count, height, width = shape
    references, pictures = [], []
    for _ in range(count):
        window = cells[int(rng.integers(len(cells)))][None]
        if rng.random() < 0.5:
            window = window.flip(-1)
        top = int(rng.integers(GRID[0] - -(-height // 10) + 1))
        left = int(rng.integers(GRID[1] - -(-width // 10) + 1))
        reference = iqa_photos.enlarge_crop(window, top, left, height, width)
        reference = reference ** float(rng.uniform(0.75, 1.35))
        seed = int(rng.integers(2**31))
        pictures.append(distort(reference[0], draw_distortions(rng), seed))
        references.append(reference[0])
    batch = torch.stack(pictures)
    return batch, iqa_metric.label(torch.stack(references), batch)


def rescale(picture: Tensor, scale: float) -> Tensor:
    """The picture at `scale` times its size, in multiples of four pixels."""
    size = [round(side * scale / 4) * 4 for side in picture.shape[-2:]]
    return F.interpolate(picture, size=size, mode="bilinear", align_corners=False)


def batches(cells: Tensor, steps: int, rng: np.random.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """The training batches; every second one is shrunk to 0.6 to 1 times its size."""
    whole_from = round(steps * (1 - LAST_WHOLE))
    for step in range(steps):
        shape = CYCLE[2] if step >= whole_from else CYCLE[step % len(CYCLE)]
        picture, quality = make_batch(cells, shape, rng)
        if rng.random() < 0.5:
            picture = rescale(picture, float(rng.uniform(0.6, 1.0)))
        yield picture.contiguous(memory_format=torch.channels_last), quality


def train(model: nn.Module, cells: Tensor, steps: int, seed: int) -> None:
    """Fit `model` in place."""
    rng = np.random.default_rng(seed)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, RATE, total_steps=steps, pct_start=0.15, final_div_factor=1e3
    )
    model.train()
    started, seen = time.monotonic(), torch.zeros((), device=cells.device)
    for step, (picture, quality) in enumerate(batches(cells, steps, rng), start=1):
        with torch.autocast(cells.device.type, torch.bfloat16):
            predicted = model(picture)[:, 0].float()
        error = predicted - quality
        loss = (error * error).mean() + 0.1 * error.abs().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        seen += error.detach().abs().mean()
        if step % 120 == 0:
            rate = step / (time.monotonic() - started)
            sys.stderr.write(f"step {step}/{steps} mae {seen.item() / 120:.4f} {rate:.1f}/s\n")
            seen.zero_()


def settle_batchnorm(model: nn.Module, cells: Tensor, seed: int, count: int) -> None:
    """Take the statistics of batch normalisation afresh over whole training pictures."""
    rng = np.random.default_rng(seed + 1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # plain average
    with torch.no_grad():
        for _ in range(count):
            model(make_batch(cells, CYCLE[2], rng)[0])
    model.eval()


def evaluate(model: nn.Module, data: IqaData, device: torch.device) -> dict[str, object]:
    """Rank and linear correlation with the labels on whole pictures, at several scales."""
    predicted: dict[float, list[float]] = {scale: [] for scale in SCALES}
    labels: list[float] = []
    with ThreadPoolExecutor(8) as pool, torch.no_grad():
        for inputs, label in pool.map(data.sample, range(len(data))):
            picture = torch.from_numpy(inputs["image"])[None].to(device)
            for scale in SCALES:
                shown = picture if scale == 1.0 else rescale(picture, scale)
                predicted[scale].append(model(shown).item())
            labels.append(float(label) if label is not None else float("nan"))
    out: dict[str, object] = {"pictures": len(labels), "photographs": len(data.photos)}
    for scale in SCALES:
        out[f"srcc@{scale}"] = round(float(stats.spearmanr(predicted[scale], labels)[0]), 4)
        out[f"plcc@{scale}"] = round(float(stats.pearsonr(predicted[scale], labels)[0]), 4)
        errors = np.abs(np.subtract(predicted[scale], labels))
        out[f"mae@{scale}"] = round(float(errors.mean()), 4)
    for kind in KINDS:
        chosen = [
            i for i, r in enumerate(data.recipes) if [d.kind for d in r.distortions] == [kind]
        ]
        pair = np.array([[predicted[1.0][i], labels[i]] for i in chosen])
        out[f"srcc {kind}"] = round(float(stats.spearmanr(pair[:, 0], pair[:, 1])[0]), 4)
    out["labels per tenth"] = np.histogram(labels, 10, (0, 1))[0].tolist()
    return out


def steps_for(seconds: float, cells: Tensor) -> int:
    """How many training steps fit into `seconds`, from the speed of a few."""
    probe = UhdIqa().to(cells.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    train(probe, cells, len(CYCLE), 0)
    started = time.monotonic()
    train(copy.deepcopy(probe), cells, 5 * len(CYCLE), 0)
    if cells.device.type == "cuda":
        torch.cuda.synchronize()
    return int(seconds / (time.monotonic() - started) * 5 * len(CYCLE))


def main() -> None:
    """Train, save, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seconds", type=float, help="choose the steps to take about so long")
    arguments = parser.parse_args()
    # The labels are differences of near-equal numbers: keep their convolutions in full float32.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    device = torch.device(arguments.device)
    photographs = iqa_data("train", arguments.data)
    held_out = iqa_data("evaluation", arguments.data)
    cells = grids(photographs, np.random.default_rng(arguments.seed)).to(device)
    steps = steps_for(arguments.seconds, cells) if arguments.seconds else arguments.steps
    sys.stderr.write(f"{len(photographs.photos)} photographs, {steps} steps\n")
    torch.manual_seed(arguments.seed)
    model = UhdIqa().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    train(model, cells, steps, arguments.seed)
    save(model, arguments.out)
    settle_batchnorm(model, cells, arguments.seed, count=max(1, min(60, steps // 10)))
    save(model, arguments.out)
    report = {
        "steps": steps,
        "seed": arguments.seed,
        "trained_on": sorted(p.name for p in photographs.photos),
        "held_out": sorted(p.name for p in held_out.photos),
        "held-out photographs": evaluate(model, held_out, device),
        "built-in photographs": evaluate(model, iqa_data("evaluation"), device),
    }
    arguments.report.write_text(json.dumps(report, indent=1) + "\n")
    shown = {k: v for k, v in report.items() if k not in ("trained_on", "held_out")}
    sys.stderr.write(json.dumps(shown, indent=1) + "\n")


if __name__ == "__main__":
    main()
