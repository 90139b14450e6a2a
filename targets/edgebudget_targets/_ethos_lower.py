"""From an integer graph to a `.pte` for an Ethos-U; works in a process of its own.

Imports torch and executorch.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import executorch.kernels.quantized  # noqa: F401  # operators that stay on the CPU need these
import onnx
import torch
from executorch.backends.arm.common.annotation_meta import ArmAnnotationInfo
from executorch.backends.arm.ethosu import EthosUCompileSpec, EthosUPartitioner
from executorch.exir import to_edge_transform_and_lower
from executorch.exir.passes.quantize_io_pass import QuantizeInputs, QuantizeOutputs

from edgebudget import graph as graphs
from edgebudget.import_onnx import ImportedGraph, import_graph
from edgebudget_targets._ethos_forms import for_ethos
from edgebudget_targets._executorch_origin import left_out, origin

_FLOAT = "it is computed in float: no rounding before or behind it"
# Operators that the back end's own quantizer rewrites first: left as they are, it takes input and
# output to have the same step, or fails.
_UNSAFE = ("mean", "avg_pool")
_INEXACT = "the compiler has no integer form of it that keeps its numbers"
# Activations that the compiler takes together with the operator before them.
_FUSED = ("relu", "hardtanh", "clamp")


def lower(source: Path, out: Path, settings: Mapping[str, str]) -> dict[str, Any]:
    """Lower a graph with static shapes; writes `out` and, beside it, `<name>.tosa`.

    Returns `left` (ONNX node name -> why the NPU does not take it) and `parts`, the number of
    pieces that the NPU gets. Only a piece that is the whole graph has a TOSA file. The program
    takes and gives integers, where the graph rounds its edges.

    Raises:
        UnsupportedError: EB243, an operator has no counterpart in torch.
        RuntimeError: the compiler fails.
    """
    model = for_ethos(onnx.load_model(str(source)), int(settings["largest_block"]))
    module = import_graph(model)
    example = tuple(
        torch.zeros(s.shape, dtype=getattr(torch, s.dtype)) for s in graphs.specs(model)
    )
    with tempfile.TemporaryDirectory(prefix="edgebudget-") as scratch, torch.no_grad():
        spec = EthosUCompileSpec(
            settings["accelerator"],
            system_config=settings["system_config"],
            memory_mode=settings["memory_mode"],
        ).dump_intermediate_artifacts_to(scratch)
        exported = torch.export.export(module, example)
        _mark_integers(exported)
        partitioner = _Partitioner(spec)
        try:
            lowered = to_edge_transform_and_lower(exported, partitioner=[partitioner])
        except (Exception, SystemExit) as e:  # Vela leaves by sys.exit
            raise RuntimeError(_first_cause(e)) from e
        program = lowered.exported_program()
        parts = sum("call_delegate" in str(n.target) for n in program.graph.nodes)
        lowered = _integer_edges(lowered)
        left = left_out(lowered.exported_program(), module)
        tosa = Path(scratch) / "out.tosa"
        alone = parts == 1 and not left
        whole = tosa.read_bytes() if alone and tosa.is_file() else b""
        _write(out, lowered.to_executorch().buffer)
    if whole:
        _write(out.with_suffix(".tosa"), whole)
    why = partitioner.reasons(module)
    return {"left": {n: why.get(n) or f"{op} is no operator of it" for n, op in left.items()},
            "parts": parts}  # fmt: skip


class _Partitioner(EthosUPartitioner):  # type: ignore[misc]
    """Keeps what the partitioner says about nodes that it does not take."""

    def __init__(self, spec: Any) -> None:
        super().__init__(spec)
        self._reporters: list[Any] = []

    def _create_operator_support(self, program: Any, reporter: Any) -> Any:
        self._reporters.append(reporter)
        return super()._create_operator_support(program, reporter)

    def reasons(self, module: ImportedGraph) -> dict[str, str]:
        """ONNX node name -> the reason."""
        found: dict[str, str] = {}
        for reporter in self._reporters:
            for node, reason in reporter._rejected_nodes.items():
                name = origin(node, module)
                if name:
                    text = " ".join(str(reason).split())
                    if "not marked as quantized" in text:
                        text = _INEXACT if _unsafe(node) else _FLOAT
                    found.setdefault(name, text)
        return found


def _mark_integers(exported: Any) -> None:
    """Tell the back end which operators are between integers; it asks for its own quantizer's mark.

    An operator is when all that it reads was integers and all that it gives is rounded.
    """
    nodes = [n for n in exported.graph.nodes if n.op == "call_function"]
    marked: set[Any] = set()
    for node in nodes:
        if _rounds(node) or _unsafe(node):
            continue
        reads = all(_unpacks(a) or a in marked for a in node.all_input_nodes)
        if reads and _rounded(node):
            node.meta.setdefault("custom", {})[ArmAnnotationInfo.CUSTOM_META_KEY] = {
                "quantized": True
            }
            marked.add(node)


def _rounded(node: Any) -> bool:
    """Whether every reader rounds, or clips and then rounds."""
    return bool(node.users) and all(
        (_rounds(u) and not _unpacks(u))
        or (("getitem" in str(u.target) or any(f in str(u.target) for f in _FUSED)) and _rounded(u))
        for u in node.users
    )


def _unsafe(node: Any) -> bool:
    return any(u in str(node.target) for u in _UNSAFE)


def _rounds(node: Any) -> bool:
    return "quantized_decomposed" in str(node.target)


def _unpacks(node: Any) -> bool:
    return "quantized_decomposed.dequantize_per" in str(node.target)


def _integer_edges(lowered: Any) -> Any:
    """Take rounding at the program's edges out of it, where it has some."""
    program = lowered.exported_program()
    names = list(program.graph_signature.user_inputs)
    users = {n.name: list(n.users) for n in program.graph.nodes if n.op == "placeholder"}
    inputs = [
        i
        for i, name in enumerate(names)
        if len(users.get(name, [])) == 1 and _rounds(users[name][0])
    ]
    given = program.graph.output_node().args[0]
    outputs = [i for i, n in enumerate(given) if _unpacks(n)]
    return lowered.transform([QuantizeInputs(lowered, inputs), QuantizeOutputs(lowered, outputs)])


def _first_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:400]}"


def _write(file: Path, data: bytes) -> None:
    aside = file.with_name(f".{file.name}.part")
    aside.write_bytes(data)
    aside.replace(file)
