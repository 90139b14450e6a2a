"""Energy counters: real layouts of files, wraps, steps back, gaps, and idle power taken off."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgebudget_runtime.cost import Figure
from edgebudget_runtime.measure import battery, meter, rapl
from edgebudget_runtime.measure.counters import MOST_W, Reading, difference

RANGE_UJ = 262143328850  # of a server's package, as its file says


def write(folder: Path, **files: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name).write_text(f"{value}\n")
    return folder


def powercap(root: Path, *, package: int, dram: int) -> Path:
    """The tree of a server: a package with cores and memory inside, and the platform beside."""
    base = root / "sys/class/powercap"
    known = {"max_energy_range_uj": RANGE_UJ}
    write(base / "intel-rapl", enabled=1)
    write(base / "intel-rapl:0", name="package-0", energy_uj=package, **known)
    write(base / "intel-rapl:0:0", name="core", energy_uj=5, **known)
    write(base / "intel-rapl:0:1", name="dram", energy_uj=dram, **known)
    write(base / "intel-rapl:1", name="psys", energy_uj=9, **known)
    write(base / "intel-rapl-mmio:0", name="package-0", energy_uj=package, **known)
    return root


def test_rapl_counts_packages_and_their_memory_once(tmp_path: Path) -> None:
    counter, why = rapl.find(powercap(tmp_path, package=1_000_000, dram=2_000_000))
    assert counter is not None, why
    assert counter.name == "RAPL package-0+dram"
    before = counter.read()
    powercap(tmp_path, package=4_000_000, dram=2_500_000)
    after = counter.read()
    assert before is not None
    assert after is not None
    assert counter.joules(Reading(0.0, before.values), Reading(1.0, after.values)) == 3.5


def test_rapl_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    assert rapl.find(tmp_path) == (None, "no RAPL in /sys/class/powercap")
    powercap(tmp_path, package=1, dram=1)
    (tmp_path / "sys/class/powercap/intel-rapl:0/energy_uj").unlink()
    counter, why = rapl.find(tmp_path)
    assert counter is None
    assert "intel-rapl:0/energy_uj is not readable" in why


def test_a_counter_that_goes_away_gives_no_reading(tmp_path: Path) -> None:
    counter, _ = rapl.find(powercap(tmp_path, package=1, dram=1))
    assert counter is not None
    (tmp_path / "sys/class/powercap/intel-rapl:0:1/energy_uj").write_text("")
    assert counter.read() is None


@given(st.integers(0, RANGE_UJ), st.integers(0, 100_000_000))
def test_a_wrap_is_bridged(start: int, moved: int) -> None:
    end = (start + moved) % (RANGE_UJ + 1)
    found = difference(Reading(0, (start,)), Reading(1, (end,)), 1e-6, (RANGE_UJ,))
    assert found == pytest.approx(moved * 1e-6)


def test_a_step_back_or_a_leap_discards_the_interval() -> None:
    middle, back = Reading(0, (RANGE_UJ / 2,)), Reading(1, (RANGE_UJ / 2 - 1000,))
    assert difference(middle, back, 1e-6, (RANGE_UJ,)) is None  # a wrap would mean 262 kW
    assert difference(Reading(0, (5,)), Reading(1, (4,)), 1e-3, (None,)) is None
    assert difference(Reading(0, (0,)), Reading(1, (1.01 * MOST_W,)), 1.0, (None,)) is None
    assert difference(Reading(1, (0,)), Reading(1, (1,)), 1.0, (None,)) is None
    assert difference(Reading(0, (RANGE_UJ + 9,)), Reading(1, (0,)), 1e-6, (RANGE_UJ,)) is None
    assert difference(Reading(0, (1, 2)), Reading(1, (2, 1)), 1.0, (None, None)) is None


def laptop(root: Path, **files: object) -> Path:
    write(root / "sys/class/power_supply/AC", type="Mains", online=0)
    write(root / "sys/class/power_supply/hidpp_battery_0", type="Battery", scope="Device",
          status="Discharging", voltage_now=3_900_000, current_now=1)  # fmt: skip
    supply = root / "sys/class/power_supply/BAT0"
    return write(supply, type="Battery", **files)


def test_a_discharging_battery_is_a_gauge(tmp_path: Path) -> None:
    laptop(tmp_path, status="Discharging", voltage_now=12_000_000, current_now=-500_000)
    now = iter([0.0, 1.0, 2.0])
    gauge, why = battery.find(tmp_path)
    assert gauge is not None, why
    gauge = battery.Gauge(gauge.name, gauge._watts, lambda: next(now))
    assert gauge.read() is None
    gauge.sample()
    before = gauge.read()
    laptop(tmp_path, power_now=10_000_000)
    gauge.sample()
    after = gauge.read()
    assert before is not None
    assert after is not None
    assert gauge.joules(before, after) == pytest.approx((6.0 + 10.0) / 2)
    laptop(tmp_path, status="Charging")  # plugged in meanwhile
    gauge.sample()
    assert gauge.read() is None


def test_a_gap_discards_what_it_touches() -> None:
    watts: Iterator[float | None] = iter([5.0, None, 5.0, 5.0, MOST_W * 2, 5.0, 5.0])
    now = iter(range(100))
    gauge = battery.Gauge("g", lambda: next(watts), lambda: float(next(now)))
    seen = []
    for _ in range(7):
        gauge.sample()
        seen.append(gauge.read())
    first, gone, again, more, _, late, last = seen
    assert first is not None
    assert gone is None
    assert again is not None
    assert more is not None
    assert late is not None
    assert last is not None
    assert gauge.joules(first, again) is None
    assert gauge.joules(again, more) == 5.0
    assert gauge.joules(more, late) is None
    assert gauge.joules(late, last) == 5.0


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ({"status": "Full", "power_now": 1}, "BAT0 is Full: unplug"),
        ({"status": "Discharging"}, "neither its power nor its current"),
        ({"status": "Discharging", "energy_now": 42_000_000}, "steps of charge are far too coarse"),
        ({"power_now": 1}, "in an unknown state"),
    ],
)
def test_a_battery_that_tells_nothing_says_why(
    files: dict[str, object], why: str, tmp_path: Path
) -> None:
    laptop(tmp_path, **files)
    gauge, reason = battery.find(tmp_path)
    assert gauge is None
    assert why in reason


def test_no_battery_is_said(tmp_path: Path) -> None:
    assert battery.find(tmp_path) == (None, "no battery in /sys/class/power_supply")


class Bench:
    """A made-up device: a clock that sleeps and runs move, and a counter of its joules."""

    name = "bench"

    def __init__(self, idle_w: float = 10.0, run_s: float = 0.01, run_j: float = 0.5) -> None:
        self.now, self.used, self.run_s, self.run_j, self.idle_w = 0.0, 0.0, run_s, run_j, idle_w
        self.reads = 0
        self.faults: set[int] = set()  # readings before which the counter is reset

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.used += seconds * self.idle_w

    def run(self) -> int:
        self.sleep(self.run_s)
        self.used += self.run_j
        return 1

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def read(self) -> Reading | None:
        self.reads += 1
        if self.reads in self.faults:
            self.used = 0.0
        return Reading(self.now, (self.used,))

    def joules(self, before: Reading, after: Reading) -> float | None:
        return difference(before, after, 1.0, (None,))


def test_idle_power_is_taken_off_and_both_figures_are_kept() -> None:
    bench = Bench()
    idle = meter.idle_power(bench, 1.0, bench.clock, bench.sleep)
    assert idle.value == pytest.approx(10.0)
    found = meter.inference(bench, bench.run, idle, 1.0, bench.clock)
    assert found.net_mj.value == pytest.approx(500.0)
    assert found.gross_mj.value == pytest.approx(600.0)
    assert found.net_mj.evidence == found.gross_mj.evidence == "measured"
    assert "less 10 W of idle power" in found.net_mj.how


def test_what_a_device_draws_at_work_is_read_once_it_draws_it() -> None:
    """A GPU that has rested: its clocks, and its counter, follow the work a second later."""

    class Slow(Bench):
        at_work_s = 0.0

        def run(self) -> int:
            self.sleep(self.run_s)
            self.at_work_s += self.run_s
            self.used += self.run_j if self.at_work_s > 1.0 else 0.0
            return 1

    cold, warmed = Slow(), Slow()
    idle = meter.idle_power(warmed, 5.0, warmed.clock, warmed.sleep)
    meter.warm(warmed.run, 5.0, warmed.clock)
    found = meter.inference(warmed, warmed.run, idle, 1.0, warmed.clock)
    assert found.net_mj.value == pytest.approx(500.0)
    missed = meter.inference(cold, cold.run, idle, 1.0, cold.clock)
    assert missed.net_mj.value is None
    assert "does not stand out of idle power" in missed.net_mj.how


def test_intervals_with_a_reset_are_left_out() -> None:
    bench = Bench()
    idle = meter.idle_power(bench, 1.0, bench.clock, bench.sleep)
    bench.faults = {bench.reads + 4, bench.reads + 12}  # four readings an interval
    found = meter.inference(bench, bench.run, idle, 1.0, bench.clock)
    assert found.net_mj.value == pytest.approx(500.0)
    assert found.net_mj.count == 3
    bench.faults = set(range(10_000))
    nothing = meter.inference(bench, bench.run, idle, 1.0, bench.clock)
    assert nothing.net_mj.value is nothing.gross_mj.value is None
    assert "no usable interval" in nothing.net_mj.how


@pytest.mark.parametrize("begins", [0.0, 0.03, 0.07])
def test_a_counter_that_moves_ten_times_a_second_is_read_where_it_moves(begins: float) -> None:
    class Slow(Bench):
        shown, moved = 0.0, 0.0

        def read(self) -> Reading | None:
            if self.now - self.moved >= 0.1:
                self.shown, self.moved = self.used, self.now - self.now % 0.1
            return Reading(self.now, (self.shown,))

    bench = Slow(run_s=0.001, run_j=0.05)
    bench.sleep(begins)
    idle = Figure(value=10.0, evidence="measured")
    found = meter.inference(bench, bench.run, idle, 1.0, bench.clock)
    assert found.gross_mj.value == pytest.approx(60.0, rel=0.01)
    assert found.net_mj.value == pytest.approx(50.0, rel=0.01)


def test_without_idle_power_only_the_whole_is_told() -> None:
    bench = Bench()
    unknown = Figure(value=None, evidence="unknown")
    found = meter.inference(bench, bench.run, unknown, 1.0, bench.clock)
    assert found.net_mj.value is None
    assert found.gross_mj.value == pytest.approx(600.0)


def test_what_does_not_stand_out_of_idle_power_is_unknown() -> None:
    bench = Bench(run_j=0.0)
    louder = Figure(value=11.0, evidence="measured")
    found = meter.inference(bench, bench.run, louder, 1.0, bench.clock)
    assert found.net_mj.value is None
    assert "does not stand out" in found.net_mj.how
    assert found.gross_mj.value == pytest.approx(100.0)
