"""Reading an ONNX file that somebody else made, without trusting it."""

from __future__ import annotations

import difflib
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import external_data_helper, inliner, numpy_helper, version_converter

from edgebudget import graph
from edgebudget_runtime.errors import ArtifactError, UnsupportedError, UsageError

MAX_BYTES = 2 * 2**30  # protobuf's own limit
OLDEST_OPSET = 13  # the first with per-channel quantization
_KNOWN_DOMAINS = {"", "ai.onnx", "ai.onnx.ml", "com.microsoft"}


def from_file(path: Path, *, max_bytes: int = MAX_BYTES) -> onnx.ModelProto:
    """Load an ONNX model with its weights embedded, in a form the passes accept.

    Shapes may still be symbolic: see `freeze_shapes`.

    Raises:
        ArtifactError: EB530 missing, truncated, corrupt or invalid; EB531 its external data lies
            outside its folder or is missing; EB532 a pickle or an archive; EB533 a weight is not
            finite; EB534 too large.
        UnsupportedError: EB225 unknown operator domains, EB226 the operator set is too old.
    """
    _check_file(path, max_bytes)
    try:
        model = onnx.load_model(path, load_external_data=False)
    except Exception as e:  # protobuf's DecodeError, which has no type stubs, and ValueError
        raise _broken(path, "it is truncated or not an ONNX file") from e
    if not model.graph.node or not model.graph.output:
        raise _broken(path, "it holds no graph")
    _load_external(model, path, max_bytes)
    try:
        onnx.checker.check_model(model)
    except Exception as e:  # ValidationError, and others out of its C++ part
        raise _broken(path, (str(e).strip().splitlines() or [type(e).__name__])[0]) from e
    if model.functions:
        model = inliner.inline_local_functions(model)
    foreign = {n.domain for n in model.graph.node} - _KNOWN_DOMAINS
    if foreign:
        raise UnsupportedError(
            "EB225",
            f"{path.name} uses operators of {', '.join(sorted(foreign))}",
            hint="export the model with standard ONNX operators only",
        )
    _check_finite(model, path)
    return _upgrade(model, path)


def freeze_shapes(
    model: onnx.ModelProto, given: Mapping[str, Sequence[int]] | None = None
) -> onnx.ModelProto:
    """A copy whose inputs have numbers for dimensions; the batch is 1 unless `given` says more.

    Raises:
        UsageError: EB150 dimensions stay unknown, EB151 a given shape contradicts the model,
            EB152 no input has this name.
    """
    given = dict(given or {})
    frozen = onnx.ModelProto()
    frozen.CopyFrom(model)
    values = {v.name: v for v in graph.inputs(frozen)}
    for name in given:
        if name not in values:
            close = difflib.get_close_matches(name, values, n=1)
            raise UsageError(
                "EB152",
                f"the model has no input {name!r}",
                hint=f"did you mean {close[0]!r}?" if close else f"inputs: {', '.join(values)}",
            )
    bound: dict[str, int] = {}
    for name, shape in given.items():
        _bind(values[name], shape, bound)
    open_inputs = []
    for value in values.values():
        if not _resolve(value, bound):
            open_inputs.append(value)
    if open_inputs:
        listed = "; ".join(f"{v.name}: {_dims(v)}" for v in open_inputs)
        example = open_inputs[0]
        raise UsageError(
            "EB150",
            f"the input shape is not fixed: {listed}",
            hint=f"give it: --input-shape {_example(example)}",
        )
    for output in frozen.graph.output:
        output.type.tensor_type.ClearField("shape")
    return graph.infer_shapes(frozen)


def _check_file(path: Path, max_bytes: int) -> None:
    try:
        size = path.stat().st_size
        with path.open("rb") as f:
            head = f.read(64)
    except OSError as e:
        raise ArtifactError(
            "EB530", f"{path} cannot be read: {e.strerror}", hint="check the path"
        ) from e
    if size > max_bytes:
        raise ArtifactError(
            "EB534",
            f"{path.name} has {size} bytes, more than {max_bytes}",
            hint="models of this size are not supported",
        )
    if head.startswith(b"PK\x03\x04"):
        kind = "a zip archive (a PyTorch checkpoint or .pt2?)"
    elif len(head) > 1 and head[0] == 0x80 and head[1] <= 5:
        kind = "a pickle, which could run any code when loaded"
    else:
        return
    raise ArtifactError(
        "EB532",
        f"{path.name} is {kind}, not an ONNX file",
        hint="export it to ONNX, or give a .pt2 or .safetensors file under its own name",
    )


def _broken(path: Path, why: str) -> ArtifactError:
    return ArtifactError(
        "EB530", f"{path.name} is not a valid ONNX model: {why}", hint="export or copy it again"
    )


def _load_external(model: onnx.ModelProto, path: Path, max_bytes: int) -> None:
    """Read external weights, after checking that every path stays beside the model."""
    folder = path.resolve().parent
    total = 0
    for tensor in graph.tensors(model.graph):
        if not external_data_helper.uses_external_data(tensor):
            continue
        try:
            info = external_data_helper.ExternalDataInfo(tensor)
        except ValueError as e:
            raise ArtifactError(
                "EB531",
                f"{path.name}: the location of weight {tensor.name!r} cannot be read: {e}",
                hint="export or copy the model again",
            ) from e
        named = folder / info.location
        file = named.resolve()
        if Path(info.location).is_absolute() or not file.is_relative_to(folder):
            raise ArtifactError(
                "EB531",
                f"{path.name}: weight {tensor.name!r} points outside the folder: {info.location!r}",
                hint="keep a model and its weights in one folder",
            )
        try:
            state = named.stat()
        except OSError as e:
            raise ArtifactError(
                "EB531",
                f"{path.name}: its weights file {info.location!r} cannot be read: {e.strerror}",
                hint="put the weights file beside the model",
            ) from e
        start, length = info.offset or 0, info.length
        end = start + length if length is not None else state.st_size
        if not stat.S_ISREG(state.st_mode) or start < 0 or not start <= end <= state.st_size:
            raise ArtifactError(
                "EB531",
                f"{path.name}: weight {tensor.name!r} lies at bytes {start} to {end} of "
                f"{info.location!r}, which has {state.st_size}",
                hint="copy the weights file again",
            )
        total += end - start
        if total > max_bytes:
            raise ArtifactError(
                "EB534",
                f"{path.name}: its external weights have more than {max_bytes} bytes",
                hint="models of this size are not supported",
            )
        # Read here rather than with onnx's loader, which refuses links and hides the reason.
        with file.open("rb") as f:
            f.seek(start)
            tensor.raw_data = f.read(end - start)
        tensor.data_location = onnx.TensorProto.DEFAULT
        del tensor.external_data[:]


def _check_finite(model: onnx.ModelProto, path: Path) -> None:
    for tensor in graph.tensors(model.graph):
        try:
            value = numpy_helper.to_array(tensor)
        except Exception as e:  # raw data of the wrong length, unknown element types
            raise _broken(path, f"weight {tensor.name!r} cannot be read: {e}") from e
        if value.dtype.kind != "f":
            continue
        bad = int(value.size - np.isfinite(value).sum())
        if bad and value.ndim > 0:  # infinite scalars are legitimate: masks, limits of a Clip
            raise ArtifactError(
                "EB533",
                f"{path.name}: weight {tensor.name!r} has {bad} NaN or infinite values "
                f"of {value.size}",
                hint="train or export the model again",
            )
        if bad and bool(np.isnan(value)):
            raise ArtifactError(
                "EB533", f"{path.name}: {tensor.name!r} is NaN", hint="export the model again"
            )


def _upgrade(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    version = graph.opset(model)
    if version >= OLDEST_OPSET:
        return model
    try:
        upgraded = version_converter.convert_version(model, 17)
        onnx.checker.check_model(upgraded)
    except Exception as e:  # the converter's C++ part raises RuntimeError and others
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise UnsupportedError(
            "EB226",
            f"{path.name} uses operator set {version} and cannot be brought to 17: {reason}",
            hint=f"export the model again with operator set {OLDEST_OPSET} or later",
        ) from e
    return upgraded


def _bind(value: onnx.ValueInfoProto, shape: Sequence[int], bound: dict[str, int]) -> None:
    dims = value.type.tensor_type.shape.dim
    fits = len(dims) == len(shape) and all(
        size > 0 and (not d.HasField("dim_value") or d.dim_value == size)
        for d, size in zip(dims, shape, strict=False)
    )
    if not fits:
        asked = "x".join(map(str, shape))
        raise UsageError(
            "EB151",
            f"input {value.name!r} is {_dims(value)}; the shape {asked} does not fit",
            hint=f"for example --input-shape {_example(value)}",
        )
    for d, size in zip(dims, shape, strict=True):
        if d.dim_param and bound.setdefault(d.dim_param, size) != size:
            raise UsageError(
                "EB151",
                f"{d.dim_param!r} cannot be both {bound[d.dim_param]} and {size}",
                hint="give shapes that agree",
            )
        d.dim_value = size


def _resolve(value: onnx.ValueInfoProto, bound: Mapping[str, int]) -> bool:
    """Fill in what is known: symbols bound by given shapes, and a batch of 1."""
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        return False
    for axis, d in enumerate(tensor.shape.dim):
        if d.HasField("dim_value") and d.dim_value > 0:
            continue
        if d.dim_param in bound:
            d.dim_value = bound[d.dim_param]
        elif axis == 0 and len(tensor.shape.dim) > 1:
            d.dim_value = 1
    return all(d.HasField("dim_value") and d.dim_value > 0 for d in tensor.shape.dim)


def _dims(value: onnx.ValueInfoProto) -> str:
    dims = value.type.tensor_type.shape.dim
    return "x".join(str(d.dim_value or d.dim_param or "?") for d in dims) or "of unknown rank"


def _example(value: onnx.ValueInfoProto) -> str:
    dims = value.type.tensor_type.shape.dim
    sizes = [d.dim_value or (1 if i == 0 else 3 if i == 1 else 224) for i, d in enumerate(dims)]
    return "x".join(map(str, sizes)) or "1x3x224x224"
