"""Both counts agree to the last MAC on every model of the zoo."""

from __future__ import annotations

import pytest

from edgebudget.count_onnx import count_graph
from edgebudget.counter import count
from edgebudget.export import to_graph
from edgebudget.program import Program, TensorSpec
from edgebudget_models import catalogue

FAST = ("digits",)


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in catalogue.names()]
)
def test_fast_count_equals_the_count_of_the_file(name: str) -> None:
    entry = catalogue.get(name)
    spec = TensorSpec(entry.input_name, entry.input_shape)
    program = Program("module", entry.build().eval(), (spec,), entry.outputs)
    true = count_graph(to_graph(program, check=False).body)
    assert count(program).macs == true.macs > 0
