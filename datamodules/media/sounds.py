"""Sounds, read by PyAV: durations from packets, of which only the first is decoded, and samples of one channel at any
rate. The sound of a video is read as well.

The duration is that of the packets, as the one that a container states may be that of the video, or an estimate. What
decoders add at the start or leave out at the end, some hundredths of a second, is cut off or filled with silence.
"""

from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from ..example import Size
from ..files import File
from ..limits import Limits
from .opening import check_same, opened
from .packets import opened_container

CONTAINERS = ("wav", "w64", "aiff", "caf", "au", "flac", "mp3", "aac", "ogg", "mov", "matroska", "asf", "avi", "mpegts")
CONTAINERS += ("mpeg", "flv")
"""FFmpeg's names of the containers that are read; "mov" includes MP4 and M4A."""

TOLERANCE = 0.25
"""Seconds by which the decoded sound may be shorter or longer than its packets."""

LEAST = 0.005
"""Seconds that a sound has at least: of a few samples nothing can be made at another rate."""


def sound_size(stream: BinaryIO, limits: Limits) -> Size:
    """The size of a sound: its duration, and its number of samples at its own rate.

    Raises:
        ValueError: there is no sound, it cannot be decoded, or it is too long. PyAV may raise other exceptions.
    """
    with opened_container(stream, limits, CONTAINERS, "sound") as container:
        sound = _stream(container)
        start = end = None
        decoded = 0
        for packet in container.demux(sound):
            if not decoded:
                decoded = sum(frame.samples for frame in packet.decode())
            if packet.size == 0:  # the end, where decoders give what they have kept
                continue
            time = end if packet.pts is None else packet.pts
            start = time if start is None else min(start, time or 0)
            end = max(end or 0, (time or 0) + (packet.duration or 0))
        seconds = float(((end or 0) - (start or 0)) * (sound.time_base or 0))
        if not decoded or seconds <= 0:
            raise ValueError("none of its sound can be decoded")
        if seconds < LEAST:
            raise ValueError(f"it has only {1000 * seconds:.2g} ms of sound")
        if seconds > limits.seconds:
            raise ValueError(limits.exceeded("seconds", f"it has {seconds:,.0f} seconds of sound"))
        return Size(1, 1, max(1, round(seconds * sound.rate)), seconds)


def read_sound(file: File, size: Size, rate: int) -> Tensor:
    """(samples,), float32 in -1..1: the mean of all channels, at a rate in samples per second.

    Args:
        size: the size that was measured. It tells the number of samples.

    Raises:
        ExampleError: the file is missing or broken, or is not the one that was measured.
    """
    wanted = samples_of(size, rate)
    with opened(file, "decoded") as stream, opened_container(stream, Limits(), CONTAINERS, "sound") as container:
        pieces, number = list[np.ndarray](), 0
        for piece in _pieces(container, rate):
            pieces.append(piece)
            number += len(piece)
            if number > wanted + TOLERANCE * rate:
                break
    if not pieces or abs(number - wanted) > TOLERANCE * rate:
        check_same(file, f"{number / rate:.2f} seconds of sound", f"{size.seconds:.2f} seconds")
    sound = torch.zeros(wanted)
    found = torch.from_numpy(np.concatenate(pieces)[:wanted])
    sound[: len(found)] = found
    return sound


def samples_of(size: Size, rate: int) -> int:
    """The number of samples of a sound at a rate."""
    return max(1, round(size.seconds * rate))


def _stream(container: Any) -> Any:
    """The sound of a container.

    Raises:
        ValueError: there is none that can be decoded.
    """
    if not container.streams.audio:
        raise ValueError("it has video, but no sound" if container.streams.video else "it has no sound")
    sound = container.streams.audio[0]
    if sound.codec_context is None:
        raise ValueError("there is no decoder for its sound")
    return sound


def _pieces(container: Any, rate: int) -> Iterator[np.ndarray]:
    """The samples of a container's sound, one channel at this rate."""
    from av import AudioResampler

    resampler = AudioResampler(format="fltp", rate=rate)  # FFmpeg's own mix of channels would be louder than their mean
    for frame in container.decode(_stream(container)):
        if frame.is_corrupt:
            raise ValueError(f"it is damaged at {float(frame.time or 0):.2f} s")
        frame.pts = None  # gaps in the times of packets are no silence
        for made in resampler.resample(frame):
            yield made.to_ndarray().mean(0)
    for made in resampler.resample(None):
        yield made.to_ndarray().mean(0)
