"""The processor of every family that takes sounds, built offline as those of processors.py, with windows of one to
three seconds, and chat templates that work as those of the checkpoints do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers as hf

from tests.datamodules.processors import tokenizer
from tests.models import zoo
from tests.models.more_families import ALL

OMNI_CHAT = (
    "{{% for m in messages %}}{{{{ '<|im_start|>' + m.role + '\n' }}}}{{% for c in m.content %}}"
    "{{% if c.type == 'image' %}}{{{{ '{vision[0]}{image}{vision[1]}' }}}}"
    "{{% elif c.type == 'video' %}}{{{{ '{vision[0]}{video}{vision[1]}' }}}}"
    "{{% elif c.type == 'audio' %}}{{{{ '{sound[0]}{audio}{sound[1]}' }}}}"
    "{{% else %}}{{{{ c.text }}}}{{% endif %}}{{% endfor %}}{{{{ '<|im_end|>\n' }}}}{{% endfor %}}"
    "{{% if add_generation_prompt %}}{{{{ '<|im_start|>assistant\n' }}}}{{% endif %}}"
)
ONE_A_TURN = (  # a sound before the texts, however many there are
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.content | selectattr('type', 'equalto', 'audio') | list %}{{ '<sound>' }}{% endif %}"
    "{% for c in m.content | selectattr('type', 'equalto', 'text') %}{{ c.text }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GLM_CHAT = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' }}{% for c in m.content %}"
    "{% if c.type == 'audio' %}{{ '<|begin_of_audio|><|pad|><|end_of_audio|>' }}{% else %}{{ c.text }}{% endif %}"
    "{% endfor %}{% if m.role == 'assistant' %}{{ '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
ASR_CHAT = (  # all sounds in one turn, without the texts around them
    "{{ '<|im_start|>system\n' }}{% for m in messages if m.role == 'system' %}{{ m.content[0].text }}{% endfor %}"
    "{{ '<|im_end|>\n<|im_start|>user\n' }}{% for m in messages %}"
    "{% for c in m.content | selectattr('type', 'equalto', 'audio') %}"
    "{{ '<|audio_start|><|audio_pad|><|audio_end|>' }}{% endfor %}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% for m in messages if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% generation %}{{ m.content[0].text + '<|im_end|>\n' }}{% endgeneration %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PHI_CHAT = (
    "{{% for m in messages %}}{{{{ '<|' + m.role + '|>' }}}}{{% for c in m.content %}}"
    "{{% if c.type == 'image' %}}{{{{ '{image}' }}}}{{% elif c.type == 'audio' %}}{{{{ '{audio}' }}}}"
    "{{% else %}}{{{{ c.text }}}}{{% endif %}}{{% endfor %}}{{{{ '<|end|>' }}}}{{% endfor %}}"
    "{{% if add_generation_prompt %}}{{{{ '<|assistant|>' }}}}{{% endif %}}"
)
SMALL = {"shortest_edge": 8 * 8, "longest_edge": 16 * 24}
QWEN3 = {"audio_bos_token": "<|audio_start|>", "audio_eos_token": "<|audio_end|>", "audio_token": "<|audio_pad|>"}


def extractor(**changes: Any) -> Any:
    return hf.WhisperFeatureExtractor(
        **{"feature_size": 8, "chunk_length": 1, "return_attention_mask": True, **changes}
    )


def _qwen2_audio() -> Any:
    named = {"audio_token": "<|AUDIO|>", "audio_bos_token": "<|audio_bos|>", "audio_eos_token": "<|audio_eos|>"}
    chat = hf.Qwen2AudioProcessor.default_chat_template.fget(None)  # pyright: ignore
    return hf.Qwen2AudioProcessor(extractor(chunk_length=3), tokenizer(chat, named), chat_template=chat)


def _flamingo() -> Any:
    words = tokenizer(ONE_A_TURN, {}, ("<sound>",))
    return hf.AudioFlamingo3Processor(extractor(), words, chat_template=ONE_A_TURN, max_audio_len=4)


def _glm() -> Any:
    around = ("<|pad|>", "<|begin_of_audio|>", "<|end_of_audio|>", "<|user|>", "<|assistant|>", "<|system|>")
    words = tokenizer(GLM_CHAT, {}, around)
    return hf.GlmAsrProcessor(
        extractor(chunk_length=2), words, chat_template=GLM_CHAT, audio_token="<|pad|>", max_audio_len=4
    )


def _qwen3_asr() -> Any:
    words = tokenizer(ASR_CHAT, QWEN3)
    return hf.Qwen3ASRProcessor(hf.Qwen3ASRFeatureExtractor(feature_size=8), words, chat_template=ASR_CHAT)


def _qwen2_5_omni() -> Any:
    tokens = {"image": "<|IMAGE|>", "video": "<|VIDEO|>", "audio": "<|AUDIO|>"}
    vision, sound = ("<|vision_bos|>", "<|vision_eos|>"), ("<|audio_bos|>", "<|audio_eos|>")
    named = {f"{name}_token": token for name, token in tokens.items()}
    named |= dict(zip(("vision_bos_token", "vision_eos_token"), vision, strict=True))
    named |= dict(zip(("audio_bos_token", "audio_eos_token"), sound, strict=True))
    words = tokenizer(OMNI_CHAT.format(vision=vision, sound=sound, **tokens), named)
    image = hf.Qwen2VLImageProcessor(patch_size=4, merge_size=2, size=SMALL)
    video = hf.Qwen2VLVideoProcessor(patch_size=4, merge_size=2, size=SMALL)
    return hf.Qwen2_5OmniProcessor(image, video, extractor(chunk_length=3), words, chat_template=words.chat_template)


def _qwen3_omni() -> Any:
    tokens = {"image": "<|image_pad|>", "video": "<|video_pad|>", "audio": "<|audio_pad|>"}
    vision, sound = ("<|vision_start|>", "<|vision_end|>"), ("<|audio_start|>", "<|audio_end|>")
    named = {**QWEN3, "image_token": tokens["image"], "video_token": tokens["video"]}
    named |= dict(zip(("vision_bos_token", "vision_eos_token"), vision, strict=True))
    words = tokenizer(OMNI_CHAT.format(vision=vision, sound=sound, **tokens), named)
    image = hf.Qwen2VLImageProcessor(patch_size=4, merge_size=2, size=SMALL)
    video = hf.Qwen2VLVideoProcessor(patch_size=4, merge_size=2, size=SMALL)
    return hf.Qwen3OmniMoeProcessor(image, video, extractor(), words, chat_template=words.chat_template)


def _phi4() -> Any:
    chat = PHI_CHAT.format(image="<|image|>", audio="<|audio|>")
    words = tokenizer(chat, {"image_token": "<|image|>", "audio_token": "<|audio|>"}, ("<|end|>",))
    # the processor counts the rows of a whole picture of 32 * 32 patches, whatever its own size is
    image = hf.Phi4MultimodalImageProcessor(size={"height": 64, "width": 64}, patch_size=2, dynamic_hd=4)
    sound = hf.Phi4MultimodalFeatureExtractor(feature_size=16)
    return hf.Phi4MultimodalProcessor(image, sound, words, chat_template=chat)


SOUND_PROCESSORS: dict[str, Callable[[], Any]] = {
    "qwen2_audio": _qwen2_audio,
    "audioflamingo3": _flamingo,
    "glmasr": _glm,
    "qwen3_asr": _qwen3_asr,
    "qwen2_5_omni_thinker": _qwen2_5_omni,
    "qwen3_omni_moe_thinker": _qwen3_omni,
    "phi4_multimodal": _phi4,
}
POSITIONS = {"qwen2_audio": 150, "audioflamingo3": 50, "qwen2_5_omni_thinker": 150}
"""The frames that a tower has places for: those of a window."""


def write_model(name: str, folder: Path) -> Path:
    """A checkpoint of a tiny model with its processor."""
    processor = SOUND_PROCESSORS[name]()
    config = ALL[name].config()
    text = config.get_text_config()
    text.vocab_size = -(-len(processor.tokenizer) // 8) * 8
    text.max_position_embeddings = 4096
    text.output_router_logits = False
    if name in POSITIONS:
        config.audio_config.max_source_positions = POSITIONS[name]
    ids = processor.tokenizer.convert_tokens_to_ids
    if name == "phi4_multimodal":
        config.vision_config.image_size = config.vision_config.crop_size = 64
        config.vision_config.image_token_id = ids(processor.image_token)
        config.audio_config.audio_token_id = ids(processor.audio_token)
    for kind in ("image", "video", "audio"):
        if token := getattr(processor, f"{kind}_token", None):
            for attribute in (f"{kind}_token_id", f"{kind}_token_index"):
                if hasattr(config, attribute):
                    setattr(config, attribute, ids(token))
    for attribute, names in (
        ("vision_start_token_id", "vision_bos_token"),
        ("vision_end_token_id", "vision_eos_token"),
        ("audio_start_token_id", "audio_bos_token"),
        ("audio_end_token_id", "audio_eos_token"),
    ):
        if hasattr(config, attribute) and hasattr(processor, names):
            setattr(config, attribute, ids(getattr(processor, names)))
    zoo.save(name, folder, config)
    processor.save_pretrained(folder / name)
    return folder / name


def read_processor(folder: Path) -> Any:
    """The processor of a checkpoint. Omni's has a smallest size of videos that is no part of its files."""
    processor = hf.AutoProcessor.from_pretrained(folder)
    if processor.chat_template is None:  # the library forgets that of Phi-4-multimodal's processor
        processor.chat_template = processor.tokenizer.chat_template
    if hasattr(processor, "video_processor"):
        processor.videos_kwargs = {"size": SMALL}
    return processor
