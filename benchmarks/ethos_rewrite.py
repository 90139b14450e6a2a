"""Networks of `transformers` on Ethos-U85-256: as they come, rewritten by us, written by hand.

"As it comes" and "by hand" go through ExecuTorch's own PT2E recipe, ours through the compiler's
passes. All three are compiled by Vela for the same NPU and memory mode; figures are Vela's
estimates. Numerics, in steps of the integer output: the rewritten float graph against the network,
and the TOSA reference model (on the graph that Vela compiles) against the integer ONNX graph with
the NPU's rounding, which tells the quality of a whole data set; on the pictures that the weights
were trained for, or on seeded ones where they are random. How far ONNX Runtime's own rounding of
that graph is from it is told beside: it multiplies in single precision.

    python -m benchmarks.ethos_rewrite [NETWORK ...]
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks._quantizing import context
from benchmarks._split import Evenly
from benchmarks._vendor_models import PAIRS, TRAINED
from benchmarks.harness import data_folder, save
from benchmarks.xnnpack_latency import Pictures
from edgebudget import graph as graphs
from edgebudget import target_registry
from edgebudget.export import to_graph
from edgebudget.program import Program, TensorSpec
from edgebudget.segment_graph import graph_file
from edgebudget.session import CpuSession
from edgebudget.verify import output_steps
from edgebudget.workload import Dataset
from edgebudget_models import catalogue
from edgebudget_passes import clean_graph, quantize_int8, rewrite_for_target
from edgebudget_targets import _vela
from edgebudget_targets._executor import CpuExecutor
from edgebudget_targets._vela import Estimate, Setting
from edgebudget_targets.ethos_u import EthosUTarget

_TARGET = "npu:ethos-u85-256"
_SHAPE = (1, 3, 224, 224)
_SAMPLES, _JUDGED = 32, 8
_COSTS = 1.10
_STEP = 1.001
_LIMIT_S = 300.0


def main(arguments: list[str]) -> int:
    """Compile every network three ways and compare."""
    missing = [p for p in ("executorch", "transformers", "ethosu") if find_spec(p) is None]
    if missing:
        sys.stderr.write(f"skipped: {', '.join(missing)} not installed\n")
        return 0
    if TRAINED in (arguments or PAIRS) and not (data_folder() / "cifar10").is_dir():
        sys.stderr.write(f"skipped: {TRAINED} needs cifar10 (set EDGEBUDGET_DATA)\n")
        return 0
    torch.set_num_threads(1)
    rows = {name: _network(name) for name in arguments or PAIRS}
    ok = {}
    for name, row in rows.items():
        ok[f"{name}: at most {_COSTS} x the clean one's cycles"] = row["ratio"] <= _COSTS
        ok[f"{name}: rewritten within one step of the network"] = row["float_steps"] <= _STEP
        ok[f"{name}: within one step of the ONNX graph"] = row["worst_steps"] <= _STEP
        ok[f"{name}: pictures differ by more than a step"] = row["picture_steps"] > _STEP
    if not arguments:
        save("ethos_rewrite", {"target": _TARGET, "networks": rows, "ok": ok})
    for name, row in rows.items():
        sys.stderr.write(f"{name}: {row}\n")
    for text, good in ok.items():
        sys.stderr.write(f"{'ok  ' if good else 'MISS'} {text}\n")
    return 0 if all(ok.values()) else 1


def _network(name: str) -> dict[str, Any]:
    target = target_registry.get(_TARGET)
    assert isinstance(target, EthosUTarget)
    setting = Setting.of(target.spec.options)
    stock, clean = PAIRS[name]
    torch.manual_seed(0)
    network = stock()
    with tempfile.TemporaryDirectory(prefix="edgebudget-") as folder:
        ours, gaps = _ours(network, _seen(name), target, Path(folder))
    torch.manual_seed(0)
    found = {
        "as it comes": _recipe(network, setting),
        "ours": ours,
        "by hand": _recipe(clean(), setting),
    }
    return {
        "cycles": {k: v.cycles for k, v in found.items()},
        "ms": {k: v.ms for k, v in found.items()},
        "operators": {k: len(v.layers) for k, v in found.items()},
        "sram_bytes": {k: v.sram_bytes for k, v in found.items()},
        "evidence": "simulated",
        "ratio": ours.cycles / found["by hand"].cycles,
        **gaps,
        "setting": f"{setting.accelerator} {setting.system_config} {setting.memory_mode}",
    }


def _seen(name: str) -> tuple[Dataset, Dataset]:
    """Pictures to calibrate on, and others to judge by."""
    if name != TRAINED:
        judged = Pictures(_SHAPE[1:], _JUDGED, first=1000)
        return Pictures(_SHAPE[1:], _SAMPLES), judged
    entry, root = catalogue.get(name), data_folder() / "cifar10"
    return (
        Evenly(entry.data("calibration", root), _SAMPLES),
        Evenly(entry.data("evaluation", root), _JUDGED),
    )


def _ours(
    network: torch.nn.Module,
    pictures_seen: tuple[Dataset, Dataset],
    target: EthosUTarget,
    folder: Path,
) -> tuple[Estimate, dict[str, float]]:
    """Vela's estimate, and gaps in output steps.

    Among them how far two pictures' scores are apart: near 0, the others show nothing.
    """
    spec = TensorSpec("image", _SHAPE, "float32")
    start = Program(
        body=network, stage="module", inputs=(spec,), outputs=("scores",), facts=frozenset()
    )
    calibration, judged = pictures_seen
    setting = context(calibration, target.spec)
    found = to_graph(start)
    for step in (clean_graph, rewrite_for_target):
        found = step.run(found, step.Config(), setting).program
    pictures = np.stack([judged.sample(i).inputs["image"] for i in range(_JUDGED)])
    with torch.inference_mode():
        exact = network(torch.from_numpy(pictures)).numpy()
    floats = np.concatenate(
        [graphs.run(found.body, {"image": x[None]})["scores"] for x in pictures]
    )
    config = quantize_int8.Config(samples=_SAMPLES, mixed="off", label_bias="off")
    found = quantize_int8.run(found, config, setting).program
    file = target.lower(found, folder, "main").file
    left = target.placement(file).fallback
    assert not left, left
    npu = target.open(file, exact=True).run({"image": pictures})["scores"]
    cpu = target.open(file).run({"image": pictures})["scores"]
    width = output_steps(file)["scores"]
    plain = CpuExecutor(CpuSession(graph_file(file))).run({"image": pictures})["scores"]
    return target.estimate(file), {
        "worst_steps": float(np.abs(npu - cpu).max()) / width,
        "own_rounding_steps": float(np.abs(npu - plain).max()) / width,
        "float_steps": float(np.abs(floats - exact).max()) / width,
        "picture_steps": float(np.abs(cpu[0] - cpu[1]).max()) / width,
    }


def _recipe(network: torch.nn.Module, setting: Setting) -> Estimate:
    """ExecuTorch's own recipe for this NPU."""
    from executorch.backends.arm.ethosu import EthosUCompileSpec, EthosUPartitioner
    from executorch.backends.arm.quantizer import (
        EthosUQuantizer,
        get_symmetric_quantization_config,
    )
    from executorch.exir import to_edge_transform_and_lower
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    pictures = Pictures(_SHAPE[1:], 2)
    example = (torch.zeros(_SHAPE),)
    with tempfile.TemporaryDirectory(prefix="edgebudget-") as folder, torch.no_grad():
        spec = EthosUCompileSpec(
            setting.accelerator,
            system_config=setting.system_config,
            memory_mode=setting.memory_mode,
        ).dump_intermediate_artifacts_to(folder)
        quantizer = EthosUQuantizer(spec)
        quantizer.set_global(get_symmetric_quantization_config(is_per_channel=True))
        module: Any = torch.export.export(network, example).module(check_guards=False)
        prepared = prepare_pt2e(module, quantizer)
        for i in range(len(pictures)):
            prepared(torch.from_numpy(pictures.sample(i).inputs["image"][None]))
        exported = torch.export.export(convert_pt2e(prepared), example)
        with contextlib.redirect_stdout(io.StringIO()):
            to_edge_transform_and_lower(exported, partitioner=[EthosUPartitioner(spec)])
        return _vela.estimate(Path(folder) / "out.tosa", setting, _LIMIT_S)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
