"""Images by Pillow, videos by PyAV: sizes from headers, pixels from bytes, and limits that broken files run into.

Knows files; knows nothing of encoders or tokens.

Shape suffixes: T frames, C channels, H and W pixels.
"""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps
import torch
from torch import Tensor

from .example import ExampleError, File, Image, Size, Video

MAX_PIXELS = 64 * 1024 * 1024
"""Of an image, or of one frame: a small file may decompress to far more memory than there is."""

SKIP = 4.0
"""Seconds of a video from which on jumping to the keyframe before the next frame wanted beats decoding up to it."""

Mode = Literal["L", "RGB"]


def measure(item: Image | Video) -> Size:
    """The size of an item: what its source knows, else from the header of its file.

    Raises:
        ExampleError: the file is missing or broken, or too large to be decoded.
    """
    if item.size is not None:
        size = item.size
    else:
        try:
            size = _image_size(item.file) if isinstance(item, Image) else _video_size(item.file)
        except Exception as error:
            raise ExampleError(f"{item.file.name} cannot be read: {_reason(error)}") from error
    if size.height * size.width > MAX_PIXELS:
        raise ExampleError(f"{item.file.name} has {size.height} x {size.width} pixels; the most is {MAX_PIXELS:,}")
    if min(size.height, size.width, size.frames) < 1:
        raise ExampleError(f"{item.file.name} is empty: {size}")
    return size


def read_image(file: File, size: Size, mode: Mode = "RGB") -> Tensor:
    """image_CHW, uint8, as displayed.

    Raises:
        ExampleError: the file is missing or broken, or another than was measured.
    """
    try:
        with file.open() as stream, PIL.Image.open(stream) as image:
            _check_same(file, _oriented_size(image), size)
            upright = PIL.ImageOps.exif_transpose(image) if _may_be_turned(image) else image
            pixels_HWC = np.array(upright.convert(mode))
    except ExampleError:
        raise
    except Exception as error:
        raise ExampleError(f"{file.name} cannot be decoded: {_reason(error)}") from error
    return torch.from_numpy(pixels_HWC.reshape(*pixels_HWC.shape[:2], -1)).permute(2, 0, 1).contiguous()


def read_frames(file: File, size: Size, frames: Sequence[int], mode: Mode = "RGB") -> Tensor:
    """video_TCHW, uint8: these frames, numbered by their presentation time, in rising order.

    Raises:
        ExampleError: the file is missing or broken, or another than was measured.
    """
    try:
        wanted = sorted(set(frames))
        got: dict[int, Tensor] = {}
        with file.open() as stream, _open_video(stream) as container:
            _check_same(file, _stream_size(container), size)
            times = [index / size.frames * size.seconds for index in wanted]
            for index, frame in zip(wanted, _frames_at(container, times, size.seconds / size.frames), strict=False):
                pixels = torch.from_numpy(frame.to_ndarray(format={"L": "gray", "RGB": "rgb24"}[mode]))
                got[index] = pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
    except ExampleError:
        raise
    except Exception as error:
        raise ExampleError(f"{file.name} cannot be decoded: {_reason(error)}") from error
    if len(got) < len(wanted):
        raise ExampleError(f"{file.name} breaks off: {len(got)} of {len(wanted)} frames could be decoded")
    return torch.stack([got[index] for index in frames])


def _frames_at(container: Any, times: Sequence[float], duration: float) -> Iterator[Any]:
    """The frame that is shown at each of these times, in seconds from the start, rising; fewer if the video breaks off.

    Args:
        duration: of a frame.
    """
    video = container.streams.video[0]
    video.thread_type = "SLICE"  # frame threads would decode ahead of what is wanted
    start = float((video.start_time or 0) * video.time_base)
    frames, shown, at = container.decode(video), None, start
    for time in times:
        wanted = start + time
        if wanted - at > SKIP:
            container.seek(int(wanted / video.time_base), stream=video)
            frames, shown = container.decode(video), None
        while shown is None or at + 0.5 * duration <= wanted:
            shown = next(frames, None)
            if shown is None:
                return
            at = float(shown.time) if shown.time is not None else at + duration
        yield shown


def _image_size(file: File) -> Size:
    with file.open() as stream, PIL.Image.open(stream) as image:
        return _oriented_size(image)


def _oriented_size(image: PIL.Image.Image) -> Size:
    turned = _may_be_turned(image) and image.getexif().get(PIL.ExifTags.Base.Orientation, 1) >= 5
    width, height = image.size[::-1] if turned else image.size
    return Size(height, width)


def _may_be_turned(image: PIL.Image.Image) -> bool:
    """Whether it is of a format that cameras write; of others, reading the orientation could decode the whole image."""
    return image.format in ("JPEG", "MPO", "TIFF", "WEBP")


def _video_size(file: File) -> Size:
    with file.open() as stream, _open_video(stream) as container:
        return _stream_size(container)


def _open_video(stream: Any) -> Any:
    import av

    return av.open(stream, metadata_errors="ignore")


def _stream_size(container: Any) -> Size:
    if not container.streams.video:
        raise ValueError("it has no video stream")
    video = container.streams.video[0]
    rate = float(video.average_rate or video.guessed_rate or Fraction(25))
    seconds = float(video.duration * video.time_base) if video.duration else (container.duration or 0) / 1e6
    frames = video.frames or round(seconds * rate)
    return Size(video.height, video.width, frames, seconds or frames / rate)


def _check_same(file: File, found: Size, size: Size) -> None:
    if found != size:
        raise ExampleError(
            f"{file.name} is another than was measured: {found} instead of {size}. If it was replaced, or if the "
            "source gives wrong sizes, correct that; sizes of an earlier run are in the DataModule's cache_dir"
        )


def _reason(error: Exception) -> str:
    if isinstance(error, PIL.UnidentifiedImageError):
        return "not an image, or broken from its first bytes on"
    return f"{type(error).__name__}: {error}"
