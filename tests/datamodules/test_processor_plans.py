"""The number of tokens of an image is known from its size alone, with any settings of its processor."""

from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoProcessor

from bigmac_lightning.datamodules import File, HFVisual, Image, MultimodalDataModule, Size
from tests.datamodules.processors import ALL_PROCESSORS, MORE, PROCESSORS, idefics_tokenizer, write_model

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # in GLM's and Ernie's processors


def _changed(name: str, **changes: Any) -> Any:
    processor = PROCESSORS[name]()
    for attribute, value in changes.items():
        setattr(processor.image_processor, attribute, value)
    return processor


def _pan_and_scan() -> Any:
    processor = PROCESSORS["gemma3"]()
    further = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 16}
    processor.images_kwargs = {**processor.images_kwargs, **further}
    return processor


OTHER_TEXT = ("smolvlm", "hunyuan_vl", "qianfan_ocr", "mllama")
"""Processors that want more in a text than image tokens; tests/datamodules/test_hf_visual.py plans with them."""
SETTINGS = {
    "one crop": lambda: _changed("internvl", max_patches=1),
    "many crops": lambda: _changed("internvl", max_patches=12, min_patches=3),
    "no splitting": lambda: _changed("idefics3", do_image_splitting=False),
    "larger": lambda: _changed("idefics3", size={"longest_edge": 48}),
    "as large as it is": lambda: _changed("mistral3", size={"longest_edge": 4096}),
    "not cut to a square": lambda: _changed("llava", do_center_crop=False),
    "pan and scan": _pan_and_scan,
    **{name: ALL_PROCESSORS[name] for name in ALL_PROCESSORS if name not in OTHER_TEXT},
}


@pytest.mark.parametrize(
    "setting", [pytest.param(name, marks=[pytest.mark.wide] * (name in MORE)) for name in SETTINGS]
)
def test_plans_need_no_pixels(setting: str) -> None:
    """For images of any size and shape, whatever a processor is told to do with them."""
    processor = SETTINGS[setting]()
    visual, random = HFVisual(processor), Random(5)
    for number in (1, 2) * 15:
        size = Size(*(int(2 ** random.uniform(4, 7.5)) for _ in range(2)))
        plan = visual.plan(Image(File.at("nowhere")), size, number == 1)
        picture = torch.zeros(3, size.height, size.width, dtype=torch.uint8)
        text = " ".join([processor.image_token] * number)
        out = processor(text=[text], images=[[picture] * number], add_special_tokens=False, return_tensors="pt")
        found = plan.text or processor.image_token * plan.rows
        expected = processor.tokenizer(" ".join([found] * number), add_special_tokens=False)["input_ids"]
        assert out["input_ids"][0].tolist() == expected, size


def test_plans_of_other_settings_are_others(tmp_path: Path) -> None:
    """What was measured with a processor is not taken for what another one makes."""
    prints = set()
    for name, size in (("idefics3", 24), ("idefics3", 16), ("internvl", 8)):
        processor = PROCESSORS[name]()
        processor.image_processor.size = {"longest_edge": size}
        processor.save_pretrained(tmp_path / name)
        prints.add(HFVisual(AutoProcessor.from_pretrained(tmp_path / name)).fingerprint())
    prints |= {HFVisual(PROCESSORS["gemma3"]()).fingerprint(), HFVisual(_pan_and_scan()).fingerprint()}
    assert len(prints) == 5


def test_settings_of_frames_without_a_processor(tmp_path: Path) -> None:
    """The DataModule's processor is taken, as a config cannot give one. The tokens that features replace stay those of
    this processor, which are others than those of the chat template."""
    folder = str(write_model("gemma3", tmp_path))
    given = MultimodalDataModule(processor=folder, visual=HFVisual(max_frames=8)).encoder
    assert isinstance(given.visual, HFVisual)
    assert (given.visual.max_frames, type(given.visual.processor)) == (8, transformers.Gemma3Processor)
    assert given.feature_ids == {"image": given.tokenizer.convert_tokens_to_ids("<image_soft_token>")}
    with pytest.raises(ValueError, match="visual is HFVisual without a processor, and processor='bytes' prepares no"):
        MultimodalDataModule(visual=HFVisual())


def test_a_processor_that_needs_pixels() -> None:
    processor = PROCESSORS["llava"]()
    processor.image_processor = transformers.CLIPImageProcessorPil()
    with pytest.raises(ValueError, match=r"CLIPImageProcessorPil has the backend 'pil'.*backend=\"torchvision\""):
        HFVisual(processor)


class _Sized(transformers.CLIPImageProcessor):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        made = super().__call__(*args, **kwargs)
        made["corners"] = torch.ones(1, 2)
        return made


def test_processors_that_cannot_plan() -> None:
    """Idefics 2's has no text for an item; a processor that makes what no encoder takes is refused, too."""
    words = idefics_tokenizer()
    words.image_boundary_token = words.fake_image_token
    part = transformers.Idefics2ImageProcessor(size={"shortest_edge": 8, "longest_edge": 24})
    image = Image(File.at("nowhere"))
    with pytest.raises(ValueError, match="with Idefics2Processor: it does not say which text stands for"):
        HFVisual(transformers.Idefics2Processor(part, words)).plan(image, Size(24, 40))
    other = PROCESSORS["llava"]()
    other.image_processor = _Sized(**other.image_processor.to_dict())
    with pytest.raises(ValueError, match="LlavaProcessor makes corners of an item, which no encoder here takes"):
        HFVisual(other).plan(image, Size(24, 40))
    numbering = ALL_PROCESSORS["minicpmv4_6"]()
    numbering.image_processor.use_image_id = True
    with pytest.raises(ValueError, match="MiniCPMV4_6Processor numbers the images of a sample"):
        HFVisual(numbering)
