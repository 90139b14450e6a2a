"""Every exit's answers in one pass, and what each exit costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from edgebudget import graph as graphs
from edgebudget import shared_weights, target_registry
from edgebudget.chain import Chain
from edgebudget.count_onnx import count_graph
from edgebudget.evaluate import predict
from edgebudget.exits import exit_outputs
from edgebudget.export import to_graph
from edgebudget.program import Program, TensorSpec
from edgebudget.session import CpuSession
from edgebudget.split_exits import split
from edgebudget.target import NodePlacement, Placement, TargetSpec
from edgebudget_models import catalogue
from edgebudget_passes import quantize_int8
from edgebudget_runtime.errors import ArtifactError
from tests.passes.quant_nets import CPU, NPU, Net, Noise, context

IMAGE = (1, 3, 8, 8)
NAMES = ("y.exit1", "y.exit2", "y")


def net_with_exits() -> onnx.ModelProto:
    """Exits of 4, 4 and 8 channels; the last block reads the first one again."""
    net = Net(IMAGE)
    weight = net.weight(3, 4)

    def head(x: str, weight: str, out: str) -> None:
        net.add("Gemm", net.add("Flatten", net.add("GlobalAveragePool", x)), weight, transB=1,
                out=out)  # fmt: skip

    first = net.add("Sigmoid", net.conv("x", 3, 4))
    head(first, weight, "y.exit1")
    wide = net.add("Sigmoid", net.conv(first, 4, 12))
    second = net.add("Sigmoid", net.conv(wide, 12, 4))
    head(second, weight, "y.exit2")  # the same weight
    both = net.add("Concat", net.add("Sigmoid", net.conv(second, 4, 4)), first, axis=1)
    head(both, net.weight(3, 8), "y")
    return net.model(*NAMES)


def wide_net() -> onnx.ModelProto:
    net = Net(IMAGE)
    x = net.conv("x", 3, 16)
    for out in ("y.exit1", "y"):
        x = net.conv(x, 16, 16)
        pooled = net.add("Flatten", net.add("GlobalAveragePool", x))
        net.add("Gemm", pooled, net.weight(3, 16), transB=1, out=out)
    return net.model("y.exit1", "y")


def written(model: onnx.ModelProto, folder: Path, output: str = "y") -> list[Path]:
    outputs = exit_outputs([o.name for o in model.graph.output])
    cuts = split(model, outputs, output)
    files = [folder / "segments" / f"s{k}.onnx" for k in range(len(cuts))]
    for cut, file in zip(cuts, files, strict=True):
        shared_weights.write(cut.model, file)
    return files


def chain_of(files: list[Path], output: str = "y", target: str = "cpu") -> Chain:
    return Chain(files, target_registry.get(target), output)


def test_every_exit_answers_a_whole_data_set_in_one_pass(tmp_path: Path) -> None:
    model = net_with_exits()
    labels = np.arange(10) % 3
    data = Noise(IMAGE[1:], count=10, labels=labels)
    chain = chain_of(written(model, tmp_path))
    whole = predict(lambda x: graphs.run(model, x), data)
    for batch in (1, 4):
        found = chain.predict(data, batch=batch)
        assert chain.exits == NAMES
        for name, each in zip(NAMES, found, strict=True):
            assert list(each.outputs) == ["y"]
            np.testing.assert_allclose(each.outputs["y"], whole.outputs[name], rtol=1e-5)
            assert each.labels is not None
            np.testing.assert_array_equal(each.labels, labels)


def test_an_exit_costs_what_the_whole_graph_up_to_it_costs(tmp_path: Path) -> None:
    model = net_with_exits()
    chain = chain_of(written(model, tmp_path))
    whole, prefixes, parts = count_graph(model), chain.prefix_costs(), chain.segment_costs()
    assert prefixes[0] == parts[0]
    assert prefixes[-1].cost.macs.value == whole.macs == sum(p.cost.macs.value or 0 for p in parts)
    assert prefixes[-1].cost.params.value == whole.params, "the heads' weight counts once"
    assert sum(p.cost.params.value or 0 for p in parts) == whole.params + 12
    assert prefixes[-1].other_ops == whole.other_ops == sum(p.other_ops for p in parts)
    on_disk = sum(f.stat().st_size for f in tmp_path.rglob("*") if f.is_file())
    assert prefixes[-1].cost.size_bytes.value == on_disk


def test_memory_holds_what_waits_for_a_later_segment(tmp_path: Path) -> None:
    chain = chain_of(written(net_with_exits(), tmp_path))
    weights = [496, 496 + 3520, 496 + 3520 + 688]
    plane, answer = 4 * 8 * 8 * 4, 12
    # Segment 0: a convolution's result and its sigmoid. Segment 1: the same at three times the
    # channels, and the last answer; where segment 2 follows, also what that reads of segment 0.
    peaks = [2 * plane, 6 * plane + answer, 7 * plane + answer]
    found = [c.cost.memory_bytes for c in chain.prefix_costs()]
    assert [f.value for f in found] == [w + p for w, p in zip(weights, peaks, strict=True)]
    assert {f.evidence for f in found} == {"modelled"}
    assert chain.segment_costs()[1].cost.memory_bytes.value == 3520 + 48 + 6 * plane


class OneOutside:
    """The CPU target, saying that one node of each segment runs elsewhere."""

    def __init__(self) -> None:
        self._cpu = target_registry.get("cpu")
        self.spec = self._cpu.spec

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cpu, name)

    def placement(self, file: Path) -> Placement:
        outside = NodePlacement("strange", "Erf", "elsewhere", "not supported")
        return Placement((*self._cpu.placement(file).nodes, outside), "cpu")


def test_nodes_outside_the_processor_add_up_along_the_chain(tmp_path: Path) -> None:
    model = net_with_exits()
    target: Any = OneOutside()
    chain = Chain(written(model, tmp_path), target, "y")
    assert [f.value for f in chain.prefix_fallback()] == [1, 2, 3]
    nodes = sum(len(p.nodes) for p in chain.placements)
    assert chain.prefix_fallback()[-1].how == f"{nodes} nodes placed by onnxruntime-cpu"
    assert nodes == len(model.graph.node) + 3


def test_a_missing_weights_file_is_found_before_anything_runs(tmp_path: Path) -> None:
    files = written(wide_net(), tmp_path)
    shared_weights.files(files[1])[0].unlink()
    with pytest.raises(ArtifactError) as error:
        chain_of(files)
    assert error.value.code == "EB531"


class ResNet20(nn.Module):
    """The zoo's network with its weights, and a seeded linear head behind each stage."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.whole: Any = catalogue.get("cifar10-resnet20").load(None)
        self.heads = nn.ModuleList([nn.Linear(16, 10), nn.Linear(32, 10)])

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        net = self.whole
        found: list[torch.Tensor] = []
        x = torch.relu(net.bn1(net.conv1(x)))
        stages = (net.layer1, net.layer2, net.layer3)
        for stage, head in zip(stages, (*self.heads, net.linear), strict=True):
            x = stage(x)
            found.append(head(x.mean((2, 3))))
        return tuple(found)


class TinyViT(nn.Module):
    """Four encoder layers of transformers' ViT, an exit behind the first and the second."""

    def __init__(self) -> None:
        super().__init__()
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(0)
        config = transformers.ViTConfig(
            hidden_size=24, num_hidden_layers=4, num_attention_heads=2, intermediate_size=48,
            image_size=32, patch_size=8, attn_implementation="eager",
        )  # fmt: skip
        self.body: Any = transformers.ViTModel(config, add_pooling_layer=False)
        self.norms = nn.ModuleList([nn.LayerNorm(24) for _ in range(3)])
        self.heads = nn.ModuleList([nn.Linear(24, 10) for _ in range(3)])

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = self.body.embeddings(x)
        found: list[torch.Tensor] = []
        for number, layer in enumerate(self.body.encoder.layer):
            made = layer(x)
            x = made[0] if isinstance(made, tuple) else made
            if number in (0, 1, 3):
                norm, head = self.norms[len(found)], self.heads[len(found)]
                found.append(head(norm(x)[:, 0]))
        return tuple(found)


@pytest.mark.slow
@pytest.mark.parametrize("network", [ResNet20, TinyViT])
@pytest.mark.parametrize("spec", [None, CPU, NPU], ids=["float", "cpu", "npu"])
def test_real_networks_answer_as_before_they_were_cut(
    tmp_path: Path, network: type[nn.Module], spec: TargetSpec | None
) -> None:
    inputs, data = (TensorSpec("x", (1, 3, 32, 32)),), Noise((3, 32, 32), count=32)
    made = to_graph(Program("module", network().eval(), inputs, NAMES))
    if spec is not None:
        # Where the processor clips sums, the search would keep layers of the CPU's in float.
        config = quantize_int8.Config(mixed="off" if spec is CPU else "auto")
        made = quantize_int8.run(made, config, context(data, spec)).program
    model: onnx.ModelProto = made.body
    files = written(model, tmp_path)
    chain = chain_of(files, target="cpu" if spec is None else spec.name)
    exact = spec is not None and spec.exact  # the chain runs as its target does
    whole = predict(CpuSession(graphs.canonical_bytes(model), exact=exact).run, data)
    for name, found in zip(NAMES, chain.predict(data), strict=True):
        if spec is None:  # float kernels may be fused otherwise
            np.testing.assert_allclose(found.outputs["y"], whole.outputs[name], atol=1e-5)
        else:
            np.testing.assert_array_equal(found.outputs["y"], whole.outputs[name])
    assert sum(c.cost.macs.value or 0 for c in chain.segment_costs()) == count_graph(model).macs
    handed = {
        value.type.tensor_type.elem_type
        for file in files[1:]
        for value in onnx.load_model(file, load_external_data=False).graph.input
    }
    kinds = onnx.TensorProto
    if spec is not None and network is ResNet20:
        assert handed == {kinds.UINT8}
    if spec is NPU:
        assert handed <= {kinds.UINT8, kinds.UINT16}
