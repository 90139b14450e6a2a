"""Integer graphs are computed as they say, on processors that clip sums of products too."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgebudget.cpu_features import cpu_features
from edgebudget.session import CpuSession

_CHANNELS = 64


def largest_products() -> bytes:
    """A convolution whose every product is 255 x 127, scaled so that their sum is 255 again."""
    held = {
        "x_scale": np.float32(1.0), "x_zero": np.uint8(0),
        "w": np.full((_CHANNELS, _CHANNELS, 1, 1), 127, np.int8),
        "w_scale": np.float32(1.0), "w_zero": np.int8(0),
        "y_scale": np.float32(127 * _CHANNELS), "y_zero": np.uint8(0),
    }  # fmt: skip
    shape = (1, _CHANNELS, 8, 8)
    graph = helper.make_graph(
        [helper.make_node("QLinearConv", ["x", *held], ["y"])],
        "largest",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, shape)],
        [helper.make_tensor_value_info("y", TensorProto.UINT8, shape)],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in held.items()],
    )
    opset = [helper.make_opsetid("", 20)]
    return bytes(helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString())


@pytest.mark.parametrize("exact", [True, False])
def test_nothing_is_clipped_but_where_the_device_itself_does(exact: bool) -> None:
    session = CpuSession(largest_products(), exact=exact)
    found = session.run({"x": np.full((1, _CHANNELS, 8, 8), 255, np.uint8)})["y"]
    clipped = cpu_features().saturates and not exact
    assert (found < 255).all() if clipped else (found == 255).all()
