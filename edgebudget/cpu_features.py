"""What this machine's processor is called, and which integer instructions it has."""

from __future__ import annotations

import platform
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

# Names in /proc/cpuinfo (and the macOS sysctl, below) against the words used here.
_LINUX = {
    "avx2": "avx2",
    "avx_vnni": "vnni",
    "avx512_vnni": "vnni",
    "amx_int8": "amx",
    "asimddp": "dotprod",
    "i8mm": "i8mm",
}
_MACOS = {"hw.optional.arm.FEAT_DotProd": "dotprod", "hw.optional.arm.FEAT_I8MM": "i8mm"}
Signedness = Literal["uint8", "int8"]


@dataclass(frozen=True, slots=True)
class CpuFeatures:
    """A processor, as far as the operating system tells."""

    model: str
    machine: str  # "x86_64", "aarch64"
    flags: frozenset[str]  # of "avx2", "vnni", "amx", "dotprod", "i8mm"

    @property
    def is_arm(self) -> bool:
        """Whether this is a 64-bit Arm processor."""
        return self.machine in {"aarch64", "arm64"}

    @property
    def activations(self) -> tuple[Signedness, ...]:
        """Activation types that run fast beside int8 weights, best first.

        The x86 instructions multiply unsigned by signed bytes: signed activations were slower
        than float there. Arm's dot product takes signed bytes as they are.
        """
        return ("int8", "uint8") if self.is_arm and "dotprod" in self.flags else ("uint8",)

    @property
    def saturates(self) -> bool:
        """Whether 8-bit products are summed in 16 bits, which may clip (x86 without VNNI)."""
        return not self.is_arm and "vnni" not in self.flags


@cache
def cpu_features() -> CpuFeatures:
    """This machine's processor; unknown features are absent."""
    machine = platform.machine().lower().replace("amd64", "x86_64")
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        model, words = _parse_cpuinfo(cpuinfo.read_text(encoding="utf-8", errors="replace"))
        flags = frozenset(_LINUX[w] for w in words if w in _LINUX)
    elif platform.system() == "Darwin":
        model = _sysctl("machdep.cpu.brand_string")
        flags = frozenset(word for key, word in _MACOS.items() if _sysctl(key) == "1")
    else:
        model, flags = platform.processor(), frozenset()
    return CpuFeatures(model or f"unnamed {machine} processor", machine, flags)


def _parse_cpuinfo(text: str) -> tuple[str, frozenset[str]]:
    first: dict[str, str] = {}
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            first.setdefault(key.strip(), value.strip())
    words = first.get("flags") or first.get("Features") or ""
    model = first.get("model name") or first.get("Hardware") or ""
    return model, frozenset(words.split())


def _sysctl(key: str) -> str:
    try:
        done = subprocess.run(
            ["/usr/sbin/sysctl", "-n", key], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()
