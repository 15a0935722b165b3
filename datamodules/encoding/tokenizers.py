"""A tokenizer that needs no files: one token per byte, for examples, tests and tiny models.

Knows the transformers library; real models bring a tokenizer of their own.
"""

from typing import Any

from .chat import DRAW, IMAGE, VIDEO

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
