"""The processor of every vision-language family, built offline: a byte tokenizer with the family's own special tokens,
a chat template as its checkpoints have, and image sizes that suit the tiny towers of tests/models/zoo.py."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import transformers as hf
from tokenizers import processors

from bigmac_lightning.datamodules import HFVisual, byte_tokenizer
from tests.datamodules.more_processors import more_processors
from tests.models import zoo
from tests.models.more_families import ALL

QWEN_CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif c.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAVA_CHAT = (  # images before the text; no <s>, which the tokenizer adds
    "{% for m in messages %}{{ m.role.upper() + ': ' }}"
    "{% for c in m.content | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for c in m.content | selectattr('type', 'equalto', 'text') %}{{ c.text + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
ONEVISION_CHAT = (  # images before videos before text; a turn starts otherwise than the generation prompt
    "{% for m in messages %}{{ '<|im_start|>' + m.role + ' ' }}"
    "{% for c in m.content | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{% for c in m.content | selectattr('type', 'equalto', 'video') %}{{ '<video>' }}{% endfor %}"
    "{% for c in m.content | selectattr('type', 'equalto', 'text') %}{{ '\n' + c.text }}{% endfor %}"
    "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INTERNVL_CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% for c in m.content %}"
    "{% if c.type == 'image' %}{{ '<IMG_CONTEXT>\n' }}{% elif c.type == 'video' %}{{ '<video>\n' }}"
    "{% else %}{{ c.text }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MISTRAL_CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST]{% for c in m.content %}"
    "{% if c.type == 'image' %}[IMG]{% else %}{{ c.text }}{% endif %}{% endfor %}[/INST]"
    "{% else %}{{ m.content[0].text + eos_token }}{% endif %}{% endfor %}"
)
IDEFICS_CHAT = (
    "<|im_start|>{% for m in messages %}{{ m.role | capitalize }}"
    "{% if m.content[0].type == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}{% for c in m.content %}"
    "{% if c.type == 'text' %}{{ c.text }}{% elif c.type == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
GEMMA_CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) }}\n"
    "{% for c in m.content %}{% if c.type == 'image' %}{{ '<start_of_image>' }}{% else %}{{ c.text | trim }}{% endif %}"
    "{% endfor %}{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
QWEN_TOKENS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
}
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
CROP = {"height": 8, "width": 8}


def tokenizer(chat: str, named: dict[str, str], others: tuple[str, ...] = (), bos: bool = False, **changes: Any) -> Any:
    """Bytes and special tokens.

    Args:
        named: special tokens that are attributes of the tokenizer, too.
        bos: whether "<s>" is put before a text.
    """
    whole = byte_tokenizer().backend_tokenizer
    whole.add_special_tokens([*named.values(), *others, "<s>"])
    if bos:
        whole.post_processor = processors.TemplateProcessing(
            "<s> $A", special_tokens=[("<s>", whole.token_to_id("<s>"))]
        )
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=whole,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        bos_token="<s>",
        extra_special_tokens=named,
        chat_template=chat,
        **changes,
    )


def _qwen2() -> Any:
    whole = _qwen2_5()
    return hf.Qwen2VLProcessor(whole.image_processor, whole.tokenizer, whole.video_processor, chat_template=QWEN_CHAT)


def _qwen2_5() -> Any:
    image = hf.Qwen2VLImageProcessor(patch_size=4, merge_size=2, size={"shortest_edge": 8 * 8, "longest_edge": 32 * 32})
    video = hf.Qwen2VLVideoProcessor(patch_size=4, merge_size=2, size={"shortest_edge": 8 * 8, "longest_edge": 16 * 24})
    return hf.Qwen2_5_VLProcessor(image, tokenizer(QWEN_CHAT, QWEN_TOKENS), video, chat_template=QWEN_CHAT)


def _qwen3() -> Any:
    image = hf.Qwen2VLImageProcessor(patch_size=4, merge_size=2, size={"shortest_edge": 8 * 8, "longest_edge": 32 * 32})
    whole = {"shortest_edge": 2 * 8 * 8, "longest_edge": 4 * 16 * 24}
    video = hf.Qwen3VLVideoProcessor(patch_size=4, merge_size=2, temporal_patch_size=2, size=whole)
    return hf.Qwen3VLProcessor(image, tokenizer(QWEN_CHAT, QWEN_TOKENS), video, chat_template=QWEN_CHAT)


def _llava() -> Any:
    image = hf.CLIPImageProcessor(size={"shortest_edge": 8}, crop_size=CROP)
    words = tokenizer(LLAVA_CHAT, {"image_token": "<image>"}, bos=True)
    return hf.LlavaProcessor(
        image, words, patch_size=2, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=LLAVA_CHAT,
    )  # fmt: skip


def _onevision() -> Any:
    grids = [[8 * i, 8 * j] for i in (1, 2, 3) for j in (1, 2, 3)]
    image = hf.LlavaOnevisionImageProcessor(size=CROP, image_grid_pinpoints=grids)
    video = hf.LlavaOnevisionVideoProcessor(size=CROP)
    words = tokenizer(ONEVISION_CHAT, {"image_token": "<image>", "video_token": "<video>"})
    return hf.LlavaOnevisionProcessor(
        image, words, video, num_image_tokens=16, vision_feature_select_strategy="full",
        chat_template=ONEVISION_CHAT, vision_aspect_ratio="anyres_max_4",
    )  # fmt: skip


def _internvl() -> Any:
    image = hf.GotOcr2ImageProcessor(size=CROP, crop_to_patches=True, max_patches=6)
    video = hf.InternVLVideoProcessor(size=CROP)
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    return hf.InternVLProcessor(
        image, tokenizer(INTERNVL_CHAT, named), video, image_seq_length=4, chat_template=INTERNVL_CHAT
    )


def _mistral3() -> Any:
    image = hf.PixtralImageProcessor(patch_size={"height": 2, "width": 2}, size={"longest_edge": 16})
    words = tokenizer(MISTRAL_CHAT, {}, ("[IMG]", "[IMG_BREAK]", "[IMG_END]", "[INST]", "[/INST]"), bos=True)
    return hf.PixtralProcessor(image, words, patch_size=2, spatial_merge_size=2, chat_template=MISTRAL_CHAT)


def _idefics3() -> Any:
    image = hf.Idefics3ImageProcessor(size={"longest_edge": 24}, max_image_size={"longest_edge": 8}, **HALF)
    return hf.Idefics3Processor(image, idefics_tokenizer(), image_seq_len=4, chat_template=IDEFICS_CHAT)


def _smolvlm() -> Any:
    image = hf.SmolVLMImageProcessor(size={"longest_edge": 24}, max_image_size={"longest_edge": 8}, **HALF)
    video = hf.SmolVLMVideoProcessor(size={"longest_edge": 16}, max_image_size={"longest_edge": 8}, fps=1, num_frames=8)
    return hf.SmolVLMProcessor(image, idefics_tokenizer(), video, image_seq_len=4, chat_template=IDEFICS_CHAT)


def idefics_tokenizer() -> Any:
    places = (f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7))
    named = {
        "image_token": "<image>",
        "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>",
    }
    return tokenizer(IDEFICS_CHAT, named, tuple(places))


def _gemma3() -> Any:
    named = {
        "image_token": "<image_soft_token>",
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
    }
    words = tokenizer(GEMMA_CHAT, named, ("<start_of_turn>", "<end_of_turn>"), bos=True)
    image = hf.Gemma3ImageProcessor(size=CROP)
    return hf.Gemma3Processor(image, words, image_seq_length=4, chat_template=GEMMA_CHAT)


def _lfm2() -> Any:
    named = {
        "image_token": "<image>",
        "image_start_token": "<|image_start|>",
        "image_end_token": "<|image_end|>",
        "image_thumbnail_token": "<|img_thumbnail|>",
    }
    words = tokenizer(INTERNVL_CHAT.replace("<IMG_CONTEXT>", "<image>"), named)
    image = hf.Lfm2VlImageProcessor(
        tile_size=16, encoder_patch_size=2, min_image_tokens=2, max_image_tokens=16, max_num_patches=64, max_tiles=2,
        max_pixels_tolerance=2.0,
    )  # fmt: skip
    return hf.Lfm2VlProcessor(image, words, chat_template=words.chat_template)


def _llava_next() -> Any:
    image = hf.LlavaNextImageProcessor(
        size={"shortest_edge": 8}, crop_size=CROP, image_grid_pinpoints=[[8, 16], [16, 8], [16, 16]]
    )
    words = tokenizer(LLAVA_CHAT, {"image_token": "<image>"}, bos=True)
    return hf.LlavaNextProcessor(
        image, words, patch_size=2, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=LLAVA_CHAT,
    )  # fmt: skip


def _gemma4(kind: str = "Gemma4") -> Any:
    named = {
        "image_token": "<|image|>",
        "boi_token": "<|image>",
        "eoi_token": "<image|>",
        "audio_token": "<|audio|>",
        "boa_token": "<|audio>",
        "eoa_token": "<audio|>",
    }
    chat = GEMMA_CHAT.replace(
        "{{ '<start_of_image>' }}", "{{ '<|image|>' }}{% elif c.type == 'video' %}{{ '<|video|>' }}"
    )
    words = tokenizer(chat, named, ("<start_of_turn>", "<end_of_turn>"), bos=True)
    sizes = {"patch_size": 4 if kind == "Gemma4" else 2, "max_soft_tokens": 70, "pooling_kernel_size": 2}
    sound = getattr(hf, f"{kind}AudioFeatureExtractor")()
    image, video = (getattr(hf, f"{kind}{part}Processor")(**sizes) for part in ("Image", "Video"))
    return getattr(hf, f"{kind}Processor")(sound, image, words, video, chat_template=chat)


MORE = {**more_processors(tokenizer), "gemma4_unified": partial(_gemma4, "Gemma4Unified")}

PROCESSORS: dict[str, Callable[[], Any]] = {
    "qwen2_vl": _qwen2,
    "qwen2_5_vl": _qwen2_5,
    "qwen3_vl": _qwen3,
    "qwen3_vl_moe": _qwen3,
    "llava": _llava,
    "llava_onevision": _onevision,
    "internvl": _internvl,
    "mistral3": _mistral3,
    "idefics3": _idefics3,
    "smolvlm": _smolvlm,
    "gemma3": _gemma3,
    "gemma4": _gemma4,
    "llava_next": _llava_next,
    "lfm2_vl": _lfm2,
}
ALL_PROCESSORS = {**PROCESSORS, **MORE}
"""Those of further families, too, whose chat templates are not compared one by one."""


def write_model(name: str, folder: Path, **changes: Any) -> Path:
    """A checkpoint of a tiny model with its processor.

    Args:
        changes: attributes of the processor.
    """
    processor = ALL_PROCESSORS[name]()
    for attribute, value in changes.items():
        setattr(processor, attribute, value)
    config = ALL[name].config()
    text = config.get_text_config()
    text.vocab_size = -(-len(processor.tokenizer) // 8) * 8
    text.max_position_embeddings = 4096
    if name == "gemma4":
        text.vocab_size_per_layer_input = text.vocab_size
    text.output_router_logits = False  # of whole microbatches, and so not comparable sample by sample
    features = HFVisual(processor).feature_tokens.values()
    for attribute, token in zip(("image_token_id", "video_token_id"), features, strict=False):
        setattr(config, attribute, processor.tokenizer.convert_tokens_to_ids(token))
    for attribute in ("vision_start", "vision_end"):
        if hasattr(config, f"{attribute}_token_id"):
            found = processor.tokenizer.convert_tokens_to_ids(f"<|{attribute}|>")
            setattr(config, f"{attribute}_token_id", found)
    if hasattr(config, "image_grid_pinpoints"):
        config.image_grid_pinpoints = processor.image_processor.image_grid_pinpoints
    if name == "llava_onevision":
        config.vision_aspect_ratio = processor.vision_aspect_ratio
    zoo.save(name, folder, config)
    processor.save_pretrained(folder / name)
    return folder / name
