"""Hugging Face folders and ids."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from edgebudget.load_model import load_model
from edgebudget_runtime.errors import ArtifactError, UnsupportedError


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers", reason="Hugging Face models need it")
    folder = tmp_path_factory.mktemp("vit")
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=8,
        num_labels=5,
    )
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    processor = {
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.2, 0.2, 0.1],
        "size": {"height": 16, "width": 16},
        "resample": 2,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def copied(folder: Path, to: Path) -> Path:
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def test_a_hugging_face_folder_gives_plain_logits_and_its_preprocessing(vit: Path) -> None:
    loaded = load_model(str(vit))
    assert loaded.program.inputs[0].shape == (1, 3, 16, 16)
    assert loaded.output_shapes == {"output": (1, 5)}
    assert loaded.preprocessing["mean"] == [0.5, 0.4, 0.3]
    assert loaded.preprocessing["resize"] == "stretch"


def test_faults_of_a_hugging_face_folder(vit: Path, tmp_path: Path) -> None:
    pickled = copied(vit, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(ArtifactError, match="EB540"):
        load_model(str(pickled))
    partial = copied(vit, tmp_path / "partial")
    save_file({"vit.layernorm.bias": torch.zeros(16)}, partial / "model.safetensors")
    with pytest.raises(ArtifactError, match=r"EB54[12]"):
        load_model(str(partial))
    own = copied(vit, tmp_path / "own")
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "m.M"}}))
    with pytest.raises(UnsupportedError, match=r"EB251.*own code"):
        load_model(str(own))
    (own / "config.json").write_text(json.dumps({**config, "architectures": ["ViTForMagic"]}))
    with pytest.raises(UnsupportedError, match=r"EB251.*ViTForMagic"):
        load_model(str(own))


def test_a_hub_id_without_network_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="Hugging Face models need it")

    def unreachable(*_: object, **__: object) -> str:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(hub, "snapshot_download", unreachable)
    with pytest.raises(UnsupportedError, match=r"EB250.*org/net is not on this machine"):
        load_model("org/net")
