"""ONNX Runtime sessions on the CPU, opened the same way everywhere in the compiler."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import onnxruntime as ort

from edgebudget.cpu_features import cpu_features
from edgebudget_runtime.engine import EXACT
from edgebudget_runtime.errors import ArtifactError, first_line

if TYPE_CHECKING:
    from edgebudget.workload import Array


class CpuSession:
    """A model loaded in ONNX Runtime's CPU provider, and nothing else.

    On x86 without VNNI the engine sums 8-bit products in 16 bits, and clips: an integer graph then
    answers otherwise than anywhere else. `exact` sums as the graph says, more slowly there; what
    stands for a run on the device itself is not exact.
    """

    def __init__(
        self,
        model: bytes | Path,
        *,
        threads: int | None = None,
        optimize: bool = True,
        exact: bool = True,
    ) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads or os.cpu_count() or 1
        options.inter_op_num_threads = 1
        # Spinning threads steal the core from each other when other work shares the machine.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if exact and cpu_features().saturates and _zero_points_are_given(model):
            options.add_session_config_entry(*EXACT)
        if not optimize:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        source = str(model) if isinstance(model, Path) else model
        try:
            self._session = ort.InferenceSession(
                source, options, providers=["CPUExecutionProvider"], enable_fallback=0
            )
        except Exception as e:  # the engine raises a dozen unrelated types here
            raise ArtifactError(
                "EB510",
                f"ONNX Runtime cannot load this model: {first_line(e)}",
                hint="check the file with `edgebudget inspect`",
            ) from e
        self.inputs: tuple[str, ...] = tuple(i.name for i in self._session.get_inputs())
        self.outputs: tuple[str, ...] = tuple(o.name for o in self._session.get_outputs())
        # A dimension is a number, or a name or None where the model leaves it open.
        self.shapes: dict[str, tuple[int | str | None, ...]] = {
            i.name: tuple(i.shape) for i in self._session.get_inputs()
        }

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run one batch; names are the model's own."""
        values: Any = self._session.run(list(self.outputs), {k: inputs[k] for k in self.inputs})
        return dict(zip(self.outputs, values, strict=True))


def _zero_points_are_given(model: bytes | Path) -> bool:
    """Whether all that is rounded has a zero point; ONNX Runtime 1.31 cannot be exact without.

    What a damaged file holds is for the engine to say.
    """
    try:
        if isinstance(model, Path):
            loaded = onnx.load_model(str(model), load_external_data=False)
        else:
            loaded = onnx.load_model_from_string(model)
    except Exception:  # protobuf's own errors, and those of the file system
        return False
    return all(len(n.input) > 2 for n in loaded.graph.node if n.op_type == "QuantizeLinear")
