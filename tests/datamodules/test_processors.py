"""Every family from its folder: what MultimodalDataModule makes of real files against the library's own processor, and
loss and gradients against the library's own model, sample by sample."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from transformers import AutoProcessor

from bigmac_lightning.batch import Batch, MediaData, Microbatch
from bigmac_lightning.datamodules import Example, File, Image, Message, MultimodalDataModule, Source, Video
from bigmac_lightning.datamodules.decoding import measure, read_frames
from bigmac_lightning.datamodules.hf_processor import _metadata
from bigmac_lightning.models import MultimodalLM
from tests.datamodules.examples import clips
from tests.datamodules.processors import PROCESSORS, write_model
from tests.models import zoo
from tests.runtime.test_families import error

FAMILIES = [
    pytest.param(
        name, marks=pytest.mark.skipif(name == "smolvlm" and find_spec("num2words") is None, reason="its own need")
    )
    for name in PROCESSORS
]
VIDEOS = ("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "llava_onevision", "internvl", "smolvlm")


class Given(Source):
    def __init__(self, examples: list[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]


def picture(folder: Path, height: int, width: int) -> Image:
    pixels = torch.randint(256, (height, width, 3), generator=torch.Generator().manual_seed(height), dtype=torch.uint8)
    PIL.Image.fromarray(pixels.numpy()).save(folder / f"{height}.png")
    return Image(File.at(folder / f"{height}.png"))


def said(*parts: Any, reply: str) -> list[Message]:
    return [Message("user", parts), Message("assistant", [reply])]


def examples(name: str, folder: Path) -> list[Example]:
    """Several images of odd sizes in a sample, one image, text alone, images in two turns, and videos."""
    a, b, c, d, e = (picture(folder, *size) for size in ((37, 101), (90, 31), (8, 8), (50, 49), (23, 70)))
    made = [
        Example(said("first ", a, " then ", b, "?", reply="two")),
        Example(said(c, "what is it?", reply="noise")),
        Example([*said("only text", reply="yes"), *said("more", reply="no")]),
        Example([*said(d, "left?", reply="up"), *said("and ", e, reply="down")]),
        Example(said(a, reply="wide")),
    ]
    if name in VIDEOS:
        clip = Video(File.at(clips()[2]))
        made.append(Example(said(clip, "what happens?", reply="much")))
        if name != "smolvlm":  # whose processor forgets images where there is a video
            made.append(Example(said("a ", clip, " and ", b, reply="both")))
    return made


@dataclass
class Case:
    """A family's checkpoint, and examples.

    Attributes:
        whole: the library's own outputs of each example: what its processor makes of it.
    """

    name: str
    folder: Path
    examples: list[Example]
    whole: list[dict[str, Any]]

    def datamodule(self, **changes: Any) -> MultimodalDataModule:
        given: dict[str, Any] = {"token_budget": 900, "microbatches": 2, "cache_dir": self.folder / "cache", **changes}
        made = MultimodalDataModule([Given(self.examples)], processor=str(self.folder), **given)
        assert made.encoder.visual is not None
        object.__setattr__(made.encoder.visual, "max_frames", FRAMES)
        return made

    def batches(self, packed: bool) -> list[Batch]:
        made = self.datamodule(packed=packed)
        made.setup("fit")
        return list(made.loader("train"))


FRAMES = 3


def prepared(processor: Any, example: Example) -> dict[str, Any]:
    """By the library alone: template, pixels and tokens in one call."""
    messages: list[Any] = []
    metadata: list[Any] = []
    for message in example.messages:
        parts: list[Any] = []
        for part in message.parts:
            if isinstance(part, str):
                parts.append({"type": "text", "text": part})
            elif isinstance(part, Image):
                parts.append({"type": "image", "image": PIL.Image.open(part.file.name).convert("RGB")})
            else:
                size = measure(part)
                frames = tuple(int((i + 0.5) * size.frames / FRAMES) for i in range(FRAMES))
                parts.append({"type": "video", "video": read_frames(part.file, size, frames)})
                metadata.append(_metadata(frames, size))
        messages.append({"role": message.role, "content": parts})
    further: dict[str, Any] = {"do_sample_frames": False, "video_metadata": metadata} if metadata else {}
    return dict(
        processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs=further
        )
    )


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    made = examples(name, folder)
    saved = write_model(name, folder)
    processor = AutoProcessor.from_pretrained(saved)
    return Case(name, saved, made, [prepared(processor, example) for example in made])


def numbers(microbatch: Microbatch) -> list[int]:
    """Of the examples in it."""
    return [int(origin.name.split("sample ")[1]) for origin in microbatch.origins]


@pytest.mark.parametrize("packed", [True, False])
def test_against_the_processor(case: Case, packed: bool) -> None:
    """Tokens of each sample, and every pixel."""
    seen = set()
    for batch in case.batches(packed):
        for microbatch in batch.microbatches:
            ids = microbatch.inputs["input_ids"].flatten()
            for i, number in enumerate(numbers(microbatch)):
                seen.add(number)
                origin, out = microbatch.origins[i], case.whole[number]
                assert ids[origin.start : origin.stop].tolist() == out["input_ids"][0].tolist()
                items = [item for item in microbatch.media if item.origin == i]
                assert len(items) == len(case.examples[number].media)
                compare_pixels(case.name, [item.data for item in items], [item.encoder for item in items], out)
    assert seen == set(range(len(case.examples)))


def compare_pixels(name: str, items: list[MediaData | None], encoders: list[str], out: dict[str, Any]) -> None:
    left = {"image": out.get("pixel_values"), "video": out.get("pixel_values_videos", out.get("pixel_values"))}
    if name == "internvl":  # both in one tensor, in their order
        encoders = ["image"] * len(items)
    for kind in ("image", "video"):
        of_kind = [item for item, encoder in zip(items, encoders, strict=True) if encoder == kind]
        expected: Any = left[kind]
        for i, item in enumerate(of_kind):
            assert item is not None
            pixels = item if isinstance(item, torch.Tensor) else item["pixel_values"]
            if name.startswith("qwen"):
                pixels = pixels.flatten(0, 2)
                found, expected = expected[: len(pixels)], expected[len(pixels) :]
            elif name == "llava_onevision":
                found = expected[i, : len(pixels)]
            elif name == "mistral3":
                found = expected[i : i + 1, :, : pixels.shape[-2], : pixels.shape[-1]]
            else:
                expected = expected.flatten(0, 1) if expected.ndim == 5 else expected
                found, expected = expected[: len(pixels)], expected[len(pixels) :]
            assert torch.equal(pixels, found)
            if isinstance(item, dict):
                assert item["image_sizes"].tolist() == out["image_sizes"][i].tolist()


def reference(case: Case, batches: list[Batch], dtype: torch.dtype) -> tuple[float, dict[str, Any], dict[str, str]]:
    """Loss and gradients of the library's model on what its processor makes of each sample alone."""
    whole = zoo.load(case.name, case.folder.parent, dtype)
    total, labels = 0.0, sum(len(microbatch.labels) for batch in batches for microbatch in batch.microbatches)
    for microbatch in (microbatch for batch in batches for microbatch in batch.microbatches):
        for origin, number in zip(microbatch.origins, numbers(microbatch), strict=True):
            out = {
                k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v
                for k, v in case.whole[number].items()
            }
            logits = whole(**out, use_cache=False).logits[0]
            at = microbatch.label_positions
            at = at[(at >= origin.start) & (at < origin.stop)] - origin.start
            loss = torch.nn.functional.cross_entropy(logits[at], out["input_ids"][0, at + 1], reduction="sum") / labels
            loss.backward()
            total += loss.item()
    return total, {name: p.grad for name, p in whole.named_parameters()}, whole.all_tied_weights_keys


@pytest.mark.parametrize("packed", [True, False])
def test_against_the_model(case: Case, packed: bool) -> None:
    if packed and not zoo.MODELS[case.name].packs:
        pytest.skip("is refused")
    batches = case.batches(packed)
    assert any(len(m.origins) > 1 for batch in batches for m in batch.microbatches)
    module = MultimodalLM.from_pretrained(str(case.folder))
    module.configure_model()
    out = module.pipeline(Batch([m for batch in batches for m in batch.microbatches]))
    out.loss.backward()
    loss, expected, tied = reference(case, batches, torch.float32)
    assert out.loss.item() == pytest.approx(loss, rel=1e-6)
    rounding = 0.0
    if case.name != "qwen3_vl_moe":  # experts have no float64
        _, exact, _ = reference(case, batches, torch.float64)
        rounding = max(error(expected[n], exact[n], expected) for n in expected)
        assert rounding < 1e-5
    seen = set()
    for full_name, parameter in module.named_parameters():
        short = full_name.removeprefix("llm.").removeprefix("encoders.image.")
        short = short if short in expected else tied[short]
        seen.add(short)
        found = error(parameter.grad, expected[short], expected)
        assert found <= max(1e-6, 2 * rounding), f"{short}: {found:.1e}"
    assert seen == expected.keys()
