"""Videos of every kind in the table: measured sizes are those of decoding, and frames have the times of packets."""

import gc
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import PIL.Image
import pytest
import torch
from transformers.image_transforms import convert_to_rgb
from transformers.video_utils import load_video

from bigmac_lightning.datamodules import ExampleError, File, PatchProcessor, Size, Video
from bigmac_lightning.datamodules.limits import Limits
from bigmac_lightning.datamodules.media import packets, videos
from bigmac_lightning.datamodules.media.decoding import measure, read_frames
from bigmac_lightning.datamodules.media.packets import VideoStream
from tests.datamodules.clips import CLIPS, ON_WHITE, PLAIN, RATE, Clip, H, W, encoded, growing
from tests.datamodules.examples import clips

READ = [clip for clip in CLIPS if not clip.refused]


@pytest.fixture(autouse=True)
def quiet() -> None:
    av.logging.set_level(av.logging.PANIC)


def decoded(path: Path) -> tuple[list[float], list[Any]]:
    """Seconds from the first frame on at which each is shown, by its packet, and the frames: all, by FFmpeg alone."""
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        time_base = stream.time_base
        found = [packet for packet in file.demux(stream) if packet.size and not packet.is_discard]
    with av.open(str(path)) as file:
        frames = list(file.decode(video=0))
    if path.suffix == ".avi":
        return [i / RATE for i in range(len(found))], frames
    times = sorted(packet.pts for packet in found if packet.pts is not None)
    shown = [frame.pts for frame in frames if frame.pts is not None]
    assert set(shown) <= set(times)
    return [float((time - shown[0]) * time_base) for time in shown], frames


def rgb(frame: Any) -> np.ndarray:
    if not any(component.is_alpha for component in frame.format.components):
        return frame.to_ndarray(format="rgb24")
    pixels = convert_to_rgb(PIL.Image.fromarray(frame.to_ndarray(format="rgba")), return_numpy=True)
    assert isinstance(pixels, np.ndarray)
    return pixels


@pytest.mark.parametrize("clip", READ, ids=lambda clip: clip.id)
def test_measured_and_decoded(clip: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = clip.write(tmp_path)
    times, frames = decoded(path)
    stored = np.stack([rgb(frame) for frame in frames])
    pixels = clip.turn(stored)
    size = measure(Video(File.at(path)))
    assert (size.height, size.width, size.frames) == (*pixels.shape[1:3], len(times))
    assert clip.frames in (None, size.frames)
    assert clip.seconds is None or size.seconds == pytest.approx(clip.seconds, abs=0.002)
    slots = range(size.frames)
    shown = [max(k for k, time in enumerate(times) if time <= (i + 0.5) * size.seconds / size.frames) for i in slots]
    expected = torch.from_numpy(pixels[shown].copy()).permute(0, 3, 1, 2)
    assert torch.equal(read_frames(File.at(path), size, slots), expected)
    if clip.reading != ON_WHITE:  # told how many, as the library counts wrong or not at all where no header says it
        everything = load_video(str(path), sample_indices_fn=lambda metadata, **_: list(range(len(frames))))
        assert np.array_equal(everything[0], stored)
    gray = [frames[k].to_ndarray(format="gray") for k in shown]
    if pixels.shape[1:3] == gray[0].shape and clip.reading == PLAIN:
        assert torch.equal(read_frames(File.at(path), size, slots, "L")[:, 0], torch.from_numpy(np.stack(gray)))
    few = list(slots)[:: max(1, size.frames // 4)]
    monkeypatch.setattr(videos, "SKIP", 0.3)  # jump whenever it may pay
    assert torch.equal(read_frames(File.at(path), size, few), expected[few])


@pytest.mark.parametrize("clip", [clip for clip in CLIPS if clip.refused], ids=lambda clip: clip.id)
def test_refused(clip: Clip, tmp_path: Path) -> None:
    file = File.at(clip.write(tmp_path))
    if clip.when == "measured":
        with pytest.raises(ExampleError, match=rf"clip\.\w+ cannot be read: .*{clip.refused}"):
            measure(Video(file))
    else:
        size = measure(Video(file))
        with pytest.raises(ExampleError, match=rf"clip\.\w+ cannot be decoded: .*{clip.refused}"):
            read_frames(file, size, [0, size.frames - 1])
        assert read_frames(file, size, [0]).shape[0] == 1


def test_nothing_outlives_the_reading_of_a_video(tmp_path: Path) -> None:
    """A frame has threads that convert it: a process that is forked off lacks them, and waits for them to end."""
    path = tmp_path / "a.mp4"
    encoded(rotation=(90, False))(path)
    gc.collect()
    gc.disable()
    try:
        threads = len(os.listdir("/proc/self/task"))
        size = measure(Video(File.at(path)))
        read_frames(File.at(path), size, range(size.frames))
        assert [found for found in gc.get_objects() if type(found) is av.VideoFrame] == []
        assert len(os.listdir("/proc/self/task")) == threads
    finally:
        gc.enable()


def test_listed_and_counted_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What headers of MP4 and MOV say, and what all their packets do."""
    seen = 0
    for clip in READ:
        if clip.format in ("MP4", "MOV"):
            file = File.at(clip.write(tmp_path))
            size = measure(Video(file))
            with monkeypatch.context() as changed:
                changed.setattr(videos._Tally, "is_listed", lambda self: False)
                assert measure(Video(file)) == size
            seen += 1
    assert seen > 20


def test_the_header_saves_reading_the_file(tmp_path: Path) -> None:
    """But its start and its end."""
    path = tmp_path / "a.mp4"
    encoded(frames=600, g="50")(path)
    read = 0

    class Counting(io.FileIO):
        def read(self, size: int = -1) -> bytes:
            nonlocal read
            found = super().read(size)
            read += len(found)
            return found

    assert measure(Video(File("a.mp4", lambda: Counting(str(path))))) == Size(H, W, 600, 60.0)
    assert read < path.stat().st_size / 2


def test_where_keyframes_are_rare_it_is_not_decoded_again_and_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.mkv"
    encoded(frames=400, g="1000")(path)
    file = File.at(path)
    size = measure(Video(file))
    counted = []
    frames = VideoStream.frames

    def counting(self: Any, packets: Any) -> Any:
        for found in frames(self, packets):
            counted.append(found)
            yield found

    monkeypatch.setattr(VideoStream, "frames", counting)
    monkeypatch.setattr(videos, "SKIP", 0.5)
    read_frames(file, size, range(5, 400, 20))
    assert len(counted) < 3 * 400


def test_where_a_jump_leads_astray_it_is_read_straight_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.mpg"
    encoded("mpeg2video", bf="2", g="12")(path)
    size = measure(Video(File.at(path)))
    expected = read_frames(File.at(path), size, range(0, size.frames, 4))
    monkeypatch.setattr(packets, "SEEKABLE", ("mpeg",))
    monkeypatch.setattr(videos, "SKIP", 0.3)
    assert torch.equal(read_frames(File.at(path), size, range(0, size.frames, 4)), expected)


@pytest.mark.parametrize(("limit", "found"), [("frames", "21 frames or more"), ("pixels", "48 x 64 pixels")])
@pytest.mark.parametrize("ending", ["mkv", "mp4"])
def test_too_much(limit: str, found: str, ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{ending}"
    encoded()(path)
    text = rf"cannot be read: it has {'[0-9]* frames or more' if limit == 'frames' else found}; the most is 20\. If"
    with pytest.raises(ExampleError, match=rf"a\.{ending} {text} this is meant, raise limits\.{limit}"):
        measure(Video(File.at(path)), Limits(**{limit: 20}))


def test_frames_that_grow_beyond_the_limit_are_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(videos, "MAX_PIXELS", H * W)
    growing(tmp_path / "a.ts")
    file = File.at(tmp_path / "a.ts")
    size = measure(Video(file))
    with pytest.raises(ExampleError, match=r"a\.ts cannot be decoded: it is damaged"):
        read_frames(file, size, [0, size.frames - 1])


def test_more_than_is_to_be_read_at_once() -> None:
    size, file = Size(4320, 7680, 600, 20.0), File.at("a.mp4")
    with pytest.raises(ExampleError, match=r"a\.mp4 has 4320 x 7680 pixels in each of 100 frames.*lower max_frames"):
        PatchProcessor(fps=10, max_frames=100).plan(Video(file), size)
    assert len(PatchProcessor(fps=1).plan(Video(file), size).frames) == 20


@pytest.mark.parametrize(("format", "damage"), [("MP4", "zeros"), ("AVI", "noise"), ("AVI", "zeros"), ("MOV", "zeros")])
def test_damage_in_the_middle(format: str, damage: str, tmp_path: Path) -> None:
    """Is found by whoever decodes it, and by nobody who decodes but what lies before."""
    clip = next(clip for clip in CLIPS if clip.format == format and not clip.refused)
    path = clip.write(tmp_path)
    size = measure(Video(File.at(path)))
    with av.open(str(path)) as file:
        packet = [packet for packet in file.demux(video=0) if packet.size][12]
    content = bytearray(path.read_bytes())
    assert packet.pos is not None
    first, last = packet.pos + 12, packet.pos + packet.size
    noise = np.random.default_rng(0).integers(0, 256, last - first, dtype=np.uint8)
    content[first:last] = bytes(last - first) if damage == "zeros" else noise.tobytes()
    path.write_bytes(content)
    assert measure(Video(File.at(path))) == size
    with pytest.raises(ExampleError, match=r"clip\.\w+ cannot be decoded: it is damaged"):
        read_frames(File.at(path), size, [0, size.frames - 1])
    assert read_frames(File.at(path), size, [0, 3]).shape[0] == 2


def test_another_video_than_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    encoded(frames=40)(path)
    size = measure(Video(File.at(path)))
    encoded(frames=20)(path)
    with pytest.raises(ExampleError, match=r"a\.mp4 cannot be decoded: it breaks off at 2\.00 s"):
        read_frames(File.at(path), size, [5, 35])
    encoded(rotation=(90, False))(path)
    with pytest.raises(ExampleError, match=r"is another than was measured: 64 x 48 instead of 48 x 64"):
        read_frames(File.at(path), size, [5])


FORKED = """
import gc, os, sys
from pathlib import Path
from bigmac_lightning.datamodules.limits import Limits
from bigmac_lightning.datamodules.media.packets import VideoStream, opened_container

def make_garbage():
    with open(sys.argv[1], "rb") as file, opened_container(file, Limits()) as container:
        video = VideoStream(container, Limits())
        video.stream.codec_context.thread_count = 4
        kept = [video, next(frame for packet in video.packets() for frame in packet.decode())]
        kept.append(kept)

gc.disable()
make_garbage()
if os.fork() == 0:
    gc.collect()
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
"""


def test_garbage_of_before_does_not_stop_a_forked_process() -> None:
    """It would wait for the threads of a decoder, which it lacks."""
    subprocess.run([sys.executable, "-c", FORKED, str(clips()[0])], check=True, timeout=60)
