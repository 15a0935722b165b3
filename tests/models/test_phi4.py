"""Phi-4-multimodal: its towers lie inside its decoder, and how it projects a sound depends on the images beside it.
`sweep.py` compares loss and gradients, also of packed rows."""

import re
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

from bigmac_lightning.contracts.batch import Batch, PipelineLayout
from bigmac_lightning.models import HFAudioEncoder, HFDecoder, HFVisionEncoder, MultimodalLM, meta_model
from bigmac_lightning.models.export import export
from bigmac_lightning.models.families import family_of
from tests.blocks import block_with
from tests.models import zoo
from tests.models.further_families import phi4
from tests.models.more_families import MORE

NAME = "phi4_multimodal"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    zoo.save(NAME, tmp_path)
    return tmp_path / NAME


def sample(*kinds: str) -> zoo.Sequence:
    """Random words around items of these kinds."""
    random, tokens, items = Random(len(kinds)), [5, 6, 7], list[zoo.Picture]()
    for kind in kinds:
        items.append(next(item for item in iter(partial(phi4, random), None) if item.encoder == kind))
        tokens += [*[items[-1].token] * items[-1].rows, random.randrange(3, zoo.SPECIAL), 7]
    return zoo.with_neighbours(zoo.Sequence(tokens, items))


def test_a_batch_of_all_kinds_of_samples(folder: Path) -> None:
    """Each is what the library makes of it alone: with sounds, with images, with both, and without media."""
    samples = [sample("audio", "audio"), sample("image"), sample("image", "audio"), sample("audio", "image"), sample()]
    module = MultimodalLM.from_pretrained(str(folder))
    module.configure_model()
    loss = module.pipeline(Batch([zoo.microbatch([[one] for one in samples])], PipelineLayout())).loss
    whole, losses, count = zoo.load(NAME, folder.parent), list[torch.Tensor](), 0
    for one in samples:
        given = zoo.microbatch([[one]])
        logits = zoo.forward(whole, one, given).logits.flatten(0, 1)[given.label_positions]
        losses.append(cross_entropy(logits, given.labels, reduction="sum"))
        count += len(given.labels)
    assert loss.item() == pytest.approx(torch.stack(losses).sum().item() / count, rel=1e-6)


def test_rows_of_many_patches_are_counted_in_bfloat16() -> None:
    """It has no number 259."""
    encoder = HFVisionEncoder(MORE[NAME].config(), dtype="bfloat16")
    encoder.materialize()
    crops, ones = torch.zeros(131, 3, 8, 8).bfloat16(), torch.ones(131, 4, 4).bfloat16()
    ones[-1, :, 2:] = 0
    made = encoder([{"pixel_values": crops, "image_sizes": torch.tensor([8, 1040]), "image_attention_mask": ones}])
    assert made.shape == (2 * (259 + 1) + 1 + 2 * (2 + 1), encoder.width)


def test_sounds_take_masks_whatever_the_attention() -> None:
    """Their tower adds numbers to scores, which other implementations do not take."""
    config: Any = meta_model.build_on_meta(MORE[NAME].config(), "paged|eager").config
    assert (config._attn_implementation, config.audio_config._attn_implementation) == ("paged|eager", "sdpa")


def test_parts_read_their_own_weights(folder: Path) -> None:
    """Tensors of other parts may even be missing."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    layers, towers = (
        {name: tensor for name, tensor in tensors.items() if re.match(pattern, name)}
        for pattern in (r"model\.layers\.[12]\.", r"model\.embed_tokens_extend\.")
    )
    llm, tower = HFDecoder(str(folder), weights=str(folder)), HFVisionEncoder(str(folder), weights=str(folder))
    save_file(layers, path, {"format": "pt"})
    llm.materialize([1, 2], embedding=False, head=False)
    save_file(towers, path, {"format": "pt"})
    tower.materialize()
    for part, expected in ((llm, layers), (tower, towers)):
        found = part.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    whole = MultimodalLM(llm, {"image": tower, "audio": HFAudioEncoder(tower)})
    assert len(dict(whole.named_parameters())) == len(list(llm.parameters())) + len(list(tower.parameters()))


def test_an_exported_model_is_the_same(folder: Path, tmp_path: Path) -> None:
    module = MultimodalLM.from_pretrained(str(folder), freeze=["encoders"])
    module.configure_model()
    assert not any(parameter.requires_grad for parameter in module.encoders.parameters())
    others = export(module.state_dict(), MORE[NAME].config().to_dict(), folder, tmp_path / "out")
    assert not others
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert isinstance(hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out"), hf.Phi4MultimodalForCausalLM)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # which peft asks for
def test_adapters_of_a_checkpoint_are_put_into_its_weights(folder: Path, tmp_path: Path) -> None:
    layers = r".*layers\.\d+\.(self_attn\.qkv_proj|mlp\.down_proj)"
    options = LoraConfig(r=2, target_modules=layers, init_lora_weights=False)
    adapted = get_peft_model(zoo.load(NAME, tmp_path), options)
    adapted.save_pretrained(str(folder / "vision-lora"))
    exec(block_with("docs/models.md", "merge_and_unload"), {"CHECKPOINT": str(folder), "OUT": str(tmp_path / "out")})
    module = MultimodalLM.from_pretrained(str(tmp_path / "out"))
    module.configure_model()
    ids = torch.tensor([[3, 5, 7]])
    given = Batch([zoo.microbatch([[zoo.Sequence(ids[0].tolist(), [])]])], PipelineLayout())
    expected = cross_entropy(adapted(input_ids=ids).logits[0, :-1], ids[0, 1:])
    assert module.pipeline(given).loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_what_is_refused() -> None:
    config: Any = MORE[NAME].config()
    config.audio_config.chunk_size = 4
    with pytest.raises(ValueError, match=r"where chunks of a sound begin: set audio_config\.chunk_size to -1"):
        family_of(config)
    config.embd_pdrop = 0.1
    with pytest.raises(ValueError, match="embd_pdrop would drop embeddings of text only beside images and sounds"):
        family_of(config)
    encoder = HFAudioEncoder(HFVisionEncoder(MORE[NAME].config()))
    with pytest.raises(ValueError, match=r'"beside_images": \.\.\.\}, .* the DataModule must say there whether'):
        encoder([{"input_features": torch.zeros(16, 16), "input_features_mask": torch.ones(16)}])
