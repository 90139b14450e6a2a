"""Which processor this is: what virtual machines call alike must not be taken for one."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgebudget_runtime import device_id

GENOA = """processor : 0
vendor_id : AuthenticAMD
cpu family : 25
model : 17
model name : AMD EPYC
stepping : 1
"""
BOARD = "processor : 0\nBogoMIPS : 108.00\nCPU part : 0xd0b\n"


def named(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(device_id, "_CPU_INFO", tmp_path / "cpuinfo")
    device_id._cpu.cache_clear()
    try:
        return device_id.here("engine", "1", 1).cpu
    finally:
        device_id._cpu.cache_clear()


def test_processors_of_one_name_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = named(GENOA, tmp_path, monkeypatch)
    other = named(GENOA.replace("family : 25", "family : 26"), tmp_path, monkeypatch)
    assert one == "AMD EPYC, family 25, model 17, stepping 1"
    assert other != one


def test_a_board_without_such_numbers_has_its_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert named(BOARD, tmp_path, monkeypatch) == "0xd0b"
