"""A chat template that writes strings as they are, to be changed in tests."""

from dataclasses import fields, replace
from typing import Any

from bigmac_lightning.datamodules import ChatOptions, PatchProcessor, byte_tokenizer
from bigmac_lightning.datamodules.encoding.chat import ChatEncoder

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chatml(template: str = CHATML, **changes: Any) -> ChatEncoder:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return changed(ChatEncoder(tokenizer, visual=PatchProcessor(patch_size=8, max_rows=4)), **changes)


def changed(encoder: ChatEncoder, **changes: Any) -> ChatEncoder:
    """An encoder with other attributes, or other chat options."""
    names = {field.name for field in fields(ChatOptions)} & changes.keys()
    options = replace(encoder.options, **{name: changes.pop(name) for name in names})
    return replace(encoder, options=options, **changes)
