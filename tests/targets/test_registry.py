from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint
from typing import Any

import pytest

from edgebudget import target_registry
from edgebudget_runtime.errors import TargetError, UnsupportedError, UsageError


def test_listing_names_loads_nothing_heavy() -> None:
    code = (
        "import sys; from edgebudget import target_registry as t; t.names();"
        "print([m for m in ('torch', 'onnx', 'onnxruntime', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert not {"torch", "onnx", "onnxruntime"} & set(eval(done.stdout))


def test_npu_is_a_phone_and_devices_differ_by_number() -> None:
    assert target_registry.get("npu").spec == target_registry.get("npu:hexagon").spec
    spec = target_registry.get("npu").spec
    assert spec.name == "npu:hexagon/snapdragon-8-gen3"
    assert (spec.options["soc_model"], spec.options["arch"]) == ("57", "75")
    assert (spec.max_fallback, spec.float_fallback) == (0, False)
    devices = [n for n in target_registry.names() if n.startswith("npu:hexagon/")]
    numbers = {target_registry.get(n).spec.options["soc_model"] for n in devices}
    assert len(numbers) == len(devices) == 10


def test_every_name_answers_with_its_spec() -> None:
    for name in target_registry.names():
        spec = target_registry.get(name).spec
        assert spec.name.startswith(name.split("/")[0])
        assert spec.activation_dtypes
        assert (spec.weight_dtypes == ("int8",)) == spec.integers


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("cpuu", "'cpu'"),
        ("NPU", "'npu'"),
        ("npu:hexagon/snapdragon-8-gen33", "'npu:hexagon/snapdragon-8-gen3'"),
        ("snapdragon-8-elite", "'npu:hexagon/snapdragon-8-elite'"),
    ],
)
def test_a_wrong_name_gets_a_suggestion(typed: str, meant: str) -> None:
    with pytest.raises(UsageError, match="EB140") as caught:
        target_registry.get(typed)
    assert f"did you mean {meant}?" in caught.value.hint


def test_devices_of_a_family_are_joined_by_plus() -> None:
    target = target_registry.get("npu:hexagon/snapdragon-8-gen2+snapdragon-8-gen3")
    assert target.spec.name == "npu:hexagon/snapdragon-8-gen2+snapdragon-8-gen3"
    assert target.spec.options["soc_model"] == "43,57"
    assert "SM8550" in target.spec.device
    assert "SM8650" in target.spec.device
    again = target_registry.get(target.spec.name)  # what a recipe replays
    assert again.spec == target.spec


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("npu:hexagon/snapdragon-8-gen2+snapdragon-8-gen33", "EB140"),
        ("npu:hexagon/sa8255+sa8255", "EB146"),
        ("cpu+cpu", "EB140"),
        ("npu:hexagon/sa8255+cpu", "EB140"),
    ],
)
def test_devices_that_cannot_be_joined_are_named(name: str, code: str) -> None:
    with pytest.raises(UsageError, match=code):
        target_registry.get(name)


@pytest.mark.parametrize("name", ["npu:coreml", "cpu:openvino"])
def test_a_planned_target_is_said_to_be_missing(name: str) -> None:
    with pytest.raises(UnsupportedError, match="EB240") as caught:
        target_registry.get(name)
    assert "npu:hexagon" in caught.value.hint


def _entry_points(monkeypatch: pytest.MonkeyPatch, *entries: tuple[str, str]) -> None:
    found = [EntryPoint(n, v, "edgebudget.targets") for n, v in entries]

    def give(group: str) -> list[EntryPoint]:
        assert group == "edgebudget.targets"
        return found

    monkeypatch.setattr(target_registry, "entry_points", give)


class _Theirs:
    def __init__(self) -> None:
        self.spec = target_registry.get("cpu").spec


def test_third_parties_come_by_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = type(sys)("their_target")
    module.make = _Theirs
    monkeypatch.setitem(sys.modules, "their_target", module)
    _entry_points(monkeypatch, ("npu:theirs", "their_target:make"))
    assert "npu:theirs" in target_registry.names()
    assert isinstance(target_registry.get("npu:theirs"), _Theirs)


def test_a_broken_third_party_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    _entry_points(monkeypatch, ("npu:broken", "no_such_module_here:make"))
    with pytest.raises(TargetError, match=r"EB602.*npu:broken.*no_such_module_here"):
        target_registry.get("npu:broken")


def test_two_targets_of_one_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _entry_points(monkeypatch, ("cpu", "their_target:make"))
    with pytest.raises(UsageError, match="EB141"):
        target_registry.names()
