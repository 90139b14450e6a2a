"""Where models come from: the zoo, the user's code, `.pt2`, `.onnx`, Hugging Face."""

from __future__ import annotations

import copy
import difflib
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebudget import safe_files
from edgebudget.program import Program, TensorSpec
from edgebudget.user_code import UserFunction, is_user_code, load_function
from edgebudget_runtime.errors import ArtifactError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model ready to compile, and what its source says about its data."""

    name: str
    program: Program
    output_shapes: Mapping[str, tuple[int, ...]]  # batch included
    digest: str
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    entry: Any = None  # the zoo entry, for its data and task


def load_model(
    source: str,
    *,
    weights: Path | None = None,
    input_shape: tuple[int, ...] | None = None,
    seed: int = 0,
) -> LoadedModel:
    """Load a model from any supported source; nothing in a model file is ever executed.

    Args:
        source: A zoo name, `file.py:function`, `.pt2`, `.onnx`, a Hugging Face folder or id.
        weights: A `.safetensors` file for a zoo or user-defined architecture.
        input_shape: Batch included; needed where the source does not say.
        seed: Seeds initial weights of a user's function that trains or loads none.

    Raises:
        UsageError: EB160 unknown name, EB161-EB163 user code, EB164 input shape unknown or wrong,
            EB166 file not found, EB167 `weights` make no sense here.
        UnsupportedError: EB250-EB253.
        ArtifactError: EB540-EB543.
    """
    if is_user_code(source):
        return _user(source, weights, input_shape, seed)
    suffix, path = Path(source).suffix.lower(), Path(source)
    if suffix in {".pt2", ".onnx"} or path.is_dir() or path.is_file():
        if weights is not None:
            raise UsageError("EB167", f"{source} carries its own weights", hint="drop --weights")
        if not path.exists():
            raise UsageError("EB166", f"no model file {source}", hint="check the path")
        return _file(path, suffix, input_shape)
    if source in _zoo_names():
        return _zoo(source, weights, input_shape)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        from edgebudget.load_huggingface import load_hub

        return load_hub(source, input_shape)
    raise _unknown(source)


def module_program(
    module: torch.nn.Module, inputs: Sequence[TensorSpec], where: str
) -> tuple[Program, dict[str, tuple[int, ...]]]:
    """A module-stage program in eval mode, and its output shapes found by running it once.

    Raises:
        UsageError: EB164, the model does not take these shapes, or returns no tensor.
    """
    import torch
    from torch.utils._pytree import tree_flatten

    module = module.eval().requires_grad_(False)
    try:
        answer = _answer(module, inputs)
    except Exception as e:
        shapes = ", ".join(str(list(s.shape)) for s in inputs)
        first = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise UsageError(
            "EB164",
            f"{where}: the model fails on an input of shape {shapes}: {first}",
            hint="give its shape, batch included: --input-shape 1,3,224,224; for token ids, or "
            "several inputs, return (module, {name: example array})",
        ) from e
    leaves, _ = tree_flatten(answer)
    tensors = [v for v in leaves if isinstance(v, torch.Tensor)]
    if not tensors:
        raise UsageError(
            "EB164",
            f"{where}: the model returns {type(answer).__name__}, not tensors",
            hint="return a tensor, or a tuple or dict of tensors",
        )
    if isinstance(answer, Mapping) and len(answer) == len(tensors):
        names = tuple(str(k) for k in answer)
    elif len(tensors) == 1:
        names = ("output",)
    else:
        names = tuple(f"output_{i}" for i in range(len(tensors)))
    found = {n: tuple(t.shape) for n, t in zip(names, tensors, strict=True)}
    return Program("module", module, tuple(inputs), names), found


def _answer(module: torch.nn.Module, inputs: Sequence[TensorSpec]) -> Any:
    """What the module returns for zeros: without computing it, where the module allows that."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    def zeros() -> list[torch.Tensor]:
        return [torch.zeros(s.shape, dtype=getattr(torch, s.dtype)) for s in inputs]

    with torch.no_grad():
        try:
            copied = copy.deepcopy(module)  # a module may keep tensors of the run, here fakes
            with FakeTensorMode(allow_non_fake_inputs=True):
                return copied(*zeros())
        except Exception:  # modules that look at values cannot be run without them
            return module(*zeros())


def module_digest(module: torch.nn.Module, structure: str = "") -> str:
    """SHA-256 of a module's weights, its printed structure and the code of its own classes."""
    classes = {type(m) for m in module.modules()}
    code = [
        _source_of(c)
        for c in sorted(classes, key=lambda c: (c.__module__, c.__qualname__))
        if not c.__module__.startswith(("torch.", "transformers."))
    ]
    text = _ADDRESS.sub("", str(module)) + "".join(code) + structure
    tensors = dict(module.state_dict(keep_vars=True))
    return safe_files.digest_of(tensors, text)


def input_names(module: torch.nn.Module, count: int) -> list[str]:
    """Names of the first `count` arguments of `forward`, or input_0, ... where it has none."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
    found = [n for n, p in inspect.signature(module.forward).parameters.items() if p.kind in kinds]
    if len(found) >= count:
        return found[:count]
    return [f"input_{i}" for i in range(count)]


def _user(
    source: str, weights: Path | None, input_shape: tuple[int, ...] | None, seed: int
) -> LoadedModel:
    import torch

    function = load_function(source, "model")
    with torch.random.fork_rng(devices=[]):  # user code may draw initial weights
        torch.manual_seed(seed)
        returned = function()
    module, given = _module_and_shape(function, returned)
    if weights is not None:
        safe_files.apply_weights(module, weights)
    safe_files.require_finite(module.state_dict().items(), source)
    shape = input_shape if input_shape is not None else given
    if shape is None:
        raise UsageError(
            "EB164",
            f"{source} does not say its input shape",
            hint="give it, batch included: --input-shape 1,3,224,224; "
            "or return (module, (1, 3, 224, 224))",
        )
    program, outputs = module_program(module, _specs(module, shape, function), source)
    return LoadedModel(
        name=f"{function.path.stem}-{function.name}",
        program=program,
        output_shapes=outputs,
        digest=module_digest(module),
    )


def _module_and_shape(function: UserFunction, returned: Any) -> tuple[torch.nn.Module, Any]:
    import torch

    module, shape = returned if _is_pair(returned) else (returned, None)
    if isinstance(module, torch.nn.Module):
        return module, shape
    raise UsageError(
        "EB163",
        f"{function.where()}: {function.name}() returned {type(returned).__name__}",
        hint="return a torch.nn.Module, or (module, input_shape)",
    )


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2


def _specs(module: torch.nn.Module, given: Any, function: UserFunction) -> tuple[TensorSpec, ...]:
    """Specs from a shape, an example array, or a dict of either by input name."""
    if isinstance(given, Mapping):
        return tuple(_spec(str(k), v, function) for k, v in given.items())
    return (_spec(input_names(module, 1)[0], given, function),)


def _spec(name: str, given: Any, function: UserFunction) -> TensorSpec:
    if hasattr(given, "shape") and hasattr(given, "dtype"):
        kind = str(given.dtype).removeprefix("torch.")
        return TensorSpec(name, tuple(int(d) for d in given.shape), kind)
    if isinstance(given, (tuple, list)) and given and all(type(d) is int and d > 0 for d in given):
        return TensorSpec(name, tuple(given))
    raise UsageError(
        "EB163",
        f"{function.where()}: {function.name}() gave {given!r} as the shape of input {name!r}",
        hint="a shape is a tuple of positive ints, batch included: (1, 3, 224, 224)",
    )


def _file(path: Path, suffix: str, input_shape: tuple[int, ...] | None) -> LoadedModel:
    if path.is_dir():
        from edgebudget.load_huggingface import load_folder

        return load_folder(path, input_shape)
    if suffix == ".onnx":
        return _onnx(path, input_shape)
    if suffix == ".pt2":
        from edgebudget.safe_pt2 import load_pt2

        module, inputs, structure = load_pt2(path, input_shape)
        safe_files.require_finite(module.state_dict().items(), str(path))
        _same_shape(path, inputs, input_shape)
        program, outputs = module_program(module, inputs, str(path))
        return LoadedModel(
            name=path.stem,
            program=program,
            output_shapes=outputs,
            digest=module_digest(module, structure),
        )
    safe_files.refuse_pickle(path)
    raise UsageError(
        "EB160",
        f"{path} is not a model that edgebudget reads",
        hint="use .onnx, .pt2, file.py:function (with --weights), or a Hugging Face folder",
    )


def _onnx(path: Path, input_shape: tuple[int, ...] | None) -> LoadedModel:
    from edgebudget import graph
    from edgebudget.export import freeze_shapes, from_file

    model = from_file(path)
    names = [v.name for v in graph.inputs(model)]
    if input_shape is not None and len(names) != 1:
        raise UsageError(
            "EB164",
            f"{path} has {len(names)} inputs, --input-shape gives one shape",
            hint="export the model with fixed shapes",
        )
    model = freeze_shapes(model, {names[0]: input_shape} if input_shape else None)
    found = graph.shapes(model)
    return LoadedModel(
        name=path.stem,
        program=graph.program(model),
        output_shapes={o.name: found.get(o.name, ()) for o in model.graph.output},
        digest=graph.fingerprint(model),
    )


def _same_shape(
    path: Path, inputs: Sequence[TensorSpec], input_shape: tuple[int, ...] | None
) -> None:
    if input_shape is not None and (len(inputs) != 1 or inputs[0].shape != input_shape):
        found = ", ".join(str(list(s.shape)) for s in inputs)
        raise UsageError(
            "EB164",
            f"{path} is fixed to the input shape {found}, --input-shape says {list(input_shape)}",
            hint="export the model at the shape you want",
        )


def _zoo(name: str, weights: Path | None, input_shape: tuple[int, ...] | None) -> LoadedModel:
    from edgebudget_models import catalogue

    entry = catalogue.get(name)
    if weights is not None:
        module = entry.build()
        safe_files.apply_weights(module, weights)
    else:
        try:
            module = entry.load(None)
        except ValueError as e:
            raise ArtifactError("EB541", str(e), hint="install edgebudget again") from e
    inputs = (TensorSpec(entry.input_name, input_shape or entry.input_shape),)
    program, outputs = module_program(module, inputs, name)
    if len(entry.outputs) > 1:  # early exits go by name
        outputs = dict(zip(entry.outputs, outputs.values(), strict=True))
        program = replace(program, outputs=entry.outputs)
    return LoadedModel(
        name=name,
        program=program,
        output_shapes=outputs,
        digest=module_digest(module),
        preprocessing=dict(entry.preprocessing),
        entry=entry,
    )


def _zoo_names() -> tuple[str, ...]:
    from edgebudget_models import catalogue

    return catalogue.names()


def _unknown(source: str) -> UsageError:
    close = difflib.get_close_matches(source, _zoo_names(), n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}?" if close else f"zoo: {', '.join(_zoo_names())}"
    return UsageError(
        "EB160",
        f"no model is called {source!r}",
        hint=f"{hint} (a model of your own: file.py:function, .onnx, .pt2, or a folder)",
    )


def _source_of(cls: type) -> str:
    try:
        return inspect.getsource(cls)
    except (OSError, TypeError):
        return cls.__qualname__
