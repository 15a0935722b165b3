"""Sounds that tests write: two tones that rise, in any format that PyAV can write."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

RATE = 22_050
FORMATS = {
    "wav": "pcm_s16le",
    "flac": "flac",
    "mp3": "libmp3lame",
    "m4a": "aac",
    "ogg": "libopus",
    "opus": "libopus",
    "mkv": "aac",
    "aiff": "pcm_s16be",
}


def tones(seconds: float, rate: int = RATE, low: float = 200.0) -> np.ndarray:
    """(samples,), float32: a chirp."""
    time = np.arange(round(seconds * rate)) / rate
    return (0.4 * np.sin(2 * np.pi * (low * time + 150 * time**2))).astype(np.float32)


def write_sound(
    path: Path, seconds: float = 1.5, rate: int = RATE, channels: int = 1, low: float = 200.0, pictures: int = 0
) -> Path:
    """Write a sound whose channels are alike.

    Args:
        pictures: frames of a video beside it.
    """
    import av

    codec = FORMATS.get(path.suffix[1:], "aac")
    rate = 48_000 if codec == "libopus" else rate
    samples = tones(seconds, rate, low)
    with av.open(str(path), "w") as container:
        video: Any = container.add_stream("mpeg4", rate=10) if pictures else None
        layout = "stereo" if channels == 2 else "mono"
        sound = container.add_stream(codec, rate=rate, layout=layout)
        if pictures:
            video.width = video.height = 32
            video.pix_fmt, video.codec_context.time_base = "yuv420p", Fraction(1, 10)
            for k in range(pictures):
                picture = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 20 * k, dtype=np.uint8))
                picture.pts, picture.time_base = k, Fraction(1, 10)
                container.mux(video.encode(picture))
            container.mux(video.encode(None))
        frame = av.AudioFrame.from_ndarray(np.stack([samples] * channels), "fltp", layout)
        frame.sample_rate = rate
        resampler = av.AudioResampler(sound.format, sound.layout, rate, frame_size=sound.frame_size or None)  # pyright: ignore
        for piece in [*resampler.resample(frame), *resampler.resample(None)]:
            container.mux(sound.encode(piece))  # pyright: ignore
        container.mux(sound.encode(None))  # pyright: ignore
    return path
