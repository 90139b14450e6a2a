"""What an Android phone says of its battery, as text that adb brings.

Current and voltage come from /sys where the shell may read them (microamperes and microvolts;
some makers write milliamperes, which nothing tells apart), the state from `dumpsys battery`.
"""

from __future__ import annotations

from dataclasses import dataclass

_DISCHARGING = 3  # of BatteryManager's states
SUPPLY = "/sys/class/power_supply/battery"
# One line each, and an empty one for a file that cannot be read.
GAUGE = "; ".join(
    f"echo $(cat {SUPPLY}/{name} 2>/dev/null)" for name in ("status", "current_now", "voltage_now")
)


@dataclass(frozen=True, slots=True)
class Battery:
    """The battery service's state; None where it does not say."""

    discharging: bool
    temperature_c: float | None
    why: str = ""  # it cannot tell what the phone draws


def battery(dumpsys: str) -> Battery:
    """Read the output of `dumpsys battery`."""
    found: dict[str, str] = {}
    for line in dumpsys.splitlines():
        key, colon, value = line.strip().partition(":")
        if colon:
            found.setdefault(key.strip(), value.strip())
    tenths = _whole(found.get("temperature"))
    temperature = None if tenths is None else tenths / 10
    powered = [k.split()[0] for k, v in found.items() if k.endswith(" powered") and v == "true"]
    if powered:
        why = f"the phone is fed over {powered[0]}: connect it over Wi-Fi (`adb tcpip`)"
        return Battery(False, temperature, why)
    if _whole(found.get("status")) != _DISCHARGING:
        return Battery(False, temperature, "the battery does not say that it is discharging")
    return Battery(True, temperature)


def watts(gauge: str) -> float | None:
    """Power now, from the output of `GAUGE`; None where it is missing or the phone is fed."""
    lines = [line.strip() for line in gauge.splitlines()]
    if len(lines) < 3 or lines[0] != "Discharging":
        return None
    current, voltage = _whole(lines[1]), _whole(lines[2])
    if current is None or voltage is None:
        return None
    return abs(current) * 1e-6 * voltage * 1e-6


def _whole(text: str | None) -> int | None:
    try:
        return None if text is None else int(text)
    except ValueError:
        return None
