"""The zoo's networks in 8 bits: `.pte` and ONNX graph agree within one quantization step."""

from __future__ import annotations

from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest

from edgebudget import graph as graphs
from edgebudget import target_registry
from edgebudget.events import ignore
from edgebudget.job import prepare
from edgebudget.program import TensorSpec
from edgebudget.verify import output_steps
from edgebudget.workload import Sample
from edgebudget_passes import quantize_int8, rewrite_for_target
from edgebudget_runtime.budget import Budget
from tests.passes.quant_nets import context

pytest.importorskip("executorch", reason="ExecuTorch is not installed")

# Operators of each network that XNNPACK is known to leave to portable kernels, and how many.
_SMALL: dict[str, dict[str, int]] = {"digits": {}}
_LARGE: dict[str, dict[str, int]] = {
    "cifar10-resnet20": {"Slice": 2},
    "cifar10-resnet56": {"Slice": 2},
    "mobilenet-v2": {},
    "cifar10-vit": {"LayerNormalization": 19, "ReduceMean": 1},
    "uhd-iqa": {},
}


@dataclass(frozen=True)
class _Blobs:
    """Smooth seeded pictures: noise of a few frequencies, as far from flat as photographs."""

    spec: TensorSpec
    name: str = "blobs"

    def __len__(self) -> int:
        return 8

    def sample(self, index: int) -> Sample:
        rng = np.random.default_rng(index)
        channels, height, width = self.spec.shape[1:]
        coarse = rng.random((channels, -(-height // 4), -(-width // 4)), dtype=np.float32)
        value = coarse.repeat(4, axis=1).repeat(4, axis=2)[:, :height, :width]
        return Sample({self.spec.name: np.ascontiguousarray(value)}, None)

    def digest(self) -> str:
        return "0"


@pytest.mark.parametrize(
    "name",
    [*_SMALL, *(pytest.param(n, marks=pytest.mark.slow) for n in _LARGE)],
)
def test_pte_and_onnx_agree_within_one_step(name: str, tmp_path: Path) -> None:
    target = target_registry.get("cpu:xnnpack")
    float_model = _zoo_graph(name)
    (spec,) = graphs.specs(float_model)
    data = _Blobs(spec)
    setting = context(data, target.spec, "regression")  # type: ignore[arg-type]
    program = rewrite_for_target.run(
        graphs.program(float_model), rewrite_for_target.Config(), setting
    ).program
    config = quantize_int8.Config(samples=8, mixed="off", bias_correct=False)
    program = quantize_int8.run(program, config, setting).program
    file = target.lower(program, tmp_path, "main").file
    left = Counter(n.op for n in target.placement(file).fallback)
    assert dict(left) == (_SMALL | _LARGE)[name]
    executor, steps = target.open(file), output_steps(file)
    for index in (100, 101):
        inputs = {k: v[None] for k, v in data.sample(index).inputs.items()}
        got = executor.run(inputs)
        for output, want in graphs.run(program.body, inputs).items():
            gap = np.abs(got[output] - want).max()
            assert gap <= steps[output] * 1.001, f"{gap / steps[output]:.2f} steps"


def _zoo_graph(name: str) -> onnx.ModelProto:
    job = prepare(name, "cpu", Budget(), None, None, None, None, 0, ignore)
    with closing(job.setting.cache):
        body: onnx.ModelProto = job.graph.program.body
    return body
