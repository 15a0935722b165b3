"""What differs between the vision- and audio-language models of transformers: a table of families, by `model_type`.

A family says how media items become the arguments of its `get_*_features` (see family_items.py), and which inputs its
LLM needs besides. Everything else about these models is treated alike.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig

from bigmac_lightning.contracts.batch import MediaData

from . import family_items as items
from . import family_sounds as sounds
from . import phi4_items, smallest_items
from .family_items import Encode
from .llm.deepstack import FIRST_LAYERS, NAMED_LAYERS, Deepstack
from .llm.image_masks import (
    gemma3_masks,
    gemma4_masks,
    masks_of_all_images,
    masks_of_each_image,
    masks_of_prompts,
)


def _always(config: Any) -> bool:
    return True


def _never(config: Any) -> str:
    return ""


def _phi4_refused(config: Any) -> str:
    if config.embd_pdrop:
        return "embd_pdrop would drop embeddings of text only beside images and sounds: set it to 0 in the config"
    if config.audio_config.chunk_size > 0:
        return (
            "its tower draws at random where chunks of a sound begin: set audio_config.chunk_size to -1 in the config"
        )
    return ""


def _gemma4_sees_both_ways(config: Any) -> bool:
    return config.get_text_config().use_bidirectional_attention == "vision"


@dataclass(frozen=True)
class Family:
    """One kind of vision- or audio-language model.

    Attributes:
        image, video, audio: encodes images, videos, sounds; ``None``: the family takes none.
        deepstack: which layers of the LLM take features of their own, and how; ``None``: none do.
        multimodal_positions: whether rotary positions have temporal, height and width parts (M-RoPE).
        takes_text_positions: whether the LLM takes text positions before these parts, by which it keeps packed samples
            apart.
        sees_prompts: whether all tokens before the first one that is learnt take part in this (PaliGemma).
        adds_features: whether features are added to the embeddings of their tokens, instead of replacing them.
        crosses: whether layers of the LLM attend to features, which replace no embeddings.
        mixes_shapes: whether items of different shapes can be encoded together.
        image_masks: makes masks by which tokens of an image see each other both ways; ``None``: they do not.
        sees_both_ways: says of the model's config whether such masks are used.
        sees_around_images: whether tokens around an image take part in this. Then ``inputs["token_type_ids"]`` has to
            say which tokens these are (Molmo 2).
        alone: whether each patch of an image is encoded alone.
        calls_vary: whether parts of the tower run more often for some images than for others.
        joined: the number of patches, or of frames of a sound, that become a row of features, where no config says it.
        rows: the number of rows of a grid (t, h, w) of patches, where it is not t * h * w / side**2: a function of the
            config, the kind ("image" or "video") and the grid.
        vision_tokens: names of the config's token ids that layers treat as vision (Ernie 4.5 VL has experts for them).
        smallest: makes of the model's config a small item, where that is not pixels or patches alone.
        smallest_sound: makes of the model's config a short sound.
        refused: says of the model's config why it cannot be trained here; "": it can.
    """

    image: Encode | None = None
    video: Encode | None = None
    audio: Encode | None = None
    deepstack: Deepstack | None = None
    multimodal_positions: bool = False
    takes_text_positions: bool = True
    image_masks: Callable[[Any, Tensor, dict[str, Tensor]], Any] | None = None
    sees_both_ways: Callable[[Any], bool] = _always
    sees_around_images: bool = False
    sees_prompts: bool = False
    adds_features: bool = False
    crosses: bool = False
    mixes_shapes: bool = False
    alone: bool = False
    calls_vary: bool = False
    joined: int | None = None
    rows: Callable[[Any, str, Sequence[int]], int] | None = None
    vision_tokens: tuple[str, ...] = ()
    smallest: Callable[[Any], MediaData] | None = None
    smallest_sound: Callable[[Any], MediaData] = smallest_items.sound
    refused: Callable[[Any], str] = _never

    @property
    def own(self) -> Encode:
        """Encodes what the family's tower is for: images, or sounds if it takes no images."""
        encode = self.image or self.audio
        assert encode is not None, "a family takes images or sounds"
        return encode


_QWEN2 = Family(items.patches, items.patches, mixes_shapes=True, multimodal_positions=True)
_QWEN3 = replace(_QWEN2, deepstack=FIRST_LAYERS)
_PATCHES = Family(items.patches, mixes_shapes=True)
_GLM = replace(_PATCHES, multimodal_positions=True)
_OMNI = Family(
    items.patches, items.patches, sounds.sounds(sounds.omni_sound), mixes_shapes=True, multimodal_positions=True
)
_STRIPS = Family(items.strips, items.strips, joined=16, calls_vary=True)
_IDEFICS = Family(items.batched_crops)
_SMOLVLM = Family(items.batched_crops, items.batched_crops)

_VISION_TOKENS = ("start_token_id", "end_token_id", "token_id")

FAMILIES: dict[str, Family] = {
    "qwen2_vl": _QWEN2,
    "qwen2_5_vl": _QWEN2,
    "qwen3_vl": _QWEN3,
    "qwen3_vl_moe": _QWEN3,
    "qwen3_5": _QWEN2,
    "qwen3_5_moe": _QWEN2,
    "glm4v": _GLM,
    "glm4v_moe": _GLM,
    "glm46v": _GLM,
    "glm_ocr": _GLM,
    "glmga": _GLM,
    "paddleocr_vl": replace(_GLM, image=items.square_patches),
    "exaone4_5": replace(_PATCHES, video=items.patches),
    "kimi_k25": replace(_PATCHES, image=items.square_patches),
    "lfm3_vl": _PATCHES,
    "lfm2_vl": Family(items.padded_patches, smallest=smallest_items.tile),
    "aya_vision": Family(items.crops),
    "cohere2_vision": Family(items.crops),
    "llava": Family(items.crops),
    "vipllava": Family(items.crops),
    "deepseek_vl": Family(items.crops),
    "janus": Family(items.crops),
    "got_ocr2": Family(items.crops, joined=16),
    "pp_chart2table": Family(items.crops, joined=16),
    "dots3_note": Family(
        items.patches,
        items.patches,
        sounds.sounds(sounds.chunked_sound, "chunk_sample_lengths"),
        mixes_shapes=True,
        smallest_sound=smallest_items.chunk,
    ),
    "muse_spark": Family(items.patches, items.patches, mixes_shapes=True),
    "nemotron_h_omni": Family(items.flat_patches, mixes_shapes=True, smallest=smallest_items.square_grid),
    "inkling_mm_model": Family(items.patches_alone, joined=1, alone=True, smallest=smallest_items.patch),
    "unlimited_ocr": Family(items.with_local_crops, joined=16, calls_vary=True),
    "qianfan_ocr": Family(items.crops),
    "llava_next": Family(items.cut_into_crops, smallest=smallest_items.crops),
    "llava_onevision": Family(items.any_resolution, items.pooled_video),
    "internvl": Family(items.crops, items.crops),
    "mistral3": Family(items.sized),
    "lighton_ocr": Family(items.sized),
    "idefics2": _IDEFICS,
    "idefics3": _IDEFICS,
    "smolvlm": _SMOLVLM,
    "llava_next_video": Family(items.cut_into_crops, items.pooled_video, smallest=smallest_items.crops),
    "video_llava": Family(items.crops, items.pooled_video),
    "perception_lm": Family(items.batched_crops, items.batched_crops),
    "aria": Family(items.masked, joined=10),
    "deepseek_ocr2": Family(items.with_local_crops, joined=16, calls_vary=True),
    "step3p7": Family(items.with_local_crops, joined=16, calls_vary=True),
    "deepseek_vl_hybrid": Family(items.two_resolutions, smallest=smallest_items.pair),
    "minicpmv4_6": _STRIPS,
    "minicpm_ocr": replace(_STRIPS, joined=4),
    "video_llama_3": Family(items.merged_patches, items.merged_patches, smallest=smallest_items.merged),
    "cohere_compass": _QWEN3,
    "minimax_m3_vl": Family(items.patches, items.patches, mixes_shapes=True),
    "cosmos3_edge": _QWEN2,
    "cosmos3_omni": _QWEN3,
    "muse_glimmer": Family(items.patches, items.patches, mixes_shapes=True),
    "hyperclovax_vision_v2": Family(items.patches, items.patches, mixes_shapes=True),
    "llama4": Family(items.projected_later, joined=4),
    "molmo2": Family(
        items.pooled_patches("image"),
        items.pooled_patches("video"),
        image_masks=masks_of_all_images,
        sees_around_images=True,
        adds_features=True,
        joined=4,
        smallest=smallest_items.pooled,
    ),
    "mllama": Family(items.filled_tiles, crosses=True, smallest=smallest_items.filled),
    "ovis2": Family(items.with_indicators, smallest=smallest_items.indicated),
    "granite_docling": Family(items.tiles, deepstack=FIRST_LAYERS),
    "granite4_vision": Family(items.crops_for_layers, deepstack=NAMED_LAYERS, smallest=smallest_items.crops),
    "hunyuan_vl": replace(_GLM, rows=items.hunyuan_rows, takes_text_positions=False),
    "ernie4_5_vl_moe": replace(
        _QWEN2,
        video=items.video_patches,
        rows=items.ernie_rows,
        vision_tokens=tuple(f"{kind}_{token}" for kind in ("image", "video") for token in _VISION_TOKENS),
    ),
    "qwen2_5_omni_thinker": _OMNI,
    "qwen3_omni_moe_thinker": replace(_OMNI, deepstack=FIRST_LAYERS),
    "qwen2_audio": Family(audio=sounds.sounds(sounds.qwen2_sound), joined=2),
    "audioflamingo3": Family(audio=sounds.sounds(sounds.masked_sound), joined=2),
    "voxtral": Family(audio=sounds.sounds(sounds.sound_windows), joined=4),
    "glmasr": Family(audio=sounds.sounds(sounds.masked_sound), joined=4),
    "qwen3_asr": Family(audio=sounds.sounds(sounds.masked_sound), joined=1),
    "phi4_multimodal": Family(
        phi4_items.phi4_images,
        audio=phi4_items.phi4_sounds,
        joined=4,
        smallest=smallest_items.phi4_image,
        smallest_sound=smallest_items.phi4_sound,
        refused=_phi4_refused,
    ),
    "paligemma": Family(items.crops, image_masks=masks_of_prompts, sees_prompts=True),
    "gemma3": Family(items.crops, image_masks=gemma3_masks),
    "gemma4": Family(
        items.padded_images,
        items.padded_frames,
        image_masks=gemma4_masks,
        sees_both_ways=_gemma4_sees_both_ways,
        smallest=smallest_items.square,
    ),
    "gemma4_unified": Family(
        items.padded_images,
        items.padded_frames,
        sounds.sounds(sounds.framed_sound),
        image_masks=masks_of_each_image,
        sees_both_ways=_gemma4_sees_both_ways,
        alone=True,
        joined=1,
        smallest=smallest_items.place,
        smallest_sound=smallest_items.frame,
    ),
}

"""The families that are exact from pictures to loss; `tests/models/test_sweep.py` compares each of them."""

_CROSS = "its LLM attends to images in cross-attention layers, of which only those of Llama 3.2 Vision are known here"
_TWO_PARTS = "its text has an encoder and a decoder, and stages here are those of a decoder"
_TOKEN_EMBEDDINGS = "its layers take embeddings of the token ids of their own, beside the hidden states"
_WEIGHTS_BESIDE = "its decoder has weights beside embedding, layers and final norm"
_VOCABULARY = "its images become tokens of its vocabulary, so there are no features to train"
_PLACES = "its decoder adds embeddings of places to what it gets, which every stage would do again"
_TALKER = (
    "it is a thinker with a talker. Save its thinker, {0}.from_pretrained(DIR).save_pretrained(OUT), and start from OUT"
)

REFUSED = {
    "blip": _CROSS,
    "idefics": _CROSS,
    "florence2": _TWO_PARTS,
    "pix2struct": _TWO_PARTS,
    "gemma3n": "embeddings of the tokens around its images and sounds belong to its towers; its decoder alone can be "
    "trained, as HFDecoder(config.get_text_config())",
    "qwen4_exp": _TOKEN_EMBEDDINGS,
    "mistral_large4": "its rotary embedding has weights, which all stages would have to share",
    "inkling2": _WEIGHTS_BESIDE,
    "inkling2_loop": _WEIGHTS_BESIDE,
    "hy_v4_vl": _WEIGHTS_BESIDE,
    "glm5_next": "its layers hand on several streams of hidden states, and which tokens attention has chosen",
    "kosmos-2": _PLACES,
    "kosmos-2.5": _PLACES,
    "diffusion_gemma": "it makes whole blocks of text out of noise, and losses here are those of the next token",
    "pp_formulanet": _CROSS,
    "apertus1p5": _VOCABULARY,
    "minicpmv4_7": "its positions depend on where an image's slices lie, which batches here do not say",
    "fast_vlm": "its tower is one of the package timm, with which nothing here has been tested",
    "blip-2": "its LLM is OPT or T5, and neither can be cut",
    "instructblip": "its tower reads the text of the question, which the encoders here do not get",
    "instructblipvideo": "its tower reads the text of the question, which the encoders here do not get",
    "git": "its images come before the text, without tokens that features could replace",
    "chameleon": _VOCABULARY,
    "shieldgemma2": "it classifies images, and writes no text",
    "musicflamingo": "its tower reads the token ids around a sound, which the encoders here do not get",
    "granite_speech": "its LLM has adapters that work only where there are sounds",
    "qwen2_5_omni": _TALKER.format("Qwen2_5OmniThinkerForConditionalGeneration"),
    "qwen3_omni_moe": _TALKER.format("Qwen3OmniMoeThinkerForConditionalGeneration"),
}


def family_of(config: PreTrainedConfig) -> Family | None:
    """The family of a vision-language model; ``None`` for a model of text alone.

    Raises:
        ValueError: the model cannot be trained in a pipeline; the message says why.
    """
    kind = config.model_type
    if kind in REFUSED:
        raise ValueError(f"model_type {kind!r} cannot be cut into stages: {REFUSED[kind]}")
    if kind not in FAMILIES and "vision_config" not in config.sub_configs:
        return None
    if kind not in FAMILIES:
        raise ValueError(
            f"no vision-language model of model_type {kind!r} is known here; there are {sorted(FAMILIES)}. "
            "Its decoder alone may be one that can be trained, as HFDecoder(config.get_text_config()), with an Encoder "
            "of your own"
        )
    if reason := FAMILIES[kind].refused(config):
        raise ValueError(f"model_type {kind!r} cannot be trained with this config: {reason}")
    return FAMILIES[kind]


def token_of(config: Any, modality: str) -> int | None:
    """The id of the token that features of this modality replace; ``None``: the config names none."""
    part = {"image": "vision_config", "audio": "audio_config"}.get(modality, "")
    places = (config, getattr(config, part, None))
    return next(
        (token for place in places if (token := getattr(place, f"{modality}_token_id", None)) is not None), None
    )
