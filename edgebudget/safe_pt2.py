"""Reading `.pt2` archives (torch.export) without letting them run anything.

PyTorch's own reader unpickles some members, evaluates strings as expressions and looks functions
up by any dotted name. So the archive is checked here against what a plain exported network needs,
written anew from the checked members only, and just that copy is handed to PyTorch.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebudget.program import TensorSpec
from edgebudget_runtime.errors import ArtifactError, UnsupportedError

if TYPE_CHECKING:
    import torch

MAX_BYTES = 8 << 30  # of all members together, before decompression
_MODEL = re.compile(r"models/([\w.-]+)\.json")
_CONFIG = re.compile(r"data/(?:weights|constants)/[\w.-]+_(?:weights|constants)_config\.json")
_SAMPLES = re.compile(r"data/sample_inputs/[\w.-]+\.pt")
_PLAIN = re.compile(
    r"archive_format|archive_version|byteorder|\.data/\w+|\.format_version|\.storage_alignment"
    r"|data/weights/weight_\d+|data/constants/tensor_\d+"
)
_OPERATOR = re.compile(
    r"torch\.ops\.(?:aten|prims|torchvision|quantized_decomposed)\.(?!from_file\b)\w+\.\w+"
    r"|torch\.ops\.higher_order\.(?:wrap_with_set_grad_enabled|wrap_with_autocast)"
    r"|_operator\.(?:getitem|add|sub|mul|truediv|floordiv|mod|pow|neg|eq|ne|lt|le|gt|ge)"
    r"|torch\.sym_(?:int|float|not|max|min|ite)"
)
_SYMBOL = re.compile(r"Symbol\('[a-z]+\d+'(?:, [a-z]+=(?:True|False))*\)")
_SYMBOLS = frozenset(
    "Integer Rational Add Mul Pow Mod PythonMod FloorDiv CeilDiv IntTrueDiv FloatTrueDiv "
    "ModularIndexing CleanDiv Max Min Eq Ne Lt Le Gt Ge And Or Not floor ceiling "
    "true false True False".split()
)
_CONTAINERS = frozenset({"builtins.tuple", "builtins.list", "builtins.dict", None})


def load_pt2(
    path: Path, input_shape: tuple[int, ...] | None = None
) -> tuple[torch.nn.Module, tuple[TensorSpec, ...], str]:
    """The module in an archive, its inputs, and a text of its graph.

    A dimension that the export left open becomes the smallest batch it allows (the first
    dimension) or the size it was exported with, unless `input_shape` says more.

    Raises:
        ArtifactError: EB540 it carries pickles, EB541 it is corrupt, EB544 it carries code or
            calls something other than tensor operators.
        UnsupportedError: EB252, it was exported in training mode, or is a container unknown here.
    """
    import torch

    checked = _rewritten(path)
    try:
        exported = torch.export.load(checked)
        module: Any = exported.module(check_guards=False)
    except Exception as e:  # torch raises a dozen unrelated types on broken archives
        raise _corrupt(path, (str(e).strip() or type(e).__name__).splitlines()[0]) from e
    _require_inference(path, exported)
    # The instance overrides of these two refuse to run; modes are fixed in the graph anyway.
    del module.train, module.eval
    _drop_detach(module)
    return module, _inputs(path, exported, input_shape), str(exported.graph)


def _rewritten(path: Path) -> io.BytesIO:
    members = _members(path)
    models = [n for n in members if _MODEL.fullmatch(n)]
    if len(models) != 1:
        raise _corrupt(path, f"it holds {len(models)} models, not one")
    for name, data in list(members.items()):
        if _SAMPLES.fullmatch(name):
            _check_samples(path, name, data)
        elif _CONFIG.fullmatch(name):
            _check_config(path, name, _json(path, name, data), members)
        elif name == models[0]:
            members[name] = json.dumps(_checked_model(path, _json(path, name, data))).encode()
        elif not _PLAIN.fullmatch(name):
            raise _refused(path, f"member {name}")
    copy = io.BytesIO()
    with zipfile.ZipFile(copy, "w", zipfile.ZIP_STORED) as archive:
        for name, data in members.items():
            archive.writestr(f"archive/{name}", data)
    copy.seek(0)
    return copy


def _members(path: Path) -> dict[str, bytes]:
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
            if sum(i.file_size for i in infos) > MAX_BYTES:
                raise _corrupt(path, f"it unpacks to more than {MAX_BYTES} bytes")
            found = {i.filename.partition("/")[2]: archive.read(i) for i in infos}
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError) as e:
        raise _corrupt(path, "it is truncated or not a .pt2 archive") from e
    if any(name.endswith((".pkl", ".pickle")) for name in found) or "version" in found:
        raise _pickled(path, "its weights")
    if "" in found or len(found) != len(infos):
        raise _corrupt(path, "its members are not in one folder")
    # Files that a user packed along are never needed.
    return {k: v for k, v in found.items() if not k.startswith("extra/")}


def _json(path: Path, name: str, data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as e:
        raise _corrupt(path, f"{name} is not JSON") from e


def _check_samples(path: Path, name: str, data: bytes) -> None:
    import torch

    if not data:
        return
    try:
        torch.load(io.BytesIO(data), weights_only=True)
    except Exception as e:  # the same call in PyTorch's reader would fall back to plain pickle
        raise _pickled(path, name) from e


def _check_config(path: Path, name: str, config: Any, members: Mapping[str, bytes]) -> None:
    folder = name.rpartition("/")[0]
    try:
        payloads = list(config["config"].items())
        for tensor, payload in payloads:
            file = f"{folder}/{payload['path_name']}"
            if payload["use_pickle"] is not False or not _PLAIN.fullmatch(file):
                raise _pickled(path, f"weight {tensor}")
            if file not in members:
                raise _corrupt(path, f"{file} is missing")
    except (KeyError, TypeError, AttributeError) as e:
        raise _corrupt(path, f"{name} is not a list of weights") from e


def _checked_model(path: Path, model: Any) -> Any:
    """The model's JSON with nothing left in it that PyTorch would evaluate or import."""
    for holder, key, value in _walk(model):
        if key in {"target", "as_operator"} and isinstance(value, str):
            if not _OPERATOR.fullmatch(value):
                raise _refused(path, f"a call of {value}")
        elif key == "expr_str" and not _is_arithmetic(value):
            raise _refused(path, f"the expression {value!r}")
        elif key in {"in_spec", "out_spec"} and isinstance(value, str):
            _check_tree(path, _json(path, key, value.encode()))
        elif (key == "as_custom_obj" and value) or (key == "custom_obj_values" and value):
            raise _refused(path, "an object of a custom class")
        elif key == "metadata" and isinstance(value, dict):
            # Names of the layers are useful; everything else here is resolved by name.
            stack = value.get("nn_module_stack")
            holder[key] = {"nn_module_stack": stack} if isinstance(stack, str) else {}
    if isinstance(model, dict):
        model["guards_code"] = []
        symbols = model.get("range_constraints") or {}
        if not all(re.fullmatch(r"[a-z]+\d+", str(s)) for s in symbols):
            raise _refused(path, "a symbol that is no name")
    return model


def _walk(value: Any) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """Every (dict, key, value) of nested JSON."""
    stack = [value]
    while stack:
        current = stack.pop()
        if isinstance(current, dict):
            for key, inner in list(current.items()):
                yield current, key, inner
            stack.extend(current.values())
        elif isinstance(current, list):
            stack.extend(current)


def _is_arithmetic(text: Any) -> bool:
    """Whether a shape expression consists of symbols, numbers and known functions."""
    if not isinstance(text, str):
        return False
    text = _SYMBOL.sub("s0", text)
    if not re.fullmatch(r"[\w+\-*/(),. <>=&|]*", text):
        return False
    names = re.findall(r"[A-Za-z_]\w*", text)
    return not re.search(r"\.\s*[A-Za-z_]", text) and all(
        n in _SYMBOLS or re.fullmatch(r"[a-z]+\d+", n) for n in names
    )


def _check_tree(path: Path, spec: Any) -> None:
    """Containers of inputs and outputs: PyTorch imports the modules of any other type named."""
    for holder, key, value in _walk(spec):
        if key == "type" and value not in _CONTAINERS:
            raise UnsupportedError(
                "EB252",
                f"{path}: the model takes or returns a {value}",
                hint="export a module that takes and returns tensors, tuples and dicts",
            )
        if key == "context" and isinstance(value, str) and "__enum__" in value:
            raise _refused(path, f"a {holder.get('type')} keyed by a class")


def _require_inference(path: Path, exported: torch.export.ExportedProgram) -> None:
    for node in exported.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is None:
            continue
        names = [a.name for a in schema.arguments]
        given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        if given.get("training") is True or given.get("train") is True:
            raise UnsupportedError(
                "EB252",
                f"{path} was exported in training mode ({node.target} trains)",
                hint="call model.eval() before torch.export.export",
            )


def _drop_detach(module: Any) -> None:
    """Remove detach: without gradients it does nothing, and it cannot be exported again."""
    for node in list(module.graph.nodes):
        if str(node.target) in {"aten.detach_.default", "aten.detach.default"}:
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
    module.recompile()


def _inputs(
    path: Path, exported: torch.export.ExportedProgram, input_shape: tuple[int, ...] | None
) -> tuple[TensorSpec, ...]:
    import torch

    wanted = exported.graph_signature.user_inputs
    found = {n.name: n.meta.get("val") for n in exported.graph.nodes if n.op == "placeholder"}
    specs = []
    for name in wanted:
        value = found.get(str(name))
        if not isinstance(value, torch.Tensor):
            raise UnsupportedError(
                "EB252",
                f"{path}: input {name} is no tensor",
                hint="export a module whose inputs are all tensors",
            )
        shape = tuple(
            d
            if isinstance(d, int)
            else input_shape[i]
            if input_shape is not None and len(input_shape) == value.ndim and len(wanted) == 1
            else _smallest(d, exported)
            if i == 0
            else int(d.node.hint or _smallest(d, exported))
            for i, d in enumerate(value.shape)
        )
        specs.append(TensorSpec(str(name), shape, str(value.dtype).removeprefix("torch.")))
    return tuple(specs)


def _smallest(dim: Any, exported: torch.export.ExportedProgram) -> int:
    bounds = exported.range_constraints.get(dim.node.expr)
    return max(1, int(bounds.lower)) if bounds is not None else 1


def _corrupt(path: Path, why: str) -> ArtifactError:
    return ArtifactError(
        "EB541", f"{path} is not a sound .pt2: {why}", hint="export it again: torch.export.save"
    )


def _pickled(path: Path, what: str) -> ArtifactError:
    return ArtifactError(
        "EB540",
        f"{path}: refused: {what} would have to be unpickled, which can run code",
        hint="export it again with a current torch.export.save, or use file.py:function",
    )


def _refused(path: Path, what: str) -> ArtifactError:
    return ArtifactError(
        "EB544",
        f"{path}: refused: it holds {what}, no plain network does",
        hint="export the network alone, in eval mode, with torch.export.save",
    )
