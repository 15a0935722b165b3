"""Sounds of all formats: their durations by their packets, their samples, and those that are refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Wav2Vec2FeatureExtractor

from bigmac_lightning.datamodules import Audio, AudioProcessor, ExampleError, File, Limits, Size, Video, example_of
from bigmac_lightning.datamodules.media.decoding import measure
from bigmac_lightning.datamodules.media.sounds import read_sound
from tests.datamodules.examples import clips, package_folder
from tests.datamodules.sounds import FORMATS, tones, write_sound

SMALL = {"feature_size": 16, "chunk_length": 1, "sampling_rate": 16_000}


def _read(path: Path, rate: int = 16_000) -> tuple[Size, np.ndarray]:
    item = Audio(File.at(path))
    size = measure(item)
    return size, read_sound(item.file, size, rate).numpy()


def _alike(found: np.ndarray, expected: np.ndarray) -> float:
    """The correlation of two sounds, where one may begin a little later."""
    length = min(len(found), len(expected)) - 2000
    middle = expected[1000 : 1000 + length]
    shifts = range(2000)
    return max(float(np.corrcoef(found[s : s + length], middle)[0, 1]) for s in shifts)


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize("channels", [1, 2])
def test_every_format(ending: str, channels: int, tmp_path: Path) -> None:
    size, found = _read(write_sound(tmp_path / f"a.{ending}", 1.5, channels=channels))
    assert size.seconds == pytest.approx(1.5, abs=0.1)
    assert (size.height, size.width) == (1, 1)
    assert len(found) == round(size.seconds * 16_000)
    assert _alike(found, tones(1.5, 16_000)) > 0.98
    loud = tones(1.5, 16_000).std()
    assert found[1000:20_000].std() == pytest.approx(loud, rel=0.1), "the mean of channels, not their sum"


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100])
def test_any_rate(rate: int, tmp_path: Path) -> None:
    size, found = _read(write_sound(tmp_path / "a.wav", 0.5), rate)
    assert size == Size(1, 1, 11_025, 0.5)
    assert len(found) == rate // 2
    assert _alike(np.repeat(found, 44_100 // rate) if rate == 44_100 else found, tones(0.5, rate)) > 0.98


def test_the_sound_of_a_video(tmp_path: Path) -> None:
    path = write_sound(tmp_path / "a.mp4", 1.0, pictures=10)
    size, found = _read(path)
    assert _alike(found, tones(1.0, 16_000)) > 0.98
    assert measure(Video(File.at(path))).frames == 10
    assert size.seconds == pytest.approx(1.0, abs=0.1)
    [bunny] = [clip for clip in clips() if clip.name == "bigbuckbunny.mp4"]  # real, with six channels of AAC
    size, found = _read(bunny)
    assert size.seconds == pytest.approx(5.3, abs=0.1)
    assert found.std() > 0.003
    with pytest.raises(ExampleError, match=r"bikes.mp4 cannot be read: it has video, but no sound"):
        measure(Audio(File.at(next(clip for clip in clips() if clip.name == "bikes.mp4"))))


def test_odd_files_are_read_or_refused_by_name() -> None:
    """Those by which scipy tests its reader: 1 to 64 bits, ulaw, RF64, cut off, of no length."""
    files = sorted((package_folder("scipy") / "io" / "tests" / "data").glob("*.wav"))
    assert len(files) > 10
    read, refused = 0, list[tuple[str, str]]()
    for file in files:
        try:
            size, found = _read(file)
        except ExampleError as error:
            refused.append((file.name, str(error)))
            continue
        read += 1
        assert np.isfinite(found).all(), file
        assert np.abs(found).max() <= 1.2, file
        assert len(found) == max(1, round(size.seconds * 16_000))
    assert read == 6
    assert all(name in text for name, text in refused)
    assert sum("ms of sound" in text for _, text in refused) == 8


def test_what_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.wav").write_bytes(b"hello" * 100)
    (tmp_path / "empty.mp3").write_bytes(b"")
    whole = write_sound(tmp_path / "whole.flac", 3.0)
    for name, reason in (("text.wav", "it is no sound"), ("empty.mp3", "")):
        with pytest.raises(ExampleError, match=f"{name} cannot be read: {reason}"):
            measure(Audio(File.at(tmp_path / name)))
    item = Audio(File.at(whole))
    with pytest.raises(ExampleError, match=r"it has 3 seconds of sound; the most is 2\. .* raise limits.seconds"):
        measure(item, Limits(seconds=2))
    size = measure(item)
    (tmp_path / "cut.flac").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(ExampleError, match=r"cut.flac (cannot be decoded|is another than was measured)"):
        read_sound(File.at(tmp_path / "cut.flac"), size, 16_000)
    with pytest.raises(ExampleError, match=r"is another than was measured: .* instead of 3.00 seconds"):
        read_sound(File.at(write_sound(tmp_path / "longer.flac", 4.0)), size, 16_000)


@pytest.mark.parametrize(("seconds", "merge"), [(0.4, 1), (1.0, 5), (2.3, 5), (2.31, 2)])
def test_spectrograms_are_those_of_the_library(seconds: float, merge: int, tmp_path: Path) -> None:
    processor = AudioProcessor(SMALL, merge=merge)
    item = Audio(File.at(write_sound(tmp_path / "a.wav", seconds, 16_000)))
    size = measure(item)
    plan = processor.plan(item, size)
    made = processor.load(item, size, plan)
    assert len(made["frames"]) == plan.rows * merge
    assert made["frames"].tolist() == list(range(plan.rows * merge))
    assert plan.rows == -(-round(seconds * 16_000) // (320 * merge))
    sound = read_sound(item.file, size, 16_000).numpy()
    for k, window in enumerate(made["windows"]):
        piece = sound[k * 16_000 : (k + 1) * 16_000]
        expected = processor.features(piece, sampling_rate=16_000, return_tensors="pt")["input_features"][0]
        torch.testing.assert_close(window, expected)
    assert len(made["windows"]) == -(-len(sound) // 16_000)
    assert plan.cost == 50 * len(made["windows"])


def test_options_of_the_processor(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"does not consist of whole rows .* merge=3"):
        AudioProcessor(SMALL, merge=3)
    with pytest.raises(ValueError, match="must be positive"):
        AudioProcessor(SMALL, merge=0)
    with pytest.raises(ValueError, match="is a Wav2Vec2FeatureExtractor, which has no windows of one length"):
        AudioProcessor(Wav2Vec2FeatureExtractor())
    item = Audio(File.at(write_sound(tmp_path / "a.wav", 1.5, 16_000)))
    with pytest.raises(ExampleError, match=r"a.wav, a sound of 1.5 s; the most is max_seconds=1"):
        AudioProcessor(SMALL, max_seconds=1.0).plan(item, measure(item))
    prints = {AudioProcessor({**SMALL, **given}).fingerprint() for given in ({}, {"feature_size": 8}, {"n_fft": 200})}
    assert len({*prints, AudioProcessor(SMALL, merge=2).fingerprint()}) == 4


def test_parts_of_messages(tmp_path: Path) -> None:
    """Qwen's and OpenAI's forms."""
    path = write_sound(tmp_path / "a.wav", 0.2)
    import base64

    given = base64.b64encode(path.read_bytes()).decode()
    parts = [
        {"type": "audio", "audio": "a.wav"},
        {"type": "audio", "path": "a.wav"},
        {"type": "audio_url", "audio_url": {"url": f"data:audio/wav;base64,{given}"}},
        {"type": "input_audio", "input_audio": {"data": given, "format": "wav"}},
        {"type": "text", "text": "What is it?"},
    ]
    example = example_of({"messages": [{"role": "user", "content": parts}]}, media_root=tmp_path)
    assert [type(item) for item in example.media] == [Audio] * 4
    assert {measure(item).frames for item in example.media} == {4410}
    wrong = {"type": "input_audio", "input_audio": {"url": "a.wav"}}
    with pytest.raises(ExampleError, match=r"the part .* give .*the bytes in base64"):
        example_of({"messages": [{"role": "user", "content": [wrong]}]}, media_root=tmp_path)
    wrong = {"type": "audio", "audio": "data:image/png;base64,aa"}
    with pytest.raises(ExampleError, match="has data of type image/png as its audio"):
        example_of({"messages": [{"role": "user", "content": [wrong]}]})
