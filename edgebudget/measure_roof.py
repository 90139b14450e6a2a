"""What this processor does at best, measured in about a second: for the roofline of a report.

"Roofline: An Insightful Visual Performance Model for Multicore Architectures" (2009).
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from edgebudget.layer_loads import Roof
from edgebudget_runtime.cost import Figure

_SIZE = 512  # of the square matrices: in the cache, and large enough to keep the units busy
_BYTES = 64_000_000  # far more than any cache
_SECONDS = 0.3


def measure(device: str, *, integer: bool) -> Roof:
    """One thread's peak in ONNX Runtime's own matrix kernel, and the bandwidth of a copy."""
    run = _product(integer)
    rate = _SIZE**3 / _fastest(run)
    source = np.ones(_BYTES // 4, np.float32)
    target = np.empty_like(source)
    moved = 2 * _BYTES / _fastest(lambda: np.copyto(target, source))
    kind = "8-bit" if integer else "float"
    return Roof(
        Figure(
            value=rate,
            evidence="measured",
            how=f"fastest {kind} product of two {_SIZE}x{_SIZE} matrices, 1 thread",
            device=device,
        ),
        Figure(
            value=moved,
            evidence="measured",
            how=f"fastest copy of {_BYTES // 1_000_000} MB, 1 thread",
            device=device,
        ),
    )


def _product(integer: bool) -> Callable[[], object]:
    from onnx import TensorProto, helper, numpy_helper

    from edgebudget.session import CpuSession

    kind, types = ("MatMulInteger", (np.uint8, np.int8)) if integer else ("MatMul", (np.float32,))
    rng = np.random.default_rng(0)
    x, w = (rng.integers(0, 100, (_SIZE, _SIZE)).astype(t) for t in (types[0], types[-1]))
    given = TensorProto.UINT8 if integer else TensorProto.FLOAT
    out = TensorProto.INT32 if integer else TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node(kind, ["x", "w"], ["y"])],
        "peak",
        [helper.make_tensor_value_info("x", given, [_SIZE, _SIZE])],
        [helper.make_tensor_value_info("y", out, [_SIZE, _SIZE])],
        [numpy_helper.from_array(w, "w")],
    )
    opset = [helper.make_opsetid("", 20)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=10)
    session = CpuSession(model.SerializeToString(), threads=1, exact=False)
    return lambda: session.run({"x": x})


def _fastest(run: Callable[[], object]) -> float:
    """Seconds of the fastest of as many runs as fit."""
    best, end = float("inf"), time.perf_counter() + _SECONDS
    while time.perf_counter() < end or best == float("inf"):
        began = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - began)
    return best
