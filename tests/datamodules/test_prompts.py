"""What a trained model is given to reply to is what it was trained on: every template that there is, and plain text."""

import io
from dataclasses import replace
from functools import partial
from typing import Any

import PIL.Image
import pytest
import torch

from bigmac_lightning.datamodules import (
    ChatOptions,
    DigitsDataModule,
    Example,
    ExampleError,
    File,
    Image,
    Message,
    MultimodalDataModule,
    PatchProcessor,
    Size,
    TargetProcessor,
    Video,
)
from bigmac_lightning.datamodules.encoding.chat import ChatEncoder
from tests.datamodules import chat_table
from tests.datamodules.processors import PROCESSORS

TEMPLATES = [*chat_table.sources(), *(f"processor {name}" for name in PROCESSORS)]
BEGUN = {
    # what templates put before a reply if they are asked for one, and otherwise only before some replies
    "": ("", "<think>\n", "<think>\n\n</think>\n\n", "\n</think>\n\n", "<｜Assistant｜><think>\n"),
    # what they put there, and mark as a part of the reply
    "qwen2_5_training": ("\n",),
    "muse_glimmer_training": ("<|start|>assistant",),
    "gptoss_training": ("<|start|>assistant",),
    "processor llava_onevision": ("\n",),
    "nemotron": ("", "\n", "<think>\n"),
}
OTHERWISE = ("diffusion_gemma", "diffusion_gemma_training")
"""Templates that write the result of a tool otherwise if they are asked for a reply to it."""


def _encoder(name: str) -> ChatEncoder:
    family = name.removeprefix("processor ")
    return chat_table.of_processor(family) if family != name else chat_table.encoder(name, chat_table.sources()[name])


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prompt_is_what_comes_before_the_reply(name: str) -> None:
    """Its tokens are those before the last reply that is learnt, and the reply ends with a token that ends it."""
    encoder, compared = _encoder(name), 0
    for case, example in chat_table.CASES.items():
        sizes = [Size(8, 8) for _ in example.media]
        try:
            sample = encoder.encode(example, sizes, case)
        except ExampleError:
            continue
        learnt = [i for i, label in enumerate(sample.labelled) if label]
        first = next(i for i in reversed(learnt) if not sample.labelled[i - 1])
        prompt = encoder.prompt(replace(example, messages=example.messages[:-1]), sizes)
        given, before = (encoder.tokenizer.decode(tokens) for tokens in (prompt.tokens, sample.tokens[:first]))
        if case != "tool call" or name not in OTHERWISE:
            assert given.startswith(before), case
            assert given[len(before) :] in chat_table.named(BEGUN, name), f"{case}: {given[len(before) :]!r}"
        assert not any(prompt.labelled)
        assert [item.indices for item in prompt.media] == [item.indices for item in sample.media]
        if name not in ("processor llava", "processor llava_next"):  # these tokenizers have no token </s>
            assert {*sample.tokens[learnt[-1] - 1 : learnt[-1] + 1]} & encoder.reply_ends, case
        compared += 1
    assert compared or "no end" in [chat_table.cell(name, encoder, chat_table.sources()[name], "two turns")]


def _png(height: int, width: int) -> bytes:
    file = io.BytesIO()
    PIL.Image.new("RGB", (width, height), "white").save(file, "PNG")
    return file.getvalue()


def test_special_tokens_of_the_user_are_words() -> None:
    encoder = _encoder("qwen3")
    prompt = encoder.prompt(Example([Message("user", ["hi<|im_end|>"])]), [])
    assert list(prompt.tokens).count(encoder.tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1


def test_nobody_replies_to_the_assistant() -> None:
    with pytest.raises(ExampleError, match="ends with a message of the assistant"):
        _encoder("qwen3").prompt(Example([Message("user", ["a"]), Message("assistant", ["b"])]), [])


def test_a_text_goes_on() -> None:
    """Without the token that ends texts."""
    encoder = _encoder("qwen3")
    whole = encoder.encode(Example.of_text("Once upon"), [], "x")
    prompt = encoder.prompt(Example.of_text("Once upon"), [])
    assert list(prompt.tokens) == list(whole.tokens[:-1])
    assert whole.tokens[-1] in encoder.reply_ends


def test_a_batch_of_a_data_module() -> None:
    """With an image, whose size is found out; with a target, that is to be drawn, whose file is not read."""
    data = MultimodalDataModule(
        visual=PatchProcessor(patch_size=8, max_rows=4),
        target=TargetProcessor(rows=3, shape=(3, 16, 16)),
        chat=ChatOptions(),
    )
    picture = Image(File.lazy("x.png", partial(_png, 8, 16)))
    batch = data.prompt(Example([Message("user", [picture, "like this?"])], Image(File.lazy("none", bytes))))
    [microbatch] = batch.microbatches
    [item], [target] = microbatch.media, microbatch.targets
    assert item.data is not None
    assert item.rows == 2
    assert target.data is None
    assert (target.rows, tuple(target.shape)) == (3, (3, 16, 16))
    assert not microbatch.has_labels
    assert data.reply(data.encoder.tokenizer.encode("Hällo<|im_end|>")) == "Hällo"


@pytest.mark.parametrize(
    ("case", "reference"),
    [
        ("two turns", "<think>\n\n</think>\n\nTwo."),
        ("reasoning, last turn", "<think>\nI count.\n</think>\n\nTwo."),
        ("tool call", "<think>\n\n</think>\n\nIt is sunny."),
    ],
)
def test_a_question_and_its_reply(case: str, reference: str) -> None:
    """The reply is what the template writes, with what is thought, as the model would write it."""
    example, encoder = chat_table.CASES[case], _encoder("qwen3")
    data = MultimodalDataModule(processor=encoder.tokenizer)
    prompt, reply = data.question(example)
    assert reply == reference
    assert prompt.microbatches[0].inputs["input_ids"][0].tolist() == list(
        encoder.prompt(replace(example, messages=example.messages[:-1]), []).tokens
    )


def test_questions_without_a_reply() -> None:
    data = MultimodalDataModule(target=TargetProcessor(rows=3, shape=(3, 16, 16)))
    user = Message("user", ["hi"])
    assert data.question(Example([user]))[1] is None
    assert data.question(Example([user], Image(File.lazy("none", bytes))))[1] is None
    assert data.question(Example.of_text("Once"))[1] is None
    assert data.question(Example.of_completion(["Once "], ["upon"]))[1] == "upon"
    silent = Message("assistant", ["no"], learn=False)
    assert data.question(Example([user, silent]))[1] == "no", "also of replies that are not learnt"
    with pytest.raises(ExampleError, match="which is empty"):
        data.question(Example([user, Message("assistant", [])]))


def test_digits() -> None:
    data = DigitsDataModule()
    picture = Image(File.lazy("x.png", partial(_png, 32, 32)))
    [microbatch] = data.prompt(Example([Message("user", [picture, "which digit is this ?"])])).microbatches
    words: Any = microbatch.media[0].data
    assert words.shape == (1, 8, 8)
    assert words.abs().max() <= 1
    assert torch.equal(microbatch.media_positions, torch.arange(16))
    with pytest.raises(ExampleError, match=r"the words \['hello'\], which the digits' tokenizer does not know"):
        data.prompt(Example([Message("user", ["hello"])]))
    with pytest.raises(ExampleError, match="has a Video: the digits are images and words"):
        data.prompt(Example([Message("user", [Video(File.lazy("x.mp4", bytes))])]))
