"""Certified drops: coverage over many draws, and refusals where samples are too few."""

from __future__ import annotations

import numpy as np
import pytest

from edgebudget.certificate import certify, split
from edgebudget.workload import Array
from edgebudget_runtime.errors import InfeasibleError, UsageError

QUALITY, GAIN = 0.85, 0.01
HARMS = np.linspace(0.004, 0.05, 6)  # of six settings, safest first
DROPS = (HARMS - GAIN) / QUALITY  # true relative drops


def draw(rng: np.random.Generator, count: int) -> tuple[list[Array], Array]:
    """Nested settings: the share that each spoils grows, what they repair stays."""
    reference = rng.random(count) < QUALITY
    luck = rng.random(count)
    spoilt = [reference & (luck < harm / QUALITY) for harm in HARMS]
    repaired = ~reference & (luck < GAIN / (1 - QUALITY))
    return [(reference & ~s) | repaired for s in spoilt], reference


def test_the_bound_holds_as_often_as_promised() -> None:
    rng = np.random.default_rng(5)
    broken, found = 0, []
    for _ in range(80):
        early, reference = draw(rng, 1500)
        try:
            result = certify(early, reference, max_drop=0.02, confidence=0.9, against="all")
        except InfeasibleError:
            continue
        found.append(DROPS[result.index])
        broken += DROPS[result.index] > 0.02
    assert broken <= 0.1 * 80
    assert len(found) > 50  # and it is of use: most draws certify something
    assert np.mean(found) > 0.0


def test_a_drop_at_the_bound_is_rarely_certified() -> None:
    rng = np.random.default_rng(6)
    passed = 0
    for _ in range(150):
        reference = rng.random(1000) < QUALITY
        luck = rng.random(1000)
        early = (reference & (luck >= 0.03)) | (~reference & (luck < 0.05))
        # spoils 3 % of the right ones and repairs 5 % of the wrong ones
        drop = 0.03 - 0.05 * (1 - QUALITY) / QUALITY
        try:
            certify([early], reference, max_drop=drop, confidence=0.9, against="all")
            passed += 1
        except InfeasibleError:
            pass
    assert passed <= 0.1 * 150 + 3 * np.sqrt(150 * 0.1 * 0.9)


def test_stops_at_the_first_setting_that_fails() -> None:
    reference = np.ones(2000, bool)
    good, bad = reference.copy(), reference.copy()
    bad[:200] = False
    found = certify([good, bad, good], reference, max_drop=0.02, confidence=0.95, against="all")
    assert found.index == 0
    assert len(found.p_values) == 2
    assert found.certificate.count == 2000
    assert "0 answers spoilt" in found.certificate.how


def test_says_how_many_samples_it_takes() -> None:
    reference = np.ones(100, bool)
    with pytest.raises(UsageError, match=r"EB195.*100 samples") as caught:
        certify([reference], reference, max_drop=0.01, confidence=0.95, against="all")
    assert caught.value.code == "EB195"
    needed = int(str(caught.value).split("at least ")[1].split()[0])
    assert 300 < needed < 700
    enough = np.ones(needed, bool)
    assert certify([enough], enough, max_drop=0.01, confidence=0.95, against="all").index == 0


def test_refuses_what_cannot_be_certified() -> None:
    reference = np.ones(2000, bool)
    bad = np.arange(2000) % 10 > 0
    with pytest.raises(InfeasibleError, match="EB402"):
        certify([bad], reference, max_drop=0.01, confidence=0.95, against="all")
    with pytest.raises(UsageError, match="EB195"):
        certify([bad], ~reference, max_drop=0.01, confidence=0.95, against="all")
    for drop, sure in ((0.0, 0.95), (0.01, 1.0), (1.0, 0.5)):
        with pytest.raises(UsageError, match="EB194"):
            certify([reference], reference, max_drop=drop, confidence=sure, against="all")


def test_the_two_parts_are_disjoint_and_repeatable() -> None:
    a, b = split(1001, 0.4, 3)
    assert len(b) == 400
    assert sorted([*a, *b]) == list(range(1001))
    assert all((x == y).all() for x, y in zip(split(1001, 0.4, 3), (a, b), strict=True))
    assert (split(1001, 0.4, 4)[0] != a).any()
