"""What a target's layers cost as their widths change, and plans that are made for a time."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgebudget import layer_time, target_registry
from edgebudget.layer_time import KINDS, LayerKind, LayerTime
from edgebudget_runtime.errors import TargetError

U55 = target_registry.get("npu:ethos-u55-128").spec.layer_time
ETHOS = [n for n in target_registry.names() if n.startswith("npu:ethos-u")]


@pytest.mark.parametrize("name", ETHOS)
def test_every_ethos_configuration_has_prices_and_their_error(name: str) -> None:
    found = target_registry.get(name).spec.layer_time
    assert found is not None
    assert set(found.prices) == set(KINDS)
    assert 0 < found.error < 0.35
    assert "simulated" in found.source


@given(
    st.sampled_from(KINDS), st.integers(1, 4096), st.integers(1, 25),
    st.integers(1, 300), st.integers(1, 300),
)  # fmt: skip
def test_a_wider_layer_never_takes_less(
    kind: LayerKind, positions: int, taps: int, outputs: int, inputs: int
) -> None:
    assert U55 is not None
    now = U55.us(kind, positions, taps, outputs, inputs)
    assert now > 0
    assert U55.us(kind, positions, taps, outputs + 1, inputs) >= now
    assert U55.us(kind, positions, taps, outputs, inputs + 1) >= now
    assert U55.us(kind, positions, taps, 0, inputs) == 0


def test_part_of_a_block_is_computed_as_a_whole_one() -> None:
    assert U55 is not None
    full = U55.us("conv", 1024, 9, 32, 32)
    assert U55.us("conv", 1024, 9, 17, 32) > 0.9 * full  # its weights are fewer
    assert U55.us("conv", 1024, 9, 16, 32) < 0.7 * full


@pytest.mark.parametrize("content", ["", "{}", '{"fits": {"u55-128": {"prices": {}}}}', "[1]"])
def test_a_damaged_file_of_prices_is_named(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.json").write_text(content)
    monkeypatch.setattr(layer_time, "files", lambda _package: tmp_path)
    with pytest.raises(TargetError, match=re.escape("EB620")):
        LayerTime.read("x.json", "u55-128")


def test_prices_of_a_device_that_was_not_fitted_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.json").write_text(json.dumps({"block": 16, "source": "x", "fits": {}}))
    monkeypatch.setattr(layer_time, "files", lambda _package: tmp_path)
    with pytest.raises(TargetError, match=r"EB620.*u99"):
        LayerTime.read("x.json", "u99")
