"""Sizes from headers and pixels from bytes, of real files."""

from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from bigmac_lightning.datamodules import ExampleError, File, Image, Size, Video
from bigmac_lightning.datamodules.media import videos
from bigmac_lightning.datamodules.media.decoding import measure, read_frames, read_image
from tests.datamodules.examples import clips


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "gif", "bmp"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_images(kind: str, mode: str, tmp_path: Path) -> None:
    pixels = np.full((10, 14, 3), 120, dtype=np.uint8)
    pixels[:, 7:] = 30
    PIL.Image.fromarray(pixels).save(tmp_path / f"a.{kind}")
    file = File.at(tmp_path / f"a.{kind}")
    size = measure(Image(file))
    assert size == Size(10, 14)
    read = read_image(file, size, mode)  # pyright: ignore
    assert read.shape == (3 if mode == "RGB" else 1, 10, 14)
    assert (read.float() - torch.tensor(pixels[None, ..., 0])).abs().max() < 12


def test_rotated_photographs_are_rotated_back(tmp_path: Path) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    pixels = np.zeros((8, 16, 3), dtype=np.uint8)
    pixels[:, :4] = 255
    PIL.Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif, quality=95)
    file = File.at(tmp_path / "a.jpg")
    assert measure(Image(file)) == Size(16, 8)
    read = read_image(file, Size(16, 8)).float().mean(0)
    assert read[:3].mean() > 200 > 50 > read[5:].mean()


def test_transparent_and_deep_images(tmp_path: Path) -> None:
    PIL.Image.new("RGBA", (5, 4), (10, 20, 30, 40)).save(tmp_path / "a.png")
    assert read_image(File.at(tmp_path / "a.png"), Size(4, 5)).shape == (3, 4, 5)
    PIL.Image.new("P", (5, 4)).save(tmp_path / "p.png")
    assert read_image(File.at(tmp_path / "p.png"), Size(4, 5)).shape == (3, 4, 5)


@pytest.mark.parametrize("clip", clips()[1:], ids=lambda path: path.stem)
def test_clips(clip: Path) -> None:
    import av

    file = File.at(clip)
    size = measure(Video(file))
    with av.open(str(clip)) as container:
        every = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(every) == size.frames
    assert every[0].shape == (size.height, size.width, 3)
    wanted = [0, size.frames // 3, size.frames - 2]
    read = read_frames(file, size, wanted)
    assert read.shape == (3, 3, size.height, size.width)
    for index, frame in zip(wanted, read, strict=True):
        nearby = [
            np.abs(every[i].astype(int) - frame.permute(1, 2, 0).numpy()).max()
            for i in (index - 1, index, index + 1)
            if 0 <= i < len(every)
        ]
        assert min(nearby) == 0
    assert read_frames(file, size, wanted[:1], "L").shape == (1, 1, size.height, size.width)


@pytest.mark.parametrize("clip", clips(), ids=lambda path: path.stem)
def test_jumping_ahead_finds_the_same_frames(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = File.at(clip)
    size = measure(Video(file))
    wanted = [3, size.frames // 2, size.frames // 2 + 1, size.frames - 3]
    found = []
    for skip in (0.3, 1e9):
        monkeypatch.setattr(videos, "SKIP", skip)
        found.append(read_frames(file, size, wanted))
    assert torch.equal(*found)


def test_frames_that_a_broken_clip_lacks(tmp_path: Path) -> None:
    clip = clips()[1]
    size = measure(Video(File.at(clip)))
    (tmp_path / "half.mp4").write_bytes(clip.read_bytes()[: clip.stat().st_size // 2])
    with pytest.raises(ExampleError, match=r"half.mp4 (cannot be decoded|breaks off)"):
        read_frames(File.at(tmp_path / "half.mp4"), size, [0, size.frames - 1])


def test_a_picture_is_no_video(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_text("not a video")
    with pytest.raises(ExampleError, match=r"a.mp4 cannot be read"):
        measure(Video(File.at(tmp_path / "a.mp4")))


def test_sizes_that_are_given_are_believed_but_limited() -> None:
    nowhere = File.at("nowhere.png")
    assert measure(Image(nowhere, Size(3, 4))) == Size(3, 4)
    for size in (Size(100_000, 100_000), Size(0, 5)):
        with pytest.raises(ExampleError, match=r"nowhere\.png"):
            measure(Image(nowhere, size))
