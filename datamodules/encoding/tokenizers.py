"""Tokenizers and processors: those of the transformers library, and one that needs no files, with a token per byte."""

from pathlib import Path
from typing import Any

from ..options import DRAW, IMAGE, VIDEO

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", IMAGE, VIDEO, DRAW)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% for part in m.content %}"
    "{% if part.type == 'image' %}" + IMAGE + "{% elif part.type == 'video' %}" + VIDEO + "{% else %}{{ part.text }}"
    "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer() -> Any:
    """262 tokens: padding ("<|endoftext|>", id 0), those of the chat template and of media, and the 256 bytes.

    Returns: a `PreTrainedTokenizerFast` with a ChatML template.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        chat_template=TEMPLATE,
        model_max_length=1 << 30,
    )


def load_processor(processor: Any) -> tuple[Any, Any]:
    """A fast tokenizer, with a chat template if it has one, and the processor around it if there is one.

    Args:
        processor: a folder or name, a processor, a tokenizer, or "bytes".

    Raises:
        ValueError: the tokenizer is not a fast one.
    """
    from transformers import AutoProcessor, ProcessorMixin

    if processor == "bytes":
        return byte_tokenizer(), None
    if isinstance(processor, str | Path):
        processor = AutoProcessor.from_pretrained(str(processor))  # of a folder without a processor, its tokenizer
    whole: Any = processor if isinstance(processor, ProcessorMixin) else None
    tokenizer: Any = processor if whole is None else whole.tokenizer
    if whole is not None and whole.chat_template:
        tokenizer.chat_template = whole.chat_template
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} must be a fast tokenizer, which tells where its tokens stand")
    return tokenizer, whole
