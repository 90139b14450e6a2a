"""Train `uhd-iqa` on a folder of photographs (a GPU is needed in practice).

`python -m edgebudget_models.recipes.uhd_iqa --data DIR --out FILE --report FILE --steps N`

Trains on the photographs of the `train` split only, making new windows, distortions and labels
at every step on the training device; reports on the `evaluation` split and the built-in photos.
"""

from __future__ import annotations

import argparse
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
from edgebudget_models.entry import Array
from edgebudget_models.iqa_data import IqaData, iqa_data
from edgebudget_models.iqa_distort import KINDS, Distortion, distort
from edgebudget_models.iqa_photos import ENLARGEMENT, GRID
from edgebudget_models.uhd_iqa_net import UhdIqa

# Batches in turn: groups, pictures a group (all distorted alike), height, width. Crops as in the
# `train` split, quarters of a picture, whole pictures. Batches are large because their members
# share the statistics of batch normalisation, which tell a distortion apart from its neighbours.
CROPS, QUARTERS, WHOLE = (16, 6, 512, 512), (12, 2, 1080, 1920), (8, 1, 2160, 3840)
CYCLE = (CROPS, QUARTERS)
SETTLED_CYCLE = (WHOLE, QUARTERS, CROPS, WHOLE)
RATE, DECAY = 1e-3, 0.05
WINDOWS = 6  # of each photograph, drawn once
SETTLED = 0.4  # share of the steps, at the end, with fixed statistics of normalisation
RESCALED = 0.6  # share of the batches shrunk to LOW_SCALE to 1 times their size
LOW_SCALE = 0.55
SETTLE_BATCHES = 20
REPORT_EVERY, PROBE_STEPS = 60, 40
SCALES = (1.0, 0.77, 0.65)


def grids(data: IqaData, rng: np.random.Generator) -> Tensor:
    """Windows of the photographs on the grid, uint8 [N, 3, 216, 384]."""

    def windows(draw: tuple[int, Array]) -> list[Array]:
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
    cells: Tensor, shape: tuple[int, int, int, int], rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Distorted pictures [N, 3, H, W] and their qualities [N], on the device of `cells`."""
    groups, members, height, width = shape
    pictures, qualities = [], []
    for _ in range(groups):
        windows = torch.stack([cells[i] for i in rng.integers(len(cells), size=members).tolist()])
        if rng.random() < 0.5:
            windows = windows.flip(-1)
        top = int(rng.integers(GRID[0] - -(-height // ENLARGEMENT) + 1))
        left = int(rng.integers(GRID[1] - -(-width // ENLARGEMENT) + 1))
        reference = iqa_photos.enlarge_crop(windows, top, left, height, width)
        reference = reference ** float(rng.uniform(0.75, 1.35))
        distorted = distort(reference, draw_distortions(rng), int(rng.integers(2**31)))
        pictures.append(distorted)
        qualities.append(iqa_metric.label(reference, distorted))
    return torch.cat(pictures), torch.cat(qualities)


def rescale(picture: Tensor, scale: float) -> Tensor:
    """The picture at `scale` times its size, in multiples of four pixels."""
    size = [round(side * scale / 4) * 4 for side in picture.shape[-2:]]
    return F.interpolate(picture, size=size, mode="bilinear", align_corners=False)


def batches(
    cells: Tensor, settled_from: int, steps: int, rng: np.random.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """The training batches."""
    for step in range(steps):
        cycle = SETTLED_CYCLE if step >= settled_from else CYCLE
        picture, quality = make_batch(cells, cycle[step % len(cycle)], rng)
        if rng.random() < RESCALED:
            picture = rescale(picture, float(rng.uniform(LOW_SCALE, 1.0)))
        yield picture.contiguous(memory_format=torch.channels_last), quality


def train(model: UhdIqa, cells: Tensor, steps: int, seed: int, rate: float) -> None:
    """Fit `model` in place and leave it in eval mode."""
    rng = np.random.default_rng(seed)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=steps, pct_start=0.1, final_div_factor=1e3
    )
    model.train()
    settled_from = round(steps * (1 - SETTLED))
    started, seen = time.monotonic(), torch.zeros((), device=cells.device)
    for step, (picture, quality) in enumerate(batches(cells, settled_from, steps, rng)):
        if step == settled_from:
            settle_batchnorm(model, cells, seed)
        error = predict(model, picture) - quality
        loss = (error * error).mean() + 0.1 * error.abs().mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        seen += error.detach().abs().mean()
        if step % REPORT_EVERY == REPORT_EVERY - 1:
            pace = (step + 1) / (time.monotonic() - started)
            mae = seen.item() / REPORT_EVERY
            sys.stderr.write(f"step {step + 1}/{steps} mae {mae:.4f} {pace:.1f}/s\n")
            seen.zero_()
    model.eval()


def predict(model: UhdIqa, picture: Tensor) -> Tensor:
    """Qualities [N] in mixed precision; the first layer needs more than bfloat16's eight bits."""
    x = model.stem(picture)
    with torch.autocast(picture.device.type, torch.bfloat16):
        x = model.blocks(x)
    score: Tensor = model.head(torch.flatten(model.pool(x.float()), 1))
    return torch.sigmoid(score)[:, 0]


def settle_batchnorm(model: UhdIqa, cells: Tensor, seed: int) -> None:
    """Take the statistics of batch normalisation afresh over whole pictures, then keep them."""
    rng = np.random.default_rng(seed + 1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # plain average
    with torch.no_grad():
        for _ in range(SETTLE_BATCHES):
            picture, _ = make_batch(cells, WHOLE, rng)
            predict(model, picture.contiguous(memory_format=torch.channels_last))
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
    train(probe, cells, PROBE_STEPS, 0, RATE)
    started = time.monotonic()
    train(probe, cells, PROBE_STEPS, 0, RATE)
    if cells.device.type == "cuda":
        torch.cuda.synchronize()
    return max(1, int(seconds / (time.monotonic() - started) * PROBE_STEPS))


def main() -> None:
    """Train, save, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--report", type=Path, help="evaluate, and write a JSON file")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=4700)
    parser.add_argument("--rate", type=float, default=RATE)
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
    train(model, cells, steps, arguments.seed, arguments.rate)
    save(model, arguments.out)
    if arguments.report is None:
        return
    report = {
        "steps": steps,
        "seed": arguments.seed,
        "rate": arguments.rate,
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
