"""Models in the Hugging Face layout: a folder, or an id on the hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from edgebudget import safe_files
from edgebudget.load_model import LoadedModel, module_digest, module_program
from edgebudget.program import TensorSpec
from edgebudget_runtime.errors import ArtifactError, UnsupportedError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

# Architecture suffix -> (loader of transformers, the model's input)
_FAMILIES: Mapping[str, tuple[str, str]] = {
    "ForImageClassification": ("AutoModelForImageClassification", "pixel_values"),
    "ForSemanticSegmentation": ("AutoModelForSemanticSegmentation", "pixel_values"),
    "ForDepthEstimation": ("AutoModelForDepthEstimation", "pixel_values"),
    "ForSequenceClassification": ("AutoModelForSequenceClassification", "input_ids"),
    "ForTokenClassification": ("AutoModelForTokenClassification", "input_ids"),
    "ForCausalLM": ("AutoModelForCausalLM", "input_ids"),
    "LMHeadModel": ("AutoModelForCausalLM", "input_ids"),
}
_RESAMPLE = {0: "nearest", 2: "bilinear", 3: "bicubic"}
_DEFAULT_TOKENS = 128


class PlainOutput(torch.nn.Module):
    """A transformers model that takes one tensor and returns its main output as a tensor."""

    def __init__(self, model: torch.nn.Module, argument: str, *, output: str, cached: bool) -> None:
        super().__init__()
        self.model, self.argument, self.output = model, argument, output
        self.extra = {"use_cache": False} if cached else {}

    def forward(self, x: Tensor) -> Tensor:
        """The model's logits (or depth) for one batch of pictures or token ids."""
        answer = self.model(**{self.argument: x}, **self.extra, return_dict=True)
        value: Tensor = answer[self.output]
        return value


def load_folder(folder: Path, input_shape: tuple[int, ...] | None) -> LoadedModel:
    """Load a folder with `config.json` and safetensors weights; nothing is downloaded.

    Raises:
        UsageError: EB160 no config.json, EB164 input shape.
        UnsupportedError: EB251, transformers is missing or the architecture is not known.
        ArtifactError: EB540 pickled weights, EB541 corrupt, EB542 missing weights, EB543 NaN.
    """
    config = _config(folder)
    architecture = str((config.get("architectures") or ["?"])[0])
    suffix = next((s for s in _FAMILIES if architecture.endswith(s)), None)
    if suffix is None:
        raise UnsupportedError(
            "EB251",
            f"{folder}: architecture {architecture} is not one edgebudget can load",
            hint=f"known endings: {', '.join(_FAMILIES)}; or wrap it: file.py:function",
        )
    _check_weights(folder)
    loader, argument = _FAMILIES[suffix]
    module = PlainOutput(
        _pretrained(folder, loader),
        argument,
        output="predicted_depth" if suffix == "ForDepthEstimation" else "logits",
        cached="CausalLM" in loader,
    )
    safe_files.require_finite(module.state_dict().items(), str(folder))
    described = _read(folder / "preprocessor_config.json")
    preprocessing = _preprocessing(described) if argument == "pixel_values" else {}
    spec = _input(argument, config, preprocessing, input_shape)
    program, outputs = module_program(module, (spec,), str(folder))
    return LoadedModel(
        name=folder.resolve().name,
        program=program,
        output_shapes=outputs,
        digest=module_digest(module, json.dumps(config, sort_keys=True)),
        preprocessing=preprocessing,
    )


def load_hub(name: str, input_shape: tuple[int, ...] | None) -> LoadedModel:
    """Load `org/name`: from the local cache, or from the hub where there is a network.

    Raises:
        UnsupportedError: EB250, it is not on this machine and cannot be fetched, or
            transformers is missing.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError as e:
        raise _no_transformers(name) from e
    try:
        folder = snapshot_download(name, allow_patterns=["*.json", "*.safetensors"])
    except Exception as e:  # the hub's client lets its own and its transport's errors through
        raise UnsupportedError(
            "EB250",
            f"{name} is not on this machine and the hub cannot be reached ({type(e).__name__})",
            hint="download it elsewhere and give its folder, or take one of `edgebudget models`",
        ) from e
    return load_folder(Path(folder), input_shape)


def _config(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").is_file():
        raise UsageError(
            "EB160",
            f"{folder} is neither an artifact (no manifest.json) nor a Hugging Face model "
            "(no config.json)",
            hint="give an artifact, a folder saved by save_pretrained, an .onnx, .pt2 or "
            "file.py:function",
        )
    config = _read(folder / "config.json")
    if config.get("auto_map"):
        raise UnsupportedError(
            "EB251",
            f"{folder}: this model brings its own code, which is not run",
            hint="load it yourself in a function: file.py:function",
        )
    return config


def _check_weights(folder: Path) -> None:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
        if pickles:
            safe_files.refuse_pickle(pickles[0])
        raise ArtifactError(
            "EB542", f"{folder} holds no model.safetensors", hint="save it with save_pretrained"
        )
    for file in files:
        safe_files.check_file(file)


def _pretrained(folder: Path, loader: str) -> torch.nn.Module:
    try:
        import transformers
    except ImportError as e:
        raise _no_transformers(str(folder)) from e
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        model, info = getattr(transformers, loader).from_pretrained(
            str(folder),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            torch_dtype=torch.float32,
            attn_implementation="eager",
        )
    except Exception as e:  # transformers raises a dozen unrelated types
        first = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise UnsupportedError(
            "EB251", f"{folder}: transformers cannot load it: {first}", hint="check config.json"
        ) from e
    finally:
        transformers.logging.set_verbosity(verbosity)
    absent = sorted([*info["missing_keys"], *(str(k[0]) for k in info["mismatched_keys"])])
    if absent:
        raise ArtifactError(
            "EB542",
            f"{folder}: {len(absent)} weights are missing or mis-shaped ({', '.join(absent[:3])})",
            hint="they would be random: use a checkpoint that was fine-tuned for this task",
        )
    found: torch.nn.Module = model
    return found


def _input(
    argument: str,
    config: Mapping[str, Any],
    preprocessing: Mapping[str, Any],
    given: tuple[int, ...] | None,
) -> TensorSpec:
    if argument == "input_ids":
        return TensorSpec(argument, given or (1, _DEFAULT_TOKENS), "int64")
    size = preprocessing.get("size") or _pair(config.get("image_size") or 224)
    shape = (1, int(config.get("num_channels") or 3), *size)
    return TensorSpec(argument, given or shape)


def _preprocessing(processor: Mapping[str, Any]) -> dict[str, Any]:
    """A processor's description in the manifest's words."""
    if not processor:
        return {}
    crop = bool(processor.get("do_center_crop", False)) and "crop_size" in processor
    size = processor.get("size")
    factor = float(processor.get("rescale_factor", 1 / 255))
    high = round(factor * 255, 6) if processor.get("do_rescale", True) else 255.0
    found: dict[str, Any] = {"layout": "NCHW", "color": "RGB", "range": [0.0, high]}
    if processor.get("do_normalize", True) and "image_mean" in processor:
        found["mean"], found["std"] = processor["image_mean"], processor["image_std"]
    found["filter"] = _RESAMPLE.get(processor.get("resample", 2), "bilinear")
    if crop:
        found["size"], found["resize"] = _pair(processor["crop_size"]), "shorter"
        if isinstance(size, Mapping) and "shortest_edge" in size:
            found["shorter_side"] = int(size["shortest_edge"])
        elif isinstance(size, int):
            found["shorter_side"] = size
    elif size is not None:
        shorter = isinstance(size, Mapping) and "shortest_edge" in size
        found["size"], found["resize"] = _pair(size), "shorter" if shorter else "stretch"
    return found


def _pair(size: Any) -> list[int]:
    """[height, width] of a size in any of the processors' spellings."""
    if isinstance(size, Mapping):
        if "shortest_edge" in size:
            return [int(size["shortest_edge"])] * 2
        return [int(size["height"]), int(size["width"])]
    if isinstance(size, (list, tuple)):
        return [int(size[0]), int(size[-1])]
    return [int(size), int(size)]


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as e:
        raise ArtifactError("EB541", f"{path} is not JSON", hint="save the model again") from e
    return found if isinstance(found, dict) else {}


def _no_transformers(name: str) -> UnsupportedError:
    return UnsupportedError(
        "EB251",
        f"{name}: Hugging Face models need transformers",
        hint="pip install 'edgebudget[hf]'",
    )
