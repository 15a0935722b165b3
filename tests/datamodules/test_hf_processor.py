"""A real processor from a folder: tokens, patches and grids as it makes them itself, planned without pixels."""

from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
import transformers
from transformers import AddedToken, AutoProcessor

from bigmac_lightning.datamodules import (
    Example,
    File,
    HFVisual,
    Image,
    Message,
    MultimodalDataModule,
    Source,
    Video,
    byte_tokenizer,
)
from bigmac_lightning.datamodules.decoding import measure, read_frames
from bigmac_lightning.datamodules.hf_processor import _metadata
from tests.datamodules.examples import clips

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif c.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_processor(folder: Path, kind: str) -> Path:
    """What a model's folder holds besides its weights."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken(t, special=True) for t in ("<|vision_start|>", "<|vision_end|>")])
    limits = {"shortest_edge": 32 * 32, "longest_edge": 96 * 96}
    whole = {"shortest_edge": 32 * 32 * 2, "longest_edge": 64 * 64 * 8}
    if kind == "qwen3_vl":
        image = transformers.Qwen2VLImageProcessor(patch_size=16, merge_size=2, size=limits)
        video = transformers.Qwen3VLVideoProcessor(size=whole)
        made = transformers.Qwen3VLProcessor(image, tokenizer, video, chat_template=CHAT)
    else:
        image = transformers.Qwen2VLImageProcessor(patch_size=14, merge_size=2, size=limits)
        video = transformers.Qwen2VLVideoProcessor(patch_size=14, size=limits)
        made = transformers.Qwen2_5_VLProcessor(image, tokenizer, video, chat_template=CHAT)
    made.save_pretrained(folder)
    return folder


class Given(Source):
    def __init__(self, examples: list[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]


def picture(folder: Path, height: int, width: int) -> File:
    pixels = torch.randint(256, (height, width, 3), generator=torch.Generator().manual_seed(height), dtype=torch.uint8)
    PIL.Image.fromarray(pixels.numpy()).save(folder / f"{height}.png")
    return File.at(folder / f"{height}.png")


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_against_the_processor(kind: str, tmp_path: Path) -> None:
    folder = write_processor(tmp_path / "model", kind)
    files = [picture(tmp_path, 100, 60), picture(tmp_path, 33, 200)]
    clip = File.at(clips()[2])
    examples = [
        Example([Message("user", [Image(files[0]), "what?"]), Message("assistant", ["noise"])]),
        Example([Message("user", ["a ", Image(files[1]), " b ", Video(clip)]), Message("assistant", ["both"])]),
    ]
    made = MultimodalDataModule([Given(examples)], processor=str(folder), token_budget=4096, cache_dir=tmp_path / "c")
    made.microbatches = 1
    made.setup("fit")
    assert isinstance(made.encoder.visual, HFVisual)
    loader = made.loader("train")
    (batch,) = loader
    (microbatch,) = batch.microbatches

    processor: Any = AutoProcessor.from_pretrained(folder)
    order = [int(origin.name.split("sample ")[1]) for origin in microbatch.origins]
    assert sorted(order) == [0, 1]
    ids, pixels, grids = [], [], []
    for index in order:
        example = examples[index]
        messages = [{"role": m.role, "content": [_part(part) for part in m.parts]} for m in example.messages]
        arguments: dict[str, Any] = {}
        images = [item for item in example.media if isinstance(item, Image)]
        opened = [PIL.Image.open(item.file.name).convert("RGB") for item in images]
        for item in example.media:
            if isinstance(item, Video):
                plan = made.encoder.visual.plan(item, measure(item))
                size = measure(item)
                arguments = {
                    "videos": [read_frames(item.file, size, plan.frames)],
                    "video_metadata": [_metadata(plan.frames, size)],
                    "do_sample_frames": False,
                }
        text = processor.apply_chat_template(messages, tokenize=False)
        out = processor(text=[text], images=opened, return_tensors="pt", **arguments)
        ids.append(out["input_ids"][0])
        for part, grid in (("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw")):
            if part in out:
                pixels.append(out[part])
                grids.append((grid, out[grid]))
    assert torch.equal(microbatch.inputs["input_ids"][0], torch.cat(ids))
    assert len(microbatch.media) == 3
    for item, expected in zip(microbatch.media, pixels, strict=True):
        assert item.data is not None
        torch.testing.assert_close(item.data.flatten(0, 2), expected)
    for name in ("image_grid_thw", "video_grid_thw"):
        assert torch.equal(microbatch.inputs[name], torch.cat([grid for kept, grid in grids if kept == name]))
    placeholder = {processor.image_token_id, processor.video_token_id}
    at = microbatch.inputs["input_ids"].flatten()[microbatch.media_positions].tolist()
    assert set(at) == placeholder
    assert len(at) == sum(int(token in placeholder) for token in microbatch.inputs["input_ids"].flatten().tolist())


def _part(part: Any) -> dict[str, str]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return {"type": "image" if isinstance(part, Image) else "video"}


def test_a_tokenizer_without_a_template(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must be a fast tokenizer with a chat template"):
        MultimodalDataModule(processor=str(tmp_path))
