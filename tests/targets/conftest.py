"""Small networks to place and run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize
from onnxruntime.quantization.execution_providers.qnn import get_qnn_qdq_config

Array = np.ndarray[Any, Any]
MakeQdq = Callable[..., Path]


def conv_net(extra: str = "") -> onnx.ModelProto:
    """Two convolutions, maybe one more operator, pooling and a linear layer; input 1x3x32x32."""
    rng = np.random.default_rng(0)
    shapes = {"w0": (16, 3, 3, 3), "w1": (32, 16, 3, 3), "w2": (10, 32)}
    weights = [
        numpy_helper.from_array(
            (rng.standard_normal(s) / np.sqrt(np.prod(s[1:]))).astype(np.float32), k
        )
        for k, s in shapes.items()
    ]
    weights.append(numpy_helper.from_array(rng.standard_normal(10).astype(np.float32), "b2"))
    tail = [helper.make_node(extra, ["r1"], ["e"], "extra")] if extra else []
    nodes = [
        helper.make_node("Conv", ["x", "w0"], ["c0"], "conv0", pads=[1] * 4),
        helper.make_node("Relu", ["c0"], ["r0"], "relu0"),
        helper.make_node("Conv", ["r0", "w1"], ["c1"], "conv1", pads=[1] * 4, strides=[2, 2]),
        helper.make_node("Relu", ["c1"], ["r1"], "relu1"),
        *tail,
        helper.make_node("GlobalAveragePool", ["e" if extra else "r1"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "w2", "b2"], ["y"], "linear", transB=1),
    ]
    return _model(nodes, weights, [1, 10])


def _model(
    nodes: list[onnx.NodeProto], weights: list[onnx.TensorProto], out: list[int]
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 32, 32])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, out)],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    return model


def prelu_net() -> onnx.ModelProto:
    """One operator that the NPU's compiler refuses with 16-bit activations."""
    slope = numpy_helper.from_array(np.full((3, 1, 1), 0.1, np.float32), "slope")
    return _model(
        [helper.make_node("PRelu", ["x", "slope"], ["y"], "prelu")], [slope], [1, 3, 32, 32]
    )


class _Noise(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self) -> None:
        self._left = [pictures(1, seed) for seed in range(4)]

    def get_next(self) -> dict[str, Array] | None:
        return {"x": self._left.pop()} if self._left else None


def pictures(count: int, seed: int = 9) -> Array:
    """Inputs [count, 3, 32, 32] in 0 to 1."""
    return np.random.default_rng(seed).random((count, 3, 32, 32), dtype=np.float32)


@pytest.fixture(scope="session")
def make_qdq(tmp_path_factory: pytest.TempPathFactory) -> MakeQdq:
    """Quantize a float model the vendor's way: (model, activation type) -> file."""

    def make(model: onnx.ModelProto, activation: str = "QUInt8") -> Path:
        folder = tmp_path_factory.mktemp("qdq")
        onnx.save(model, folder / "float.onnx")
        config = get_qnn_qdq_config(
            folder / "float.onnx",
            _Noise(),
            activation_type=QuantType[activation],
            weight_type=QuantType.QInt8,
            per_channel=True,
        )
        quantize(folder / "float.onnx", folder / "main.onnx", config)
        return folder / "main.onnx"

    return make


@pytest.fixture(scope="session")
def qdq_file(make_qdq: MakeQdq) -> Path:
    """The plain network as integers."""
    return make_qdq(conv_net())


@pytest.fixture(scope="session")
def erf_file(make_qdq: MakeQdq) -> Path:
    """The network with an operator that the NPU does not have."""
    return make_qdq(conv_net("Erf"))


@pytest.fixture(scope="session")
def prelu16_file(make_qdq: MakeQdq) -> Path:
    """An operator that the NPU's compiler fails on."""
    return make_qdq(prelu_net(), "QUInt16")


@pytest.fixture
def batch() -> Array:
    """Three inputs."""
    return pictures(3)
