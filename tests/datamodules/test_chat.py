"""Encoding of conversations: which tokens are learnt, where feature rows go, and which conversations are refused."""

from typing import Any

import pytest
import torch

from bigmac_lightning.datamodules import (
    Example,
    ExampleError,
    File,
    Image,
    Message,
    PatchProcessor,
    Size,
    TargetProcessor,
    Video,
    byte_tokenizer,
)
from bigmac_lightning.datamodules.encoding.chat import ChatEncoder
from tests.datamodules.small_templates import changed

VISUAL = PatchProcessor(patch_size=8, max_rows=9, fps=1, max_frames=2)
NOWHERE = File.at("nowhere.png")
SQUARE, WIDE, CLIP = Size(24, 24), Size(8, 32), Size(16, 16, 50, 2.0)


def encoder(**changes: Any) -> ChatEncoder:
    target = TargetProcessor(rows=2, shape=(3, 8, 8))
    return changed(ChatEncoder(byte_tokenizer(), visual=VISUAL, target=target), **changes)


def test_what_the_assistant_says_is_learnt() -> None:
    chat = encoder()
    example = Example(
        [
            Message("system", ["Be nice."]),
            Message("user", ["häé", Image(NOWHERE), "?"]),
            Message("assistant", ["One ä."]),
            Message("user", [Video(NOWHERE), Image(NOWHERE)]),
            Message("assistant", ["Two."]),
        ]
    )
    sample = chat.encode(example, [SQUARE, CLIP, WIDE], "x")
    learnt = [token for token, wanted in zip(sample.tokens, sample.labelled, strict=True) if wanted]
    assert chat.tokenizer.decode(learnt) == "One ä.<|im_end|>Two.<|im_end|>"
    assert [m.rows for m in sample.media] == [9, 2 * 4, 4]
    image, video = (chat.tokenizer.convert_tokens_to_ids(t) for t in ("<|image_pad|>", "<|video_pad|>"))
    for media, token in zip(sample.media, (image, video, image), strict=True):
        assert [sample.tokens[i] for i in media.indices] == [token] * media.rows
    assert list(sample.tokens).count(image) + list(sample.tokens).count(video) == 21
    plain = chat.tokenizer.decode([t for t in sample.tokens if t not in (image, video)])
    assert plain.startswith("<|im_start|>system\nBe nice.<|im_end|>\n<|im_start|>user\nhäé?<|im_end|>\n")


def test_a_target_follows_the_request() -> None:
    chat = encoder()
    sample = chat.encode(Example([Message("user", ["Draw."])], Image(NOWHERE)), [SQUARE], "x")
    (target,) = sample.targets
    assert (target.start, target.rows, target.shape) == (len(sample.tokens) - 2, 2, (3, 8, 8))
    assert chat.tokenizer.decode(sample.tokens).endswith("<|im_start|>assistant\n<|draw|><|draw|>")
    assert not any(sample.labelled)
    other = chat.encode(Example([Message("user", ["Draw."])], Image(NOWHERE)), [SQUARE], "y")
    assert other.targets[0].seed != target.seed


@pytest.mark.parametrize(
    ("parts", "changes", "message"),
    [
        ([Image(NOWHERE)], {"visual": None}, "given no processor for them: visual"),
        (["<|image_pad|>"], {"special_tokens": "refuse"}, "has a text with the special tokens <|image_pad|>"),
        ([Image(NOWHERE), "<|video_pad|>"], {"special_tokens": "refuse"}, "the special tokens <|video_pad|>: take"),
        (["<|draw|>"], {"special_tokens": "refuse"}, "has a text with the special tokens <|draw|>: take them out"),
        (
            [Image(NOWHERE)],
            {"tokens": {"image": "<|other|>"}},
            "has image items, but the tokenizer has no token <|other|>: name another in chat.tokens",
        ),
    ],
)
def test_text_and_media_that_do_not_fit(parts: list[Any], changes: dict[str, Any], message: str) -> None:
    sizes = [SQUARE for part in parts if not isinstance(part, str)]
    with pytest.raises(ExampleError) as error:
        encoder(**changes).encode(Example([Message("user", parts)]), sizes, "x")
    assert message in str(error.value)


def test_a_template_for_text_only() -> None:
    chat = encoder(end_of_reply="")
    chat.tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}\n{% endfor %}"
    sample = chat.encode(Example([Message("user", ["a", "b"]), Message("assistant", ["c"])]), [], "x")
    assert chat.tokenizer.decode(sample.tokens) == "user: ab\nassistant: c\n"
    learnt = [token for token, wanted in zip(sample.tokens, sample.labelled, strict=True) if wanted]
    assert chat.tokenizer.decode(learnt) == "assistant: c"  # asked for a reply, it writes no start of one
    sample = chat.encode(Example([Message("user", ["a ", Image(NOWHERE), "?"])]), [SQUARE], "x")
    assert chat.tokenizer.decode(sample.tokens) == "user: a " + 9 * "<|image_pad|>" + "?\n"
    assert (sample.media[0].start, sample.media[0].rows) == (len("user: a "), 9)


def test_a_template_that_starts_replies_otherwise_than_it_asks_for_them() -> None:
    """As LLaVA-OneVision's: what follows the common start is learnt."""
    chat = encoder()
    chat.tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }} \n{{ m.content[0].text }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    turns = [Message("user", ["a"]), Message("assistant", ["b"])] * 2
    sample = chat.encode(Example(turns), [], "x")
    learnt = [token for token, labelled in zip(sample.tokens, sample.labelled, strict=True) if labelled]
    assert chat.tokenizer.decode(learnt) == " \nb<|im_end|>" * 2


def test_templates_that_refuse_or_rewrite() -> None:
    chat = encoder()
    chat.tokenizer.chat_template = "{{ raise_exception('system first') }}"
    with pytest.raises(ExampleError, match=r"refused by the chat template: .*system first"):
        chat.encode(Example([Message("user", ["a"])]), [], "x")
    chat = encoder()
    chat.tokenizer.chat_template = "{% for m in messages %}{% if loop.last %}{{ m.content }}{% endif %}{% endfor %}"
    turns = [Message("user", ["a"]), Message("assistant", ["b"]), Message("user", ["c"]), Message("assistant", ["d"])]
    with pytest.raises(ExampleError, match=r"message 1 \(user\), of which the chat template leaves out text"):
        chat.encode(Example(turns), [], "x")


# -- pictures


@pytest.mark.parametrize("size", [Size(1, 1), Size(1000, 10), Size(10, 1000), Size(640, 480), Size(37, 53)])
def test_rows_are_within_their_limits(size: Size) -> None:
    for least, most in ((1, 1), (4, 16), (100, 300)):
        visual = PatchProcessor(patch_size=16, min_rows=least, max_rows=most)
        plan = visual.plan(Image(NOWHERE), size)
        assert least <= plan.rows <= most
        assert (plan.height // 16) * (plan.width // 16) == plan.rows


def test_aspect_ratio_and_resolution_are_kept_if_possible() -> None:
    plan = PatchProcessor(patch_size=16, max_rows=2000).plan(Image(NOWHERE), Size(320, 640))
    assert (plan.height, plan.width) == (320, 640)
    plan = PatchProcessor(patch_size=16, max_rows=200).plan(Image(NOWHERE), Size(320, 640))
    assert (plan.height, plan.width) == (160, 320)


def test_videos_keep_to_their_budgets() -> None:
    visual = PatchProcessor(patch_size=16, max_rows=100, fps=2, max_frames=20, max_video_rows=600)
    short = visual.plan(Video(NOWHERE), Size(160, 160, 75, 3.0))
    assert len(short.frames) == 6
    assert short.rows == 600
    long = visual.plan(Video(NOWHERE), Size(160, 160, 25 * 3600, 3600.0))
    assert len(long.frames) == 20
    assert long.rows <= 600
    assert long.frames == tuple(sorted(set(long.frames)))
    assert long.frames[-1] < 25 * 3600
    assert visual.plan(Video(NOWHERE), Size(160, 160, 1, 0.04)).frames == (0,)


def test_augmentation_depends_on_seed_epoch_and_sample_alone(tmp_path: Any) -> None:
    import PIL.Image
    from torchvision.transforms import v2

    pixels = torch.randint(256, (24, 24, 3), dtype=torch.uint8)
    PIL.Image.fromarray(pixels.numpy()).save(tmp_path / "a.png")
    example = Example([Message("user", [Image(File.at(tmp_path / "a.png"))])])

    def drawn(seed: int, *draw: object) -> torch.Tensor:
        chat = encoder(augment=(v2.RandomCrop(16), v2.ColorJitter(0.5)), seed=seed)
        return chat.encode(example, [SQUARE], "x", draw or None).media[0].load()

    before = torch.random.get_rng_state()
    assert torch.equal(drawn(0, 1, 2, 3), drawn(0, 1, 2, 3))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not torch.equal(drawn(0, 1, 2, 3), drawn(0, 2, 2, 3))
    assert not torch.equal(drawn(0, 1, 2, 3), drawn(1, 1, 2, 3))
    assert not torch.equal(drawn(0, 1, 2, 3), drawn(0, 1, 2, 4))
    plain = drawn(0)
    assert plain.shape == (3, 24, 24)
    assert torch.equal(plain, (pixels.permute(2, 0, 1).float() / 255 - 0.5) / 0.5)
