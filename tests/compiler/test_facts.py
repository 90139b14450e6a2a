"""Facts hold or say why not, at both stages, and cost no heavy import until asked."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from edgebudget import graph
from edgebudget.facts import FACTS
from edgebudget.program import Program, TensorSpec


def _graph() -> Program:
    """y = relu(batchnorm(conv(x)))."""
    four = np.ones(4, np.float32)
    weights = {"w": np.ones((4, 3, 1, 1), np.float32), "s": four, "b": four, "m": four, "v": four}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv"),
        helper.make_node("BatchNormalization", ["c", "s", "b", "m", "v"], ["n"], name="norm"),
        helper.make_node("Relu", ["n"], ["y"], name="relu"),
    ]
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 2, 2])
    made = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4, 2, 2])
    stored = [numpy_helper.from_array(v, k) for k, v in weights.items()]
    body = helper.make_graph(nodes, "g", [given], [made], stored)
    opset = [helper.make_opsetid("", 17)]
    return graph.program(helper.make_model(body, opset_imports=opset, ir_version=8))


def _why(fact: str, program: Program) -> str:
    why = FACTS[fact](program)
    assert why is not None
    return why


def test_a_sound_float_graph() -> None:
    program = _graph()
    assert [FACTS[f](program) for f in ("valid_graph", "static_shapes", "finite_weights")] == [
        None
    ] * 3
    assert "'norm' still follows 'conv'" in _why("batchnorm_folded", program)
    assert "no layer" in _why("quantized", program)


def test_what_is_wrong_with_a_graph_is_named() -> None:
    program = _graph()
    model: onnx.ModelProto = program.body
    assert "its outputs" in _why("valid_graph", replace(program, outputs=("z",)))
    assert "its inputs" in _why("valid_graph", replace(program, inputs=(TensorSpec("z", (1,)),)))
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [4, 3, 1, 1]))
    assert "1 weights are listed as inputs" in _why("valid_graph", program)
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "h"
    model.graph.output[0].type.tensor_type.shape.dim[2].dim_param = "h"
    assert "'c' (Conv 'conv')" in _why("static_shapes", program)
    graph.set_initializer(model, "b", np.array([1, np.nan, 1, 1], np.float32))
    assert "'b'" in _why("finite_weights", program)
    model.graph.node[0].op_type = "Cnov"
    assert "not valid ONNX" in _why("valid_graph", program)


def test_modules() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    program = Program("module", net, (TensorSpec("x", (1, 3, 2, 2)),), ("y",))
    assert FACTS["static_shapes"](program) is FACTS["finite_weights"](program) is None
    assert "'1' can still be folded into '0'" in _why("batchnorm_folded", program)
    assert "module" in _why("valid_graph", program)
    with torch.no_grad():
        net.get_parameter("0.weight")[0] = torch.inf
    assert "0.weight" in _why("finite_weights", program)


@pytest.mark.parametrize("module", ["edgebudget.facts", "edgebudget_passes.scale_resolution"])
def test_nothing_heavy_is_loaded(module: str) -> None:
    code = f"import sys, {module}; print({{'torch', 'onnx'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
