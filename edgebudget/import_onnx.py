"""A graph-stage program as a torch module, for engines that start from torch.export.

The ONNX graph stays the one source of quantization: its QuantizeLinear and DequantizeLinear
become torch's `quantized_decomposed` operators around float ones, the form that ExecuTorch's
partitioners turn into integer kernels.

Imports torch and onnx: reach this module only where a graph is at hand.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from edgebudget import graph as graphs
from edgebudget.import_onnx_call import Call, Fixed, Grid, Op, Rule, Run
from edgebudget.import_onnx_layers import LAYERS
from edgebudget.import_onnx_math import MATH
from edgebudget.import_onnx_moves import MOVES
from edgebudget.import_onnx_resize import RESIZE
from edgebudget.import_onnx_rounding import Packed, Rounding
from edgebudget.onnx_contrib import attributes
from edgebudget.onnx_shapes import inlined

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

RULES: Mapping[str, Rule] = {**MATH, **LAYERS, **MOVES, **RESIZE}
# Operators of one operand that answer the same for integers shifted by a constant.
_ALIKE = frozenset(
    "DepthToSpace Expand Flatten Gather Identity MaxPool Reshape Slice SpaceToDepth Split Squeeze "
    "Tile Transpose Unsqueeze".split()
)
_DOMAINS = frozenset({"", "ai.onnx", "com.microsoft"})


def import_graph(model: ModelProto, *, signed: bool = True, batches: bool = False) -> ImportedGraph:
    """Rebuild an ONNX graph with static shapes as a torch module.

    `signed` writes unsigned activations as signed ones of the same values (uint8 with zero point
    z is int8 with z - 128), which is what XNNPACK and Ethos-U compute with. Inputs and outputs
    of the graph keep their types. With `batches` the module takes any number of samples at once.

    Raises:
        UnsupportedError: EB243, an operator or one of its settings has no counterpart.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(inlined(model))
    return _Builder(copy, signed, batches).build()


class ImportedGraph(nn.Module):
    """Takes the graph's inputs in order and returns a tuple of its outputs.

    Every node is a submodule of `steps`, so that operators found later in an exported program
    can be traced to it: `node_names` holds the ONNX node's name by submodule name.
    """

    def __init__(self, steps: list[_Step], inputs: list[str], outputs: list[str]) -> None:
        super().__init__()
        self.input_names, self.output_names = tuple(inputs), tuple(outputs)
        self.node_names: dict[str, str] = {}
        self._order = steps
        self._buffer_of: dict[str, str] = {}
        self.steps = nn.ModuleDict()
        used: set[str] = set()
        for step in steps:
            key = graphs.unique(_identifier(step.node), used)
            self.node_names[key] = step.node
            self.steps[key] = _Runner(step.run)
            step.key = key

    def keep(self, name: str, value: Tensor) -> None:
        """Store a tensor that steps take by `name`."""
        buffer = graphs.unique(f"w_{_identifier(name)}", set(dict(self.named_buffers())))
        self._buffer_of[name] = buffer
        self.register_buffer(buffer, value)

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Run the graph once."""
        at = dict(zip(self.input_names, values, strict=True))
        at.update((name, getattr(self, buffer)) for name, buffer in self._buffer_of.items())
        for step in self._order:
            found = self.steps[step.key](*(at[a] for a in step.args))
            results = found if isinstance(found, tuple) else (found,)
            at.update((n, r) for n, r in zip(step.outputs, results, strict=False) if n)
            for name in step.last:
                del at[name]
        return tuple(at[name] for name in self.output_names)


class _Runner(nn.Module):
    """One step; a module of its own only to carry a name through torch.export."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self._run = run

    def forward(self, *values: Tensor) -> Any:
        return self._run(*values)


class _Step:
    """What runs for a node; `last` names values that nobody needs afterwards."""

    def __init__(
        self,
        node: str,
        run: Run,
        args: tuple[str, ...],
        outputs: tuple[str, ...],
        *,
        floats: bool = False,
    ) -> None:
        self.node, self.run, self.args, self.outputs = node, run, args, outputs
        self.floats = floats  # makes integers float, and nothing else
        self.last: tuple[str, ...] = ()
        self.key = ""


class _Builder:
    """Walks the graph once; satisfies `import_onnx_call.Scope`."""

    def __init__(self, model: ModelProto, signed: bool, batches: bool) -> None:
        self._model, self.batches = model, batches
        graphs.name_nodes(model)
        self._opset = graphs.opset(model)
        self.known: dict[str, Tensor] = {
            t.name: _tensor(onnx.numpy_helper.to_array(t)) for t in model.graph.initializer
        }
        self.shapes = graphs.shapes(model)
        self._outputs = [o.name for o in model.graph.output]
        self._readers = Counter(n for node in model.graph.node for n in node.input)
        self._reader = {n: node for node in model.graph.node for n in node.input}
        self._rounding = Rounding(signed)
        self._packed: dict[str, Packed] = {}
        self._unpacked: set[str] = set()
        self._steps: list[_Step] = []

    def build(self) -> ImportedGraph:
        for node in self._model.graph.node:
            self._import(node)
        for i, name in enumerate(self._outputs):
            self._outputs[i] = self._plain(name)
        for name in self._outputs:
            self._unpack(name)
        self._repeat()
        self._release()
        module = ImportedGraph(
            self._steps, [i.name for i in graphs.inputs(self._model)], self._outputs
        )
        taken = {a for step in self._steps for a in step.args} | set(self._outputs)
        made = {o for step in self._steps for o in step.outputs}
        for name in sorted(taken & set(self.known) - made):
            module.keep(name, self.known[name])
        return module.eval()

    def grid(self, name: str) -> Grid | None:
        return self._rounding.grids.get(name)

    def grid_after(self, name: str) -> Grid | None:
        reader = self._reader.get(name)
        if reader is None or self._readers[name] != 1 or name in self._outputs:
            return None
        rounds = reader.op_type == "QuantizeLinear"
        return self._rounding.grid_of(self._call(reader)) if rounds else None

    def is_packed(self, name: str) -> bool:
        return name in self._packed

    def stored(self, name: str, value: Tensor) -> str:
        name = graphs.unique(name, {*self.known, *self.shapes})
        self.known[name] = value.contiguous()
        self.shapes[name] = tuple(value.shape)
        return name

    def transposed(self, name: str) -> str:
        result = f"{name}.T"
        if name in self._packed:
            if result not in self._packed:
                packed = self._packed[name]
                whole = self.stored(f"{packed.whole}.T", self.known[packed.whole].T)
                self._pack(result, packed.moved(whole, self.known[name].ndim))
            return result
        if name in self.known:
            return result if result in self.known else self.stored(result, self.known[name].T)
        self._add(_Step(result, lambda x: x.transpose(0, 1), (name,), (result,)))
        return result

    def _call(self, node: NodeProto) -> Call:
        return Call(node, attributes(node), self, self._opset)

    def _import(self, node: NodeProto) -> None:
        call = self._call(node)
        rule = RULES.get(node.op_type) if node.domain in _DOMAINS else None
        if node.op_type == "DequantizeLinear" and node.input[0] in self.known:
            self._pack(node.output[0], self._rounding.packed(call))
            return
        if node.op_type == "QuantizeLinear" and node.input[0] in self.known:
            self.known[node.output[0]] = self._rounding.rounded(call)
            return
        if node.op_type in {"QuantizeLinear", "DequantizeLinear"}:
            self._add_op(node, self._rounding.op(call))
            return
        if rule is None:
            raise call.refuse("has no counterpart in torch")
        if node.input and self._rounding.is_shifted(node.input[0]) and node.op_type in _ALIKE:
            self._rounding.moved(node.input[0], node.output)
        else:
            self._restore(node)
            call = self._call(node)
        made = rule(call)
        if isinstance(made, Fixed):
            self.known[node.output[0]] = made.value
        elif all(a in self.known and a not in self._packed for a in made.args):
            found = made.run(*(self.known[a] for a in made.args))
            results = found if isinstance(found, tuple) else (found,)
            self.known.update(zip(node.output, results, strict=False))
        else:
            self._add_op(node, made)

    def _restore(self, node: NodeProto) -> None:
        """Feed the node values of their own type, where an operand was shifted to a signed one."""
        for i, name in enumerate(node.input):
            node.input[i] = self._plain(name)

    def _plain(self, name: str) -> str:
        if not self._rounding.is_shifted(name):
            return name
        result = f"{name}.unsigned"
        if not any(result in s.outputs for s in self._steps):
            self._add(_Step(result, self._rounding.plain(name), (name,), (result,)))
        return result

    def _pack(self, name: str, packed: Packed) -> None:
        self._packed[name] = packed
        self.known[name] = packed.value(self.known)
        self.shapes[name] = tuple(self.known[name].shape)

    def _unpack(self, name: str) -> None:
        """Add the step that makes a stored integer tensor float, once it is used."""
        packed = self._packed.get(name)
        if packed is None or name in self._unpacked:
            return
        self._unpacked.add(name)
        op = packed.op(self)
        self._add(_Step(packed.node, op.run, op.args, (name,), floats=True))

    def _add_op(self, node: NodeProto, op: Op) -> None:
        for name in op.args:
            self._unpack(name)
        floats = node.op_type == "DequantizeLinear"
        self._add(_Step(node.name, op.run, op.args, tuple(node.output), floats=floats))

    def _add(self, step: _Step) -> None:
        self._steps.append(step)

    def _repeat(self) -> None:
        """Make integers float once for each reader: engines fuse what one operator alone reads."""
        makers = {s.outputs[0]: s for s in self._steps if s.floats}
        taken, steps = set(self._outputs), list[_Step]()
        for step in self._steps:
            args = list(step.args)
            for i, name in enumerate(step.args):
                if name in makers and name in taken:
                    maker = makers[name]
                    args[i] = f"{name}.for.{step.outputs[0]}.{i}"
                    steps.append(_Step(maker.node, maker.run, maker.args, (args[i],), floats=True))
                taken.add(name)
            step.args = tuple(args)
            steps.append(step)
        self._steps = steps

    def _release(self) -> None:
        seen = set(self._outputs)
        for step in reversed(self._steps):
            mine = {*step.args, *(o for o in step.outputs if o)} - seen
            step.last = tuple(sorted(mine))
            seen |= mine


def _identifier(name: str) -> str:
    return re.sub(r"\W", "_", name) or "value"


def _tensor(value: Any) -> Tensor:
    # A copy: numpy_helper gives read-only arrays, and torch has no dtype for a few of them.
    return torch.from_numpy(np.array(value))
