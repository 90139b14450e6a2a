"""A plan is a value: it survives TOML, and a wrong edit is named with its place."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgebudget import registry
from edgebudget.plan import Plan, Step, load_plan
from edgebudget.program import Context, Pass, PassResult, Program, Stage
from edgebudget_runtime.errors import UsageError


@dataclass(frozen=True, slots=True)
class Config:
    ratio: float = 0.5
    steps: int = 1
    mode: Literal["a", "b"] = "a"
    keep: tuple[str, ...] = ()
    cap: int | None = None


def nothing(program: Program, config: Config, ctx: Context) -> PassResult:
    return PassResult(program)


@pytest.fixture(autouse=True)
def toy_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    stages: dict[str, Stage] = {"shrink": "module", "tidy": "graph"}
    toys = {n: Pass(n, nothing, Config, stage, "a toy") for n, stage in stages.items()}

    def get(name: str) -> Any:
        if name not in toys:
            raise UsageError("EB102", f"no pass is called {name!r}")
        return toys[name]

    monkeypatch.setattr(registry, "get", get)


@given(
    st.floats(allow_nan=False, allow_infinity=False),
    st.integers(-(2**53), 2**53),
    st.sampled_from(["a", "b"]),
    st.lists(st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]))),
    st.none() | st.integers(0, 9),
)
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory,
    ratio: float,
    steps: int,
    mode: Literal["a", "b"],
    keep: list[str],
    cap: int | None,
) -> None:
    config = Config(ratio, steps, mode, tuple(keep), cap)
    plan = Plan((Step("shrink", config, "to fit"), Step("tidy", Config())), ("because",))
    file = tmp_path_factory.mktemp("plan") / "plan.toml"
    file.write_text(plan.to_toml(), encoding="utf-8")
    assert load_plan(file) == plan


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        ("step = 3", "EB106", "not a plan"),
        ("format = 1\n[[step]]\nwhy = 'x'", "EB106", "step[0] names no pass"),
        ("format = 1\n[[step]]\npass = 'shrnk'", "EB102", "shrnk"),
        ("format = 1\n[[step]]\npass='tidy'\nconfig.rato=1.0", "EB104", "step[0].rato"),
        ("format = 1\n[[step]]\npass='tidy'\nconfig.steps='9'", "EB104", "type int is wanted"),
        ("format = 1\n[[step]]\npass='tidy'\nconfig.steps=true", "EB104", "int is wanted"),
        ("format = 1\n[[step]]\npass='tidy'\nconfig.mode='c'", "EB104", "one of"),
        ("format = 1\n[[step]]\npass='tidy'\nconfig.keep=[1]", "EB104", "step[0].keep[0]"),
        ("format = 1\n[[step]]\npass='tidy'\n[[step]]\npass='shrink'", "EB106", "module-stage"),
        ("format = [", "EB105", "plan"),
    ],
)
def test_wrong_edits(tmp_path: Path, text: str, code: str, says: str) -> None:
    file = tmp_path / "plan.toml"
    file.write_text(text)
    with pytest.raises(UsageError) as e:
        load_plan(file)
    assert e.value.code == code
    assert says in str(e.value)


def test_missing_plan(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="EB105"):
        load_plan(tmp_path / "no.toml")
