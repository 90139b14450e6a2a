"""Train `digits` on the CPU, in seconds.

`python -m edgebudget_models.recipes.digits --out FILE`
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgebudget_models.checkpoint import save
from edgebudget_models.digits import DigitsData, build
from edgebudget_models.entry import Split

EPOCHS, BATCH, RATE = 40, 64, 4e-3


def _tensors(split: Split) -> tuple[Tensor, Tensor]:
    data = DigitsData(split)
    samples = [data.sample(i) for i in range(len(data))]
    labels = np.stack([label for _, label in samples if label is not None])
    return torch.from_numpy(np.stack([x["image"] for x, _ in samples])), torch.from_numpy(labels)


def _shift(images: Tensor, generator: torch.Generator) -> Tensor:
    """Move each batch by at most one pixel."""
    dy, dx = torch.randint(-1, 2, (2,), generator=generator).tolist()
    padded = F.pad(images, (1, 1, 1, 1))
    return padded[:, :, 1 + dy : 9 + dy, 1 + dx : 9 + dx]


def train(seed: int) -> nn.Module:
    """The trained network, in eval mode."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    images, labels = _tensors("train")
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05)
    steps = EPOCHS * (len(labels) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    for _ in range(EPOCHS):
        order = torch.randperm(len(labels), generator=generator)
        for start in range(0, len(labels) - BATCH + 1, BATCH):
            batch = order[start : start + BATCH]
            scores = model(_shift(images[batch], generator))
            loss = F.cross_entropy(scores, labels[batch], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return model.eval()


def main() -> None:
    """Train, say the top-1 on the held-out digits, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    model = train(arguments.seed)
    images, labels = _tensors("evaluation")
    with torch.no_grad():
        top1 = (model(images).argmax(1) == labels).float().mean().item()
    sys.stderr.write(f"top-1 on {len(labels)} held-out digits: {top1:.4f}\n")
    save(model, arguments.out)


if __name__ == "__main__":
    main()
