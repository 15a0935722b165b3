"""Every family that takes sounds, from its folder: what MultimodalDataModule makes of real sounds against the library's
own processor, and loss and gradients against the library's own model, sample by sample."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Dots3NoteFeatureExtractor, Dots3NoteProcessor, ProcessorMixin, VoxtralProcessor

from bigmac_lightning.contracts.batch import Batch
from bigmac_lightning.datamodules import (
    Audio,
    Example,
    ExampleError,
    File,
    HFAudio,
    Image,
    LoadingOptions,
    Message,
    MultimodalDataModule,
    PackingOptions,
    Size,
    TwoSpeakers,
    Video,
)
from bigmac_lightning.datamodules.encoding.hf_visual import _metadata
from bigmac_lightning.datamodules.media.decoding import measure, read_frames
from bigmac_lightning.datamodules.media.sounds import read_sound
from bigmac_lightning.models import HFDecoder, MultimodalLM
from tests.datamodules.examples import clips
from tests.datamodules.processors import ALL_PROCESSORS
from tests.datamodules.sound_processors import SOUND_PROCESSORS, extractor, read_processor, write_model
from tests.datamodules.sounds import write_sound
from tests.datamodules.test_hf_visual import FRAMES, Case, Given, numbers, picture, reference, said, shown
from tests.models.parts import decoder_config
from tests.runtime.test_families import error

OMNI = ("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker")
ONE_SOUND = ("audioflamingo3", "glmasr", "qwen3_asr")
"""Families whose processor takes one sound in a call, although the model and the template take several."""


def speech(seconds: float, number: int) -> Audio:
    """Real speech of two people."""
    (sound,) = TwoSpeakers(seconds=seconds, step=0.3)[number].media
    assert isinstance(sound, Audio)
    return sound


def examples(name: str, folder: Path) -> list[Example]:
    """Two sounds of different lengths, one of them of several windows if there are windows; one sound; text alone."""
    # Qwen3-Omni's tower sees the end of a sound of less than a second differently beside a longer one
    long, short = speech(2.37, 0), speech(1.2 if name == "qwen3_omni_moe_thinker" else 0.5, 3)
    odd = Audio(File.at(write_sound(folder / "odd.flac", 1.1234, 22_050, 2)))
    if name == "qwen3_asr":  # whose template writes no text of a user
        system = [Message("system", ["names: Anna"]), Message("assistant", ["yes"])]
        turns = [*said(long, reply="both"), *said(short, reply="one")]
        return [
            Example(turns),
            Example(said(odd, reply="a tone")),
            Example(system),
            Example(said(short, reply="short")),
        ]
    made = [
        Example([*said(long, "who?", reply="both"), *said("and ", short, reply="one")]),
        Example(said(odd, "what is it?", reply="a tone")),
        Example([*said("only text", reply="yes"), *said("more", reply="no")]),
        Example(said(short, reply="short")),
    ]
    if name == "phi4_multimodal":  # which projects a sound in another way beside images
        made = [made[0], *made[2:], Example(said(picture(folder, 64, 50), short, reply="both"))]
        made.append(Example(said(picture(folder, 60, 44), "what is it?", reply="noise")))
    if name in OMNI:
        clip, seen = Video(File.at(clips()[2])), picture(folder, 23, 70)
        made.append(Example(said("a ", clip, " and ", short, " and ", seen, odd, reply="all")))
    return made


@dataclass
class SoundCase(Case):
    """See `Case`."""

    def datamodule(self, **changes: Any) -> MultimodalDataModule:
        budget = 1400 if self.name == "phi4_multimodal" else 400
        given: dict[str, Any] = {"token_budget": budget, "microbatches": 8, **changes}
        source = Given(self.examples)
        loading = LoadingOptions(cache_dir=self.folder / "cache")
        made = MultimodalDataModule([source], [source], processor=read_processor(self.folder), loading=loading, **given)
        if made.encoder.visual is not None:
            object.__setattr__(made.encoder.visual, "max_frames", FRAMES)
        return made


def prepared(name: str, processor: Any, example: Example) -> dict[str, Any]:
    """By the library alone: template, sounds and tokens in one call."""
    messages: list[Any] = []
    videos: dict[str, Any] = {}
    for message in example.messages:
        parts: list[Any] = []
        for part in message.parts:
            if isinstance(part, str | Image):
                parts.append(shown(part))
            elif isinstance(part, Audio):
                parts.append({"type": "audio", "audio": read_sound(part.file, measure(part), 16_000).numpy()})
            else:
                size = measure(part)
                frames = tuple(int((i + 0.5) * size.frames / FRAMES) for i in range(FRAMES))
                parts.append({"type": "video", "video": read_frames(part.file, size, frames)})
                metadata = _metadata(frames, size)
                videos = {"do_sample_frames": False, "video_metadata": [metadata], "fps": metadata.sampled_fps}
        messages.append({"role": message.role, "content": parts})
    if name in ONE_SOUND:
        processor.validate_inputs = lambda **given: ProcessorMixin.validate_inputs(processor, **given)
    made = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs={"videos_kwargs": videos}
    )
    return dict(made)


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[pytest.mark.wide] * (name == "glmasr")) for name in SOUND_PROCESSORS],
)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SoundCase:
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    made, saved = examples(name, folder), write_model(request.param, folder)
    processor = read_processor(saved)
    return SoundCase(name, saved, made, [prepared(name, processor, example) for example in made])


def compare(batch: Batch, case: SoundCase) -> None:
    """Tokens of each sample, and every spectrogram."""
    seen = set()
    for microbatch in batch.microbatches:
        ids = microbatch.inputs["input_ids"].flatten()
        for i, number in enumerate(numbers(microbatch)):
            seen.add(number)
            origin, out = microbatch.origins[i], case.whole[number]
            assert ids[origin.start : origin.stop].tolist() == out["input_ids"][0].tolist()
            left, mask = out.get("input_features"), out.get("feature_attention_mask", out.get("input_features_mask"))
            if left is not None and mask is None:  # Voxtral's tower sees the silence at the end of a window
                mask = torch.ones_like(left[:, 0], dtype=torch.long)
            sounds = [item.data for item in microbatch.media if item.origin == i and item.encoder == "audio"]
            assert len(sounds) == sum(isinstance(item, Audio) for item in case.examples[number].media)
            if case.name == "phi4_multimodal":
                compare_phi4([item.data for item in microbatch.media if item.origin == i], out)
                continue
            for sound in sounds:
                assert isinstance(sound, dict)
                assert left is not None
                assert mask is not None
                features, known = sound["input_features"], sound["input_features_mask"]
                windows, columns = known.shape
                assert torch.equal(features, left[:windows, :, :columns])
                assert torch.equal(known, mask[:windows, :columns])
                assert not mask[:windows, columns:].any()
                left, mask = left[windows:], mask[windows:]
            assert left is None or not len(left)
    assert seen == set(range(len(case.examples)))


def compare_phi4(items: Sequence[Any], out: dict[str, Any]) -> None:
    """Items of a sample with what the library's processor makes of it."""
    images = [item for item in items if "pixel_values" in item]
    for k, item in enumerate(images):
        crops = len(item["pixel_values"])
        assert torch.equal(item["pixel_values"], out["image_pixel_values"][k, :crops])
        assert torch.equal(item["image_attention_mask"], out["image_attention_mask"][k, :crops])
        assert torch.equal(item["image_sizes"], out["image_sizes"][k])
    for k, item in enumerate(item for item in items if "pixel_values" not in item):
        assert torch.equal(item["input_features"], out["audio_input_features"][k])
        assert bool(item["beside_images"]) == bool(images)
        assert ("input_features_mask" in item) == ("audio_attention_mask" in out)
        assert "audio_attention_mask" not in out or torch.equal(
            item["input_features_mask"], out["audio_attention_mask"][k]
        )


@pytest.mark.parametrize("packed", [True, pytest.param(False, marks=pytest.mark.wide)])
def test_against_the_library(case: SoundCase, packed: bool) -> None:
    batch = case.batch(packing=PackingOptions(packed=packed))
    assert any(len(m.origins) > 1 for m in batch.microbatches)
    compare(batch, case)
    module = MultimodalLM.from_pretrained(str(case.folder))
    case.datamodule().check(module)
    module.configure_model()
    out = module.pipeline(batch)
    out.loss.backward()
    loss, expected, tied = reference(case, batch, torch.float32)
    assert out.loss.item() == pytest.approx(loss, rel=1e-6)
    _, exact, _ = reference(case, batch, torch.float64)
    expected = {name: gradient for name, gradient in expected.items() if gradient is not None}
    rounding = max(error(expected[name], exact[name], expected) for name in expected)
    assert rounding < 1e-5
    seen = set()
    for full_name, parameter in module.named_parameters():
        short = full_name.removeprefix("llm.").removeprefix("encoders.image.").removeprefix("encoders.audio.")
        short = tied.get(short, short)
        if short not in expected:
            assert parameter.grad is None or not parameter.requires_grad
            continue
        seen.add(short)
        found = error(parameter.grad, expected[short], expected)
        assert found <= max(1e-6, 2 * rounding), f"{short}: {found:.1e}"
    assert seen == expected.keys()


def _sound(seconds: float) -> tuple[Audio, Size]:
    return Audio(File.at("nowhere.wav")), Size(1, 1, 1, seconds)


@pytest.mark.parametrize("name", SOUND_PROCESSORS)
def test_plans_need_no_samples(name: str) -> None:
    """The text that stands for a sound follows from its length, and from that of the longest sound beside it."""
    processor, random = SOUND_PROCESSORS[name](), Random(3)
    audio = MultimodalDataModule([], processor=processor).encoder.media["audio"]
    assert isinstance(audio, HFAudio)
    lengths = [16_000, 15_999, 16_001, 32_000, 2_000, *(random.randint(1_600, 46_000) for _ in range(12))]
    for first, second in zip(lengths, [*lengths[6:], *lengths[:6]], strict=True):
        sounds = [_sound(length / 16_000) for length in (first, second)]
        for given in ([first], [first, second]):
            items, sizes = zip(*sounds[: len(given)], strict=True)
            noise = [np.random.default_rng(0).standard_normal(length).astype(np.float32) for length in given]
            _, texts = processor._process_audio(noise, **audio._arguments)
            plans = audio.plans(items, sizes)
            assert [plan.text or processor.audio_token * plan.rows for plan in plans] == texts, given


@pytest.mark.parametrize(
    ("name", "most"), [("qwen2_audio", 3), ("audioflamingo3", 4), ("glmasr", 4), ("qwen2_5_omni_thinker", 3)]
)
def test_what_would_be_cut_off_is_refused(name: str, most: int) -> None:
    audio = HFAudio(SOUND_PROCESSORS[name]())
    audio.plan(*_sound(most))
    with pytest.raises(
        ExampleError, match=rf"nowhere.wav, a sound of {most}.01 s, of which \w+ would use the first {most} s: cut it"
    ):
        audio.plan(*_sound(most + 0.01))
    with pytest.raises(ExampleError, match=r"a sound of 0.010 s, which is too short for \w+Processor"):
        audio.plan(*_sound(0.01))


def test_processors_that_cannot_plan(tmp_path: Path) -> None:
    gemma = MultimodalDataModule([], processor=ALL_PROCESSORS["gemma4"]()).encoder.media["audio"]
    with pytest.raises(ValueError, match=r"with Gemma4Processor: Gemma4AudioFeatureExtractor does not work like Whi"):
        gemma.plan(*_sound(1.0))
    omni = SOUND_PROCESSORS["qwen2_5_omni_thinker"]()
    made = Dots3NoteFeatureExtractor(feature_size=8)
    dots = Dots3NoteProcessor(omni.image_processor, omni.tokenizer, omni.video_processor, made)
    with pytest.raises(ValueError, match=r"with Dots3NoteProcessor: it makes no mask that tells a sound from padding"):
        HFAudio(dots).plan(*_sound(1.0))
    omni.load_audio_from_video = True
    with pytest.raises(ValueError, match=r"Qwen2_5OmniProcessor has load_audio_from_video, .* as an item of its own"):
        MultimodalDataModule([], processor=omni)
    voxtral = VoxtralProcessor(extractor(), omni.tokenizer)
    with pytest.raises(
        ValueError, match=r"a VoxtralProcessor, whose tokens and sounds mistral-common prepares: install"
    ):
        MultimodalDataModule([], processor=voxtral)
    given = MultimodalDataModule([], processor=SOUND_PROCESSORS["glmasr"](), media={"audio": gemma})
    assert given.encoder.media["audio"] is gemma


def test_plans_of_other_settings_are_others() -> None:
    """What was measured with a processor is not taken for what another one makes."""
    prints = {HFAudio(make()).fingerprint() for make in SOUND_PROCESSORS.values()}
    longer = SOUND_PROCESSORS["audioflamingo3"]()
    longer.max_audio_len = 9
    assert len(prints | {HFAudio(longer).fingerprint()}) == len(SOUND_PROCESSORS) + 1


def test_other_models_are_refused(tmp_path: Path) -> None:
    """Those with another token or without an encoder of sounds, before anything is measured."""
    folder = write_model("qwen2_audio", tmp_path)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "audio_token_index": 17, "audio_token_id": 17}))
    module = MultimodalLM.from_pretrained(str(folder))
    with pytest.raises(ValueError, match=r"the model's config has audio_token_id=17 .* the processor has '<.AUDIO.>'"):
        MultimodalDataModule([], processor=str(folder)).check(module)
    sounds = Given([Example(said(_sound(1.0)[0], reply="a tone"))])
    text = MultimodalLM(HFDecoder(decoder_config(vocab_size=512)))
    with pytest.raises(
        ValueError, match=r"Given has audio items, which are for the encoder 'audio', .* has none: take"
    ):
        MultimodalDataModule([sounds], processor=str(folder)).check(text)
