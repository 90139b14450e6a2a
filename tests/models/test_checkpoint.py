"""Only whole safetensors files with exactly the right tensors become weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from edgebudget_models.checkpoint import load_into, save
from edgebudget_models.digits_net import DigitsNet


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(3)
    path = tmp_path / "w.safetensors"
    save(DigitsNet(), path)
    return path


def test_round_trip_is_exact_and_half_precision_widens(weights: Path) -> None:
    model = load_into(DigitsNet(), weights)
    stored = load_file(weights)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in stored.items())
    save_file({k: v.half() for k, v in stored.items()}, weights)
    half = load_into(DigitsNet(), weights)
    assert {p.dtype for p in half.parameters()} == {torch.float32}


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such weights file"):
        load_into(DigitsNet(), tmp_path / "none.safetensors")


def test_pickle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    torch.save(DigitsNet().state_dict(), path)
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_into(DigitsNet(), path)


@pytest.mark.parametrize("kept", [0, 5, 1000, -1])
def test_truncated_file(weights: Path, kept: int) -> None:
    weights.write_bytes(weights.read_bytes()[:kept])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_into(DigitsNet(), weights)


def test_other_tensors(weights: Path) -> None:
    good = load_file(weights)
    save_file({k: v for k, v in good.items() if k != "linear.bias"}, weights)
    with pytest.raises(ValueError, match=r"missing, the first is linear\.bias"):
        load_into(DigitsNet(), weights)
    save_file({**good, "extra": torch.zeros(1)}, weights)
    with pytest.raises(ValueError, match="unknown, the first is extra"):
        load_into(DigitsNet(), weights)
    save_file({**good, "linear.bias": torch.zeros(11)}, weights)
    with pytest.raises(ValueError, match=r"shape \(11,\), needed \(10,\)"):
        load_into(DigitsNet(), weights)


def test_values_that_are_not_finite(weights: Path) -> None:
    good = load_file(weights)
    good["linear.bias"][0] = float("nan")
    save_file(good, weights)
    with pytest.raises(ValueError, match="holds NaN or Inf"):
        load_into(DigitsNet(), weights)
