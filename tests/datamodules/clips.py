"""Video files of all kinds that people bring, made here by PyAV, and what is to be read of each."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np

H, W, FRAMES, RATE = 48, 64, 24, 10
PLAIN = "frames and times of its packets"
DISPLAYED = "as displayed (the library: as stored)"
ON_WHITE = "on white (the library: without its alpha)"
NO_VIDEO = "it is no video, or broken from its first bytes on"
B_FRAMES = "x264-params", "bframes=3:b-adapt=0:keyint=12:min-keyint=12:scenecut=0:open-gop="


@dataclass(frozen=True)
class Clip:
    """A file.

    Attributes:
        format, kind: what documentation calls it.
        make: writes it.
        frames: that can be decoded; ``None``: what FFmpeg decodes.
        seconds: that they last.
        turn: of (T, H, W, C) as stored to as displayed.
        reading: what documentation says is read of it.
        refused: what is said of it, if it cannot be read.
        when: it is found to be broken.
    """

    format: str
    kind: str
    make: Callable[[Path], None]
    frames: int | None = FRAMES
    seconds: float | None = FRAMES / RATE
    turn: Callable[[np.ndarray], np.ndarray] = field(default=lambda pixels: pixels)
    reading: str = PLAIN
    refused: str = ""
    when: Literal["measured", "decoded"] = "measured"

    @property
    def id(self) -> str:
        return f"{self.format}: {self.kind}"

    def write(self, folder: Path) -> Path:
        path = folder / f"clip.{self.format.lower()}"
        self.make(path)
        return path


def picture(i: int, height: int, width: int) -> np.ndarray:
    """Noise that moves: no two frames are alike, and each refers to others."""
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return np.roll(noise, (2 * i, 3 * i), (0, 1))


def encoded(
    codec: str = "libx264",
    pixels: str = "yuv420p",
    frames: int = FRAMES,
    height: int = H,
    width: int = W,
    times: Sequence[int] | None = None,
    sound: float = 0,
    sound_codec: str = "pcm_s16le",
    rotation: tuple[float, bool] | None = None,
    container: dict[str, str] | None = None,
    setup: Callable[[Any], None] | None = None,
    **options: str,
) -> Callable[[Path], None]:
    """
    Args:
        times: of the frames, in tenths of seconds.
        sound, sound_codec: seconds of it, and what it is encoded by.
        rotation: counter-clockwise in degrees, and whether it is mirrored then.
        container, options: of the muxer, and of the encoder.
        setup: of the stream.
    """

    def make(path: Path) -> None:
        with at_the_same_priority(), av.open(str(path), "w", options=container or {}) as file:
            video: Any = file.add_stream(codec, rate=RATE, options={"threads": "1", **options})
            video.width, video.height, video.pix_fmt = width, height, pixels
            if rotation is not None:
                video.set_display_rotation(rotation[0], hflip=rotation[1])
            if setup is not None:
                setup(video)
            audio: Any = file.add_stream(sound_codec, rate=8000, layout="mono") if sound else None
            for i in range(frames):
                frame = av.VideoFrame.from_ndarray(picture(i, height, width), format="rgb24")
                frame.pts, frame.time_base = (i if times is None else times[i]), Fraction(1, RATE)
                file.mux(video.encode(frame))
            file.mux(video.encode())
            for i in range(round(sound * 10)):
                silence = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
                silence.sample_rate, silence.pts = 8000, 800 * i
                file.mux(audio.encode(silence))
            if audio is not None:
                file.mux(audio.encode())

    return make


@contextmanager
def at_the_same_priority() -> Iterator[None]:
    """SVT-AV1, run by root, gives the thread that encodes, and all that this one starts later, the highest priority in
    real time. Processes of tests that come after it then starve each other's threads."""
    policy, parameter = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameter)


def changed(make: Callable[[Path], None], change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def made(path: Path) -> None:
        make(path)
        path.write_bytes(change(path.read_bytes()))

    return made


def remuxed(make: Callable[[Path], None], suffix: str) -> Callable[[Path], None]:
    """Packets as one container has them in another."""

    def made(path: Path) -> None:
        source = path.with_suffix(suffix)
        make(source)
        with av.open(str(source)) as old, av.open(str(path), "w") as new:
            stream = new.add_stream_from_template(old.streams.video[0])
            for packet in old.demux(video=0):
                if packet.dts is not None:
                    packet.stream = stream
                    new.mux(packet)

    return made


def cut(share: float) -> Callable[[bytes], bytes]:
    return lambda content: content[: int(len(content) * share)]


def half_of_ts(content: bytes) -> bytes:
    """From a packet in the middle on: as a receiver records it."""
    return content[len(content) // 188 // 2 * 188 :]


def hide(path: Path) -> None:
    """A VP8 clip one of whose frames is only there for others to refer to."""
    encoded("libvpx")(path)
    with av.open(str(path)) as file:
        packet = [packet for packet in file.demux(video=0) if packet.size][5]
        found = bytes(packet)
    content = path.read_bytes()
    assert content.count(found) == 1
    path.write_bytes(content.replace(found, bytes([found[0] & ~0x10]) + found[1:]))


def with_cover(path: Path) -> None:
    """A song with the picture of its cover."""
    with av.open(str(path), "w") as file:
        audio: Any = file.add_stream("aac", rate=8000, layout="mono")
        cover: Any = file.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = W, H, "yuvj420p"
        cover.disposition = cover.disposition.attached_pic
        frame = av.VideoFrame.from_ndarray(picture(0, H, W), format="rgb24")
        file.mux(cover.encode(frame.reformat(format="yuvj420p")))
        file.mux(cover.encode())
        _sing(file, audio)


def only_sound(path: Path) -> None:
    with av.open(str(path), "w") as file:
        _sing(file, file.add_stream("aac", rate=8000, layout="mono"))


def _sing(file: Any, audio: Any) -> None:
    for i in range(10):
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.sample_rate, silence.pts = 8000, 1024 * i
        file.mux(audio.encode(silence))
    file.mux(audio.encode())


def growing(path: Path) -> None:
    """Frames that become larger in the middle."""
    with av.open(str(path), "w") as file:
        stream: Any = file.add_stream("libx264", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = W, H, "yuv420p"
        for start, scale in ((0, 1), (12, 2)):
            encoder: Any = av.CodecContext.create("libx264", "w")
            encoder.width, encoder.height, encoder.pix_fmt = W * scale, H * scale, "yuv420p"
            encoder.time_base, encoder.framerate = Fraction(1, RATE), Fraction(RATE)
            for i in (*range(12), None):
                frame = None
                if i is not None:
                    frame = av.VideoFrame.from_ndarray(picture(i, H * scale, W * scale), format="rgb24")
                    frame.pts, frame.time_base = start + i, Fraction(1, RATE)
                for packet in encoder.encode(frame):
                    packet.stream = stream
                    file.mux(packet)


def playlist(path: Path) -> None:
    encoded()(path.with_suffix(".ts"))
    path.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:2,\n{path.with_suffix('.ts')}\n#EXT-X-ENDLIST\n")


def square_pixels_not(video: Any) -> None:
    video.sample_aspect_ratio = Fraction(4, 3)


def full_range(video: Any) -> None:
    video.codec_context.color_range = 2


UNEVEN = [0, 1, 2, 3, 20, 21, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63, 64, 65, 66, 90]
LONG = 130  # frames, more than SKIP
OPEN, CLOSED = {B_FRAMES[0]: B_FRAMES[1] + "1"}, {B_FRAMES[0]: B_FRAMES[1] + "0"}
HIDDEN = {"lag-in-frames": "16", "auto-alt-ref": "1"}
HEVC = {"x265-params": "log-level=none:pools=1:frame-threads=1:keyint=12:bframes=3"}
CODECS = {
    "MP4": ("libx264", "aac"),
    "MOV": ("libx264", "pcm_s16le"),
    "MKV": ("libx264", "pcm_s16le"),
    "WEBM": ("libvpx-vp9", "libopus"),
}


def in_each(
    kind: str, skip: Sequence[str] = (), frames: int = FRAMES, seconds: float = FRAMES / RATE, **how: Any
) -> list[Clip]:
    """One kind of clip in all of these containers but some."""
    made = []
    for name, (codec, sound_codec) in CODECS.items():
        if name not in skip:
            made.append(
                Clip(name, kind, encoded(codec, sound_codec=sound_codec, frames=frames, **how), frames, seconds)
            )
    return made


TURNS: list[tuple[str, tuple[float, bool], Callable[[np.ndarray], np.ndarray]]] = [
    ("to be turned by 0 degrees", (0, False), lambda p: p),
    ("to be turned by 90 degrees", (90, False), lambda p: np.rot90(p, 1, (1, 2))),
    ("to be turned by 180 degrees", (180, False), lambda p: p[:, ::-1, ::-1]),
    ("to be turned by 270 degrees", (270, False), lambda p: np.rot90(p, -1, (1, 2))),
    ("mirrored", (0, True), lambda p: p[:, :, ::-1]),
    ("turned and mirrored", (90, True), lambda p: np.rot90(p, 1, (1, 2))[:, :, ::-1]),
]


def turned(name: str) -> list[Clip]:
    """In a container, each way. Into MKV it comes from an MP4: PyAV does not write it into MKV by itself."""
    made = []
    for kind, rotation, turn in TURNS:
        make = encoded(rotation=rotation)
        make = make if name in ("MP4", "MOV") else remuxed(make, ".mp4")
        made.append(Clip(name, kind, make, turn=turn, reading=DISPLAYED))
    return made


CLIPS = [
    *in_each("no sound"),
    *in_each("odd sizes", pixels="yuv444p", height=47, width=63),
    *in_each("variable frame rate", seconds=9.1, times=UNEVEN),
    *in_each("first frame later than 0", times=range(50, 50 + FRAMES)),
    *in_each("sound longer than the video", sound=5),
    *in_each("sound shorter than the video", sound=1),
    *in_each("one frame", frames=1, seconds=0.1),
    *in_each("no duration", skip=("MP4", "MOV"), container={"live": "1"}),
    *(clip for name in ("MP4", "MOV", "MKV") for clip in turned(name)),
    Clip("MP4", "H.264 with B-frames", encoded(**CLOSED)),
    Clip("MP4", "H.264 with open groups", encoded(**OPEN, frames=LONG), LONG, LONG / RATE),
    Clip("MP4", "H.264, one keyframe", encoded(g="1000", frames=LONG), LONG, LONG / RATE),
    Clip("MP4", "H.264 of 10 bits", encoded(pixels="yuv420p10le")),
    Clip("MP4", "H.264 of full range", encoded(setup=full_range)),
    Clip("MP4", "H.264, interlaced", encoded(flags="+ildct+ilme"), reading="not deinterlaced, as in the library"),
    Clip("MP4", "pixels that are not square", encoded(setup=square_pixels_not), reading="as stored, as in the library"),
    Clip("MP4", "H.265 of 10 bits", encoded("libx265", "yuv420p10le", **HEVC)),
    Clip("MP4", "AV1", encoded("libsvtav1", preset="12")),
    Clip("MP4", "variable frame rate, B-frames", encoded(times=UNEVEN, **CLOSED), seconds=9.1),
    Clip("MP4", "edit list", encoded(times=range(-7, FRAMES - 7), container={"avoid_negative_ts": "disabled"}),
         FRAMES - 7, 1.7),
    Clip("MP4", "fragments", encoded(container={"movflags": "frag_keyframe+empty_moov"}, g="6")),
    Clip("MP4", "to be turned by 45 degrees", encoded(rotation=(45, False)),
         refused="by an angle other than 90, 180 or 270 degrees"),
    Clip("MP4", "broken off, its header first", changed(encoded(container={"movflags": "faststart"}), cut(0.9)),
         refused="it breaks off: its header lists frames up to byte"),
    Clip("MP4", "broken off, its header last", changed(encoded(), cut(0.9)), refused=NO_VIDEO),
    Clip("MP4", "sound alone", only_sound, refused="it has sound, but no video"),
    Clip("MP4", "a song and its cover", with_cover, refused="it has sound, but no video"),
    Clip("MOV", "ProRes", encoded("prores_ks", "yuv422p10le")),
    Clip("MOV", "ProRes with alpha", encoded("prores_ks", "yuva444p10le"), reading=ON_WHITE),
    Clip("MOV", "PNG with alpha", encoded("png", "rgba"), reading=ON_WHITE),
    Clip("MKV", "H.264 with B-frames", encoded(**CLOSED)),
    Clip("MKV", "H.264 with open groups", encoded(**OPEN, frames=LONG), LONG, LONG / RATE),
    Clip("MKV", "broken off: what there is", changed(encoded(**CLOSED), cut(0.6)), None, None),
    Clip("MKV", "lossless with alpha", encoded("ffv1", "bgra"), reading=ON_WHITE),
    Clip("WEBM", "VP8", encoded("libvpx")),
    Clip("WEBM", "VP8 with a frame that is not shown", hide, FRAMES - 1),
    Clip("WEBM", "VP9 with frames that are not shown", encoded("libvpx-vp9", **HIDDEN)),
    Clip("AVI", "MPEG-4", encoded("mpeg4")),
    Clip("AVI", "MPEG-4 with B-frames", encoded("mpeg4", bf="2", g="12")),
    Clip("AVI", "H.264 with B-frames", encoded(**CLOSED, frames=LONG), LONG, LONG / RATE),
    Clip("AVI", "Motion JPEG", encoded("mjpeg", "yuvj420p")),
    Clip("AVI", "one frame", encoded("mpeg4", frames=1), 1, 0.1),
    Clip("AVI", "broken off", changed(encoded("mpeg4"), cut(0.5)), refused="it is damaged or breaks off"),
    Clip("TS", "H.264 with B-frames", encoded(**CLOSED, frames=LONG), LONG, LONG / RATE),
    Clip("TS", "cut in the middle of a group", changed(encoded(**OPEN, frames=LONG), half_of_ts), None, None),
    Clip("TS", "frames of two sizes", growing, refused="the size of its frames changes at 1.40 s", when="decoded"),
    Clip("MPG", "MPEG-2", encoded("mpeg2video", bf="2", g="12")),
    Clip("FLV", "H.264", encoded(**CLOSED, frames=LONG), LONG, LONG / RATE),
    Clip("WMV", "WMV 2", encoded("wmv2")),
    Clip("GIF", "animated", encoded("gif", "rgb8"), reading=ON_WHITE),
    Clip("M3U8", "a playlist", playlist, refused=NO_VIDEO),
    Clip("TXT", "any", lambda path: path.write_text("not a video"), refused=NO_VIDEO),
]  # fmt: skip
