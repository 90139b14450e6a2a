"""Limits are read with their units, and an unknown cost never satisfies one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgebudget_runtime.budget import Budget, parse_count
from edgebudget_runtime.cost import RESOURCES, Cost, Figure
from edgebudget_runtime.errors import UsageError

UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


@given(st.decimals("0.001", "999", places=3), st.sampled_from(sorted(UNITS)))
def test_counts_are_decimal(number: object, unit: str) -> None:
    assert parse_count(f"{number}{unit}") == pytest.approx(float(str(number)) * UNITS[unit])


def test_every_option_with_its_unit() -> None:
    b = Budget.parse(
        macs="50G",
        params="2M",
        size="4MB",
        memory="64MiB",
        latency="10ms@p99",
        energy="5mJ",
        max_drop="1%",
        min_quality="0.8",
        max_fallback=0,
        time_limit="20m",
    )
    found = {x.resource: (x.bound, x.statistic) for x in b.limits}
    assert found == {
        "macs": (50e9, "max"),
        "params": (2e6, "max"),
        "size_bytes": (4e6, "max"),
        "memory_bytes": (64 * 2**20, "max"),
        "latency_ms": (10.0, "p99"),
        "energy_mj": (5.0, "mean"),
        "fallback_nodes": (0.0, "max"),
    }
    assert (b.max_drop, b.min_quality, b.time_limit_s) == (0.01, 0.8, 1200.0)


@pytest.mark.parametrize(
    ("option", "text", "code", "says"),
    [
        ("macs", "50g", "EB110", "did you mean 50G"),
        ("macs", "fifty", "EB110", "write 50G"),
        ("macs", "-1G", "EB110", "not a number"),
        ("macs", "0", "EB111", "not positive"),
        ("macs", "50Gb", "EB110", "units are"),
        ("size", "4", "EB110", "has no unit"),
        ("size", "4Mb", "EB110", "did you mean 4MB"),
        ("latency", "10ms@p42", "EB112", "p99"),
        ("energy", "5mj", "EB110", "did you mean 5mJ"),
        ("max_drop", "100%", "EB111", "below 1"),
        ("time_limit", "20min", "EB110", "units are"),
        ("macs", "1e999", "EB111", "not positive"),
    ],
)
def test_misspelt_limits_are_refused(option: str, text: str, code: str, says: str) -> None:
    with pytest.raises(UsageError) as e:
        Budget.parse(**{option: text})  # type: ignore[arg-type]
    assert e.value.code == code
    assert says in str(e.value)
    assert e.value.exit_code == 2


@given(st.sampled_from(RESOURCES), st.floats(0, 1e12))
def test_unknown_breaks_and_known_compares(resource: str, value: float) -> None:
    from edgebudget_runtime.budget import Limit

    budget = Budget(limits=(Limit(resource, 1e6),))  # type: ignore[arg-type]
    assert budget.violations(Cost())[0].actual is None
    known = Cost(**{resource: Figure(value=value, evidence="measured")})
    assert bool(budget.violations(known)) == (value > 1e6)


def test_a_figure_cannot_claim_a_value_it_does_not_have() -> None:
    with pytest.raises(ValueError, match="unknown"):
        Figure(value=None, evidence="measured")
    with pytest.raises(ValueError, match="unknown"):
        Figure(value=0.0, evidence="unknown")
