"""What families are refused for, by name: models, items without a part, and inputs without which positions or masks
would be others."""

import re
from collections import Counter
from random import Random
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from bigmac_lightning.models import HFAudioEncoder, HFDecoder, HFVideoEncoder, HFVisionEncoder, MultimodalLM
from bigmac_lightning.models.families import FAMILIES, REFUSED, family_of
from bigmac_lightning.models.vision.hf_encoders import encoders_of
from bigmac_lightning.runtime.sharding import blocks_of
from tests.models import zoo
from tests.models.more_families import ALL


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.filterwarnings("ignore")  # of configs that are not ours
def test_refused_families(kind: str) -> None:
    assert kind in CONFIG_MAPPING
    assert kind not in FAMILIES
    with pytest.raises(ValueError, match=re.escape(f"{kind!r} cannot be cut into stages: {REFUSED[kind]}")):
        family_of(AutoConfig.for_model(kind))


def test_every_family_is_compared() -> None:
    assert FAMILIES.keys() == {name for name in ALL if name not in zoo.DECODERS}


@pytest.mark.parametrize(
    ("name", "lacks"),
    [
        ("minicpmv4_6", "target_sizes"),
        ("video_llama_3", "merge_sizes"),
        ("molmo2", "image_token_pooling"),
        ("ovis2", "indicators"),
        ("phi4_multimodal", "image_attention_mask"),
        ("deepseek_vl_hybrid", "high_res_pixel_values"),
        ("voxtral", "input_features_mask"),
    ],
)
def test_items_that_lack_a_part(name: str, lacks: str) -> None:
    encoder = HFVisionEncoder(ALL[name].config())
    encoder.materialize()
    item: Any = {"input_features": torch.zeros(1, 8, 24)} if name == "voxtral" else torch.zeros(1, 3, 8, 8)
    with pytest.raises(ValueError, match=f'needs (images|sounds) as .*"{lacks}": ...}}, as its processor makes them'):
        encoder([item])


def test_sounds_for_another_encoder() -> None:
    encoder = HFVisionEncoder(ALL["voxtral"].config())
    sound = {"windows": torch.zeros(1, 8, 24), "frames": torch.arange(4)}
    with pytest.raises(ValueError, match=r"has \['frames', 'windows'\], but .* input_features_mask of a sound"):
        encoder([sound])


@pytest.mark.parametrize("name", FAMILIES)
def test_ranks_with_weights_in_shards_meet(name: str) -> None:
    """Each batch of items calls each block of the tower equally often, or fsdp is refused."""
    draw = ALL[name].draw
    assert draw is not None
    tower = HFVisionEncoder(ALL[name].config(), attn_implementation=ALL[name].attention)
    tower.materialize()
    drawn = [draw(Random(seed)) for seed in range(8)]
    calls: Counter[int] = Counter()
    for number, block in enumerate(blocks_of(tower)):
        block.register_forward_hook(lambda *_, own=number: calls.update([own]))
    seen: dict[str, list[Counter[int]]] = {}
    for kind, encoder in encoders_of(tower).items():
        items: list[Any] = [item.data for item in drawn if item.encoder == kind]
        batches = [[items[i] for i in indices] for indices in encoder.batches(items)] if items else []
        batches += [[item] for item in items]
        for batch in batches if FAMILIES[name].calls_vary else [*batches, [encoder.smallest()]]:
            calls.clear()
            encoder(batch)
            seen.setdefault(kind, []).append(Counter(calls))
    assert all(one == counts[0] for counts in seen.values() for one in counts) != FAMILIES[name].calls_vary


def _inputs(*ids: int) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor([[3, *ids, 4]])}


VIDEO = (zoo.VISION_START, zoo.VIDEO, zoo.VIDEO, zoo.VISION_END)


@pytest.mark.parametrize("name", ["qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"])
def test_videos_of_omni_models(name: str) -> None:
    """Positions of a video depend on its seconds; those of a video with its sound inside are not known here."""
    llm = HFDecoder(ALL[name].config())
    given = {**_inputs(*VIDEO), "video_grid_thw": torch.tensor([[2, 2, 2]])}
    with pytest.raises(ValueError, match=r"needs inputs\['second_per_grid_ts'\], the seconds"):
        llm.prepare(given)
    positions = llm.prepare({**given, "second_per_grid_ts": torch.tensor([0.25])})["position_ids"]
    fraction = 6.25 if name == "qwen3_omni_moe_thinker" else 6.0  # of 25 positions in a second
    assert positions[1, 0, 3] - positions[1, 0, 2] == fraction
    inside = (zoo.VISION_START, zoo.AUDIO_START, zoo.VIDEO, zoo.AUDIO, zoo.VIDEO, zoo.AUDIO_END, zoo.VISION_END)
    with pytest.raises(ValueError, match="the tokens of its sound between those of its frames"):
        llm.prepare({**given, **_inputs(*inside)})


def test_images_that_see_each_other_have_to_be_marked() -> None:
    llm = HFDecoder(ALL["molmo2"].config())
    assert not llm.prepare(_inputs(5, 6))["token_type_ids"].any()
    with pytest.raises(ValueError, match=r"'molmo2' needs inputs\['token_type_ids'\] .*mm_token_type_ids"):
        llm.prepare(_inputs(zoo.VISION_START, zoo.IMAGE, zoo.VISION_END))


def test_models_without_such_media() -> None:
    encoder = HFVisionEncoder(ALL["llava"].config())
    with pytest.raises(ValueError, match="'llava' takes no videos"):
        HFVideoEncoder(encoder)
    with pytest.raises(ValueError, match="'llava' takes no sounds"):
        HFAudioEncoder(encoder)


def test_features_for_layers_that_take_none() -> None:
    tower = HFVisionEncoder(ALL["qwen3_vl"].config())
    with pytest.raises(
        ValueError, match=r"encoders.image makes features for 3 layers .* 'llama' takes them in 0 layer"
    ):
        MultimodalLM(HFDecoder(zoo.MODELS["llama"].config()), {"image": tower})
