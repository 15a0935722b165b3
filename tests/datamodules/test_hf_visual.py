"""Every family from its folder: what MultimodalDataModule makes of real files against the library's own processor, and
loss and gradients against the library's own model, sample by sample."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import PIL.Image
import pytest
import torch
from transformers import AutoProcessor

from bigmac_lightning.contracts.batch import Batch, MediaData, Microbatch, PipelineLayout
from bigmac_lightning.datamodules import (
    ChatOptions,
    Example,
    ExampleError,
    File,
    Image,
    LoadingOptions,
    Message,
    MultimodalDataModule,
    PackingOptions,
    Source,
    Video,
    byte_tokenizer,
)
from bigmac_lightning.datamodules.encoding.hf_visual import _metadata
from bigmac_lightning.datamodules.media.decoding import measure, read_frames
from bigmac_lightning.models import MultimodalLM
from bigmac_lightning.runtime.gradients import reduce_gradients
from bigmac_lightning.runtime.mesh import build_mesh
from bigmac_lightning.schedule.request import ScheduleOptions
from bigmac_lightning.training.options import PipelineOptions
from bigmac_lightning.training.runner import PipelineRunner
from bigmac_lightning.training.stages import part_of
from tests.datamodules.examples import clips
from tests.datamodules.processors import ALL_PROCESSORS, MORE, PROCESSORS, write_model
from tests.models import zoo
from tests.ranks import run_ranks
from tests.runtime.test_families import error
from tests.toy import split_layers
from tests.training.trainers import on_ranks, plain_trainer

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # in GLM's and Ernie's processors
NEEDS = pytest.mark.skipif(find_spec("num2words") is None, reason="needs num2words")
FAMILIES = [
    pytest.param(
        name,
        marks=[NEEDS] * (name == "smolvlm")
        + [pytest.mark.wide] * (name in MORE and name not in ("hunyuan_vl", "mllama")),
    )
    for name in ALL_PROCESSORS
]
VIDEOS = (
    "dots3_note",
    "exaone4_5",
    "ernie4_5_vl_moe",
    "gemma4",
    "gemma4_unified",
    "llava_next_video",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "llava_onevision",
    "internvl",
    "smolvlm",
)


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
        budget = {"lfm2_vl": 240, "gemma4": 300, "gemma4_unified": 300}.get(self.name, 210)
        given: dict[str, Any] = {"token_budget": budget, "microbatches": 8, **changes}
        given["loading"] = LoadingOptions(cache_dir=self.folder / "cache")
        if self.name in ("llava", "llava_next"):  # whose chat template ends no reply
            given["chat"] = ChatOptions(end_of_reply="")
        source = Given(self.examples)
        made = MultimodalDataModule([source], [source], processor=str(self.folder), **given)
        assert made.encoder.visual is not None
        object.__setattr__(made.encoder.visual, "max_frames", FRAMES)
        return made

    def batch(self, layout: PipelineLayout | None = None, **changes: Any) -> Batch:
        """All examples; with the data of the layout's rank."""
        made = self.datamodule(**changes)
        strategy = SimpleNamespace(pipeline_layout=layout or PipelineLayout())
        made.trainer = SimpleNamespace(strategy=strategy, distributed_sampler_kwargs=None)  # pyright: ignore
        made.setup("fit")
        (batch,) = made.loader("train")
        return batch


FRAMES = 3


def shown(part: str | Image) -> dict[str, Any]:
    """A part of a message, as the library wants it."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return {"type": "image", "image": PIL.Image.open(part.file.name).convert("RGB")}


def prepared(processor: Any, example: Example) -> dict[str, Any]:
    """By the library alone: template, pixels and tokens in one call."""
    messages: list[Any] = []
    metadata: list[Any] = []
    for message in example.messages:
        parts: list[Any] = []
        for part in message.parts:
            if isinstance(part, str | Image):
                parts.append(shown(part))
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
    for microbatch in case.batch(packing=PackingOptions(packed=packed)).microbatches:
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
            if f"{kind}_grid_thw" in out:
                pixels, expected = pixels.flatten(0, 2), expected.flatten(1)
                found, expected = expected[: len(pixels)], expected[len(pixels) :]
            elif "aspect_ratio_ids" in out:
                assert isinstance(item, dict)
                found = expected[0, i]
                assert all(torch.equal(value, out[part][0, i]) for part, value in item.items())
            elif expected.ndim == 5 and "image_sizes" in out and kind == "image":
                found = expected[i, : len(pixels)]
            elif name == "minicpmv4_6":  # of all slices one after another
                found, expected = expected[..., : pixels.shape[-1]], expected[..., pixels.shape[-1] :]
            elif name in ("mistral3", "lighton_ocr"):
                found = expected[i : i + 1, :, : pixels.shape[-2], : pixels.shape[-1]]
            elif name.startswith("gemma4"):
                assert isinstance(item, dict)
                pixels, places = (item[part] for part in ("pixel_values", "image_position_ids"))
                pixels, places = (part if kind == "video" else part[None] for part in (pixels, places))
                found, expected = expected[: len(pixels)], expected[len(pixels) :]
                assert torch.equal(places, out[f"{kind}_position_ids"][: len(pixels)])
                out = {**out, f"{kind}_position_ids": out[f"{kind}_position_ids"][len(pixels) :]}
            else:
                expected = expected.flatten(0, 1) if expected.ndim == 5 else expected
                found, expected = expected[: len(pixels)], expected[len(pixels) :]
            assert torch.equal(pixels, found)
            if isinstance(item, dict) and "image_sizes" in item:
                assert item["image_sizes"].tolist() == out["image_sizes"][i].tolist()


def reference(case: Case, batch: Batch, dtype: torch.dtype) -> tuple[float, dict[str, Any], dict[str, str]]:
    """Loss and gradients of the library's model on what its processor makes of each sample alone."""
    whole = zoo.load(case.name, case.folder.parent, dtype)
    total, labels = 0.0, len(batch.labels)
    for microbatch in batch.microbatches:
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
    if packed and not zoo.KNOWN[case.name].packs:
        pytest.skip("is refused")
    batch = case.batch(packing=PackingOptions(packed=packed))
    assert any(len(m.origins) > 1 for m in batch.microbatches)
    module = MultimodalLM.from_pretrained(str(case.folder))
    module.configure_model()
    out = module.pipeline(batch)
    out.loss.backward()
    loss, expected, tied = reference(case, batch, torch.float32)
    assert out.loss.item() == pytest.approx(loss, rel=1e-6)
    rounding = 0.0
    if case.name != "qwen3_vl_moe":  # experts have no float64
        _, exact, _ = reference(case, batch, torch.float64)
        rounding = max(error(expected[n], exact[n], expected) for n in expected)
        assert rounding < (1e-4 if case.name.startswith("gemma4") else 1e-5)  # attention without a scale
    seen = set()
    for full_name, parameter in module.named_parameters():
        short = full_name.removeprefix("llm.").removeprefix("encoders.image.")
        short = short if short in expected else tied[short]
        seen.add(short)
        found = error(parameter.grad, expected[short], expected)
        assert found <= max(1e-6, 2 * rounding), f"{short}: {found:.1e}"
    assert seen == expected.keys()


SPLIT = {"qwen2_5_vl": 150, "internvl": 150, "idefics3": 150, "mllama": 70}
"""Video times that positions depend on; crops, and frames as crops; crops whose tokens stand apart; all rows at one
token. With the most tokens of a microbatch."""


def _pipelined(rank: int, cases: list[Case]) -> dict[str, Any]:
    mesh = build_mesh(torch.device("cpu"), 1, 2, range(2))
    results = {}
    for case in cases:
        module = MultimodalLM.from_pretrained(str(case.folder))
        module.part = part_of(rank, split_layers(zoo.LAYERS, 2), range(2))
        module.configure_model()
        module.runner = PipelineRunner(module, mesh, PipelineOptions(ScheduleOptions(group_size=2)))
        batch = case.batch(module.runner.layout, token_budget=SPLIT[case.name])
        owned = [item.owner == rank for m in batch.microbatches for item in m.media]
        assert {True, False} == set(owned)
        assert owned == [item.data is not None for m in batch.microbatches for item in m.media]
        out = module.pipeline(batch)
        reduce_gradients(module.runner.places, mesh)
        results[case.name] = out.loss.item(), {n: p.grad for n, p in module.named_parameters()}
    return results


def test_in_a_pipeline(tmp_path: Path) -> None:
    """Each rank decodes its own items alone; loss and gradients are those of one process."""
    cases = []
    for name in SPLIT:
        made = examples(name, tmp_path)
        cases.append(Case(name, write_model(name, tmp_path), made, []))
    results = run_ranks(2, _pipelined, cases)
    for case in cases:
        module = MultimodalLM.from_pretrained(str(case.folder))
        module.configure_model()
        batch = case.batch(token_budget=SPLIT[case.name])
        assert len(batch) > 2
        out = module.pipeline(batch)
        out.loss.backward()
        expected = {name: p.grad for name, p in module.named_parameters()}
        tied = {f"llm.{head}": f"llm.{embedding}" for head, embedding in module.llm.tied.items()}
        for loss, gradients in (rank[case.name] for rank in results):
            assert loss == pytest.approx(out.loss.item(), rel=1e-6)
            for name, gradient in gradients.items():
                assert error(gradient, expected[tied.get(name, name)], expected) <= 1e-6, name


class Losses(pl.Callback):
    """Of each training step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        self.losses.append(float(outputs["loss"]))


def _fit(rank: int, case: Case, **where: Any) -> list[float]:
    seen = Losses()
    trainer = plain_trainer(max_epochs=2, callbacks=[seen], **where)
    module = MultimodalLM.from_pretrained(str(case.folder), learning_rate=1e-2)
    trainer.fit(module, case.datamodule(num_workers=trainer.num_devices - 1))
    return seen.losses


def _fit_in_a_pipeline(rank: int, case: Case) -> list[float]:
    return _fit(rank, case, strategy="bigmac", devices=2)


@pytest.mark.filterwarnings("ignore:.*`IterableDataset` has `__len__` defined.*")
def test_two_lines(tmp_path: Path) -> None:
    """Model and processor from their folder, under the strategy's name; crops with the sizes of their images."""
    name = "llava_onevision"
    case = Case(name, write_model(name, tmp_path), examples(name, tmp_path), [])
    losses = _fit(0, case)
    assert len(losses) == 2
    assert losses[1] < losses[0]
    for found in on_ranks(2, _fit_in_a_pipeline, case):
        assert found == pytest.approx(losses, rel=1e-5)


@pytest.mark.filterwarnings("ignore:.*`IterableDataset` has `__len__` defined.*")
def test_packing_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    case = Case("gemma3", write_model("gemma3", tmp_path), examples("gemma3", tmp_path), [])
    with pytest.raises(ValueError, match=r"'gemma3' .* cannot keep packed samples apart: set packing.packed to False"):
        _fit(0, case)
    assert not (case.folder / "cache").exists()


def test_a_tokenizer_without_a_template(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    examples = [Example(said("what?", reply="this")), Example.of_text("once upon a time")]
    made = MultimodalDataModule([Given(examples)], processor=str(tmp_path), loading=LoadingOptions(cache_dir=tmp_path))
    with pytest.raises(
        ExampleError, match=r"1 of 2 train .*\nGiven, sample 0 is a conversation, and .* no chat template"
    ):
        made.setup("fit")


@pytest.mark.parametrize("name", sorted(PROCESSORS.keys() - VIDEOS))
def test_videos_are_refused(name: str, tmp_path: Path) -> None:
    clip = Video(File.at(clips()[2]))
    case = Case(name, write_model(name, tmp_path), [Example(said(clip, reply="much"))], [])
    with pytest.raises(ExampleError, match=r"sample 0 has a video, which \w+Processor cannot prepare"):
        case.datamodule().setup("fit")
