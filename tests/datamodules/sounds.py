"""Sounds that tests write: two tones that rise, in any format that PyAV can write."""

from pathlib import Path

import numpy as np

RATE = 22_050
FORMATS = {
    "wav": "pcm_s16le",
    "flac": "flac",
    "mp3": "libmp3lame",
    "m4a": "aac",
    "ogg": "libvorbis",
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
        if pictures:
            video = container.add_stream("mpeg4", rate=10)
            video.width = video.height = 32  # pyright: ignore[reportAttributeAccessIssue]
            video.pix_fmt = "yuv420p"  # pyright: ignore[reportAttributeAccessIssue]
            for k in range(pictures):
                shown = np.full((32, 32, 3), 20 * k, dtype=np.uint8)
                container.mux(video.encode(av.VideoFrame.from_ndarray(shown)))  # pyright: ignore
            container.mux(video.encode(None))  # pyright: ignore
        layout = "stereo" if channels == 2 else "mono"
        sound = container.add_stream(codec, rate=rate, layout=layout)
        frame = av.AudioFrame.from_ndarray(np.stack([samples] * channels), "fltp", layout)
        frame.sample_rate = rate
        resampler = av.AudioResampler(sound.format, sound.layout, rate, frame_size=sound.frame_size or None)  # pyright: ignore
        for piece in [*resampler.resample(frame), *resampler.resample(None)]:
            container.mux(sound.encode(piece))  # pyright: ignore
        container.mux(sound.encode(None))  # pyright: ignore
    return path
