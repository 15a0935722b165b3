"""Code in folders of pretrained models does not run, nobody is asked, and pickles of weights hold tensors alone."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from bigmac_lightning.datamodules import MultimodalDataModule
from bigmac_lightning.models import HFDecoder, HFVisionEncoder, LatentCodec, MultimodalLM, VisionEncoder
from tests.models import zoo

MAP = {f"Auto{kind}": "evil.Evil" for kind in ("Config", "ModelForCausalLM", "Model", "Processor", "ImageProcessor")}
CODE = """
open({marker!r}, "w").close()
from transformers import LlamaConfig, LlamaForCausalLM
class Evil(LlamaConfig):
    model_type = "evil"
class EvilModel(LlamaForCausalLM):
    config_class = Evil
"""


class Terminal:
    """Counts questions, as the library catches whatever is raised here."""

    asked = 0

    def readline(self, *args: Any) -> str:
        self.asked += 1
        return "n\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "stdin", Terminal())
    zoo.save("llama", tmp_path)
    (tmp_path / "llama" / "evil.py").write_text(CODE.format(marker=str(tmp_path / "it ran")))
    return tmp_path / "llama"


def change(folder: Path, name: str, **entries: Any) -> None:
    path = folder / name
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**old, "auto_map": {**MAP, "AutoTokenizer": ["evil.Evil", "evil.Evil"]}, **entries}))


PLACES: dict[str, tuple[dict[str, dict[str, Any]], Callable[[str], Any]]] = {
    "model": ({"config.json": {"model_type": "evil"}}, MultimodalLM.from_pretrained),
    "decoder": ({"config.json": {"model_type": "evil"}}, HFDecoder),
    "vision": ({"config.json": {"model_type": "evil"}}, HFVisionEncoder),
    "tower": ({"config.json": {"model_type": "evil"}}, lambda path: VisionEncoder(path, 8)),
    "another kind of model": ({"config.json": {"model_type": "siglip_vision_model"}}, HFDecoder),
    "tokenizer": ({"tokenizer_config.json": {}}, lambda path: MultimodalDataModule(processor=path)),
    "processor": ({"processor_config.json": {}}, lambda path: MultimodalDataModule(processor=path)),
    # from this one the library loses the argument trust_remote_code
    "image processor": (
        {"config.json": {"model_type": "qwen2_5_vl"}, "preprocessor_config.json": {"image_processor_type": "X"}},
        lambda path: MultimodalDataModule(processor=path),
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_code_does_not_run(place: str, folder: Path) -> None:
    changes, load = PLACES[place]
    for name, entries in changes.items():
        change(folder, name, **entries)
    with pytest.raises(ValueError, match=r"needs Python code of its own.*set (loading\.)?trust_remote_code=True in"):
        load(str(folder))
    assert isinstance(sys.stdin, Terminal)
    assert sys.stdin.asked == 0
    assert not (folder.parent / "it ran").exists()


def test_code_beside_a_model_that_the_library_has(folder: Path) -> None:
    change(folder, "config.json")
    MultimodalLM.from_pretrained(str(folder)).materialize()
    assert not (folder.parent / "it ran").exists()


def test_code_that_is_trusted(folder: Path) -> None:
    change(folder, "config.json", model_type="evil")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.EvilModel"}
    (folder / "config.json").write_text(json.dumps(config))
    module = MultimodalLM.from_pretrained(str(folder), trust_remote_code=True)
    module.materialize()
    assert (folder.parent / "it ran").exists()
    assert type(module.llm._whole).__name__ == "EvilModel"


# -- weights


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return open, (str(self.marker), "w")


def load(folder: Path) -> MultimodalLM:
    module = MultimodalLM.from_pretrained(str(folder))
    module.materialize()
    return module


def test_pickles_of_weights(folder: Path) -> None:
    expected = load(folder).state_dict()
    state, marker = AutoModelForCausalLM.from_pretrained(folder).state_dict(), folder.parent / "it ran"
    torch.save({"model.norm.weight": Evil(marker)}, folder / "pytorch_model.bin")
    assert load(folder).state_dict().keys() == expected.keys()  # of the safetensors
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"it holds io\.open\. It has no safetensors.*save the model as safetensors"):
        load(folder)
    assert not marker.exists()
    torch.save(state, folder / "pytorch_model.bin")
    for name, tensor in load(folder).state_dict().items():
        assert torch.equal(tensor, expected[name])


def test_weights_of_another_folder(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"names the file '\.\./model\.safetensors', which is not in its folder"):
        load(folder)


def test_adapters_beside_weights(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/elsewhere"}))
    with pytest.raises(ValueError, match="has adapters beside its weights"):
        load(folder)


def test_pickles_of_diffusers(tmp_path: Path) -> None:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=2).save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({"encoder.conv_in.weight": Evil(tmp_path / "it ran")}, tmp_path / "a" / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=r"cannot load .* as a AutoencoderKL: .*It has no safetensors"):
        LatentCodec(str(tmp_path / "a")).materialize()
    assert not (tmp_path / "it ran").exists()
