"""Small float graphs and data for the quantization tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgebudget import graph as graphs
from edgebudget import target_registry
from edgebudget.events import ignore
from edgebudget.program import Context, Program
from edgebudget.target import TargetSpec
from edgebudget.workload import Array, Data, Sample
from edgebudget_runtime.budget import Budget

CPU = target_registry.get("cpu").spec
NPU = target_registry.get("npu").spec


@dataclass
class Noise:
    """Seeded samples; a sine of each index moves their mean. Labels are optional."""

    shape: tuple[int, ...] = (3, 16, 16)
    count: int = 24
    labels: Array | None = None
    broken: int = -1
    name: str = "noise"

    def __len__(self) -> int:
        return self.count

    def sample(self, index: int) -> Sample:
        rng = np.random.default_rng(index)
        value = (rng.standard_normal(self.shape) + np.sin(index)).astype(np.float32)
        if index == self.broken:
            value.reshape(-1)[0] = np.nan
        return Sample({"x": value}, None if self.labels is None else self.labels[index])

    def digest(self) -> str:
        return "0"


class Net:
    """Builds a graph node by node; values are named by their node."""

    def __init__(self, shape: Sequence[int] = (1, 3, 16, 16), seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.stored: dict[str, Array] = {}
        self.shape = list(shape)

    def weight(self, *shape: int, name: str = "") -> str:
        fan = max(1, int(np.prod(shape[1:])))
        return self.store(self.rng.standard_normal(shape) * (2.0 / fan) ** 0.5, name)

    def store(self, value: Any, name: str = "") -> str:
        name = name or f"w{len(self.stored)}"
        array = np.asarray(value)
        self.stored[name] = array.astype(np.float32) if array.dtype.kind == "f" else array
        return name

    def add(self, op: str, *inputs: str, out: str = "", **attributes: Any) -> str:
        name = out or f"{op.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], name=name, **attributes))
        return name

    def conv(self, x: str, cin: int, cout: int, *, k: int = 3, group: int = 1, **more: Any) -> str:
        w, b = self.weight(cout, cin // group, k, k), self.store(self.rng.normal(0, 0.3, cout))
        return self.add("Conv", x, w, b, pads=[k // 2] * 4, group=group, **more)

    def model(self, *outputs: str, opset: int = 20) -> onnx.ModelProto:
        floats = TensorProto.FLOAT
        graph = helper.make_graph(
            self.nodes,
            "net",
            [helper.make_tensor_value_info("x", floats, self.shape)],
            [helper.make_tensor_value_info(o, floats, None) for o in outputs],
            [numpy_helper.from_array(v, k) for k, v in self.stored.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
        model.ir_version = 10
        inferred = onnx.shape_inference.infer_shapes(model)
        onnx.checker.check_model(inferred)
        return inferred


def residual(opset: int = 20, seed: int = 0) -> onnx.ModelProto:
    """Convolutions, a residual sum, a depthwise one, pooling and a linear layer."""
    net = Net(seed=seed)
    a = net.add("Relu", net.conv("x", 3, 8))
    b = net.add("Relu", net.add("Add", net.conv(net.conv(a, 8, 8), 8, 8), a))
    c = net.add("Relu", net.conv(b, 8, 8, group=8))
    c = net.add("MaxPool", c, kernel_shape=[2, 2], strides=[2, 2])
    d = net.add("Flatten", net.add("GlobalAveragePool", net.conv(c, 8, 16, k=1)))
    bias = net.store(net.rng.normal(0, 0.1, 5))
    return net.model(net.add("Gemm", d, net.weight(5, 16), bias, transB=1, out="y"), opset=opset)


def context(
    data: Noise | None, target: TargetSpec = CPU, kind: str = "classification", seed: int = 0
) -> Context:
    task: Any = SimpleNamespace(kind=kind)
    nothing: Any = None
    return Context(
        budget=Budget(),
        target=target,
        task=task,
        data=Data(calibration=data),
        original=nothing,
        seed=seed,
        rng=np.random.default_rng(seed),
        workdir=Path(),
        emit=ignore,
    )


def sqnr(before: onnx.ModelProto, after: onnx.ModelProto, shape: Sequence[int]) -> float:
    """Worst over the outputs, in dB, on samples that calibration has not seen."""
    noise = Noise(tuple(shape[1:]))
    worst = np.inf
    wanted, got = (
        [graphs.run(m, {"x": noise.sample(1000 + i).inputs["x"][None]}) for i in range(8)]
        for m in (before, after)
    )
    for name in wanted[0]:
        a, b = (np.stack([o[name] for o in side]).astype(np.float64) for side in (wanted, got))
        worst = min(worst, 10 * np.log10(max(a.var(), 1e-12) / max(np.square(a - b).mean(), 1e-12)))
    return float(worst)


def program(model: onnx.ModelProto) -> Program:
    return graphs.program(model)
