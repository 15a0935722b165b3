"""Videos, read by PyAV: sizes from packets, of which only the first is decoded, and the frames at given times.

A frame is shown from the presentation time of its packet to that of the next packet. The duration that a container
states is ignored, since it may be that of the sound.

Shape suffixes: T frames, C channels, H and W pixels.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from ..errors import ExampleError
from ..example import Size
from ..files import File
from ..limits import Limits
from .images import Mode, on_white
from .opening import check_same, opened
from .packets import VideoStream, opened_container

MAX_PIXELS = Limits().pixels
"""Most pixels of a frame that is decoded, if it has another size than the first frame."""

MAX_READ_PIXELS = 2 * 1024 * 1024 * 1024
"""Most pixels of the frames that are read of one video: 6 GiB in RGB."""

SKIP = 4.0
"""Distance in seconds of the next wanted frame from which on the reader seeks to the keyframe before it, and does not
decode all frames up to it. It is an estimate for videos with a keyframe every few seconds, and grows in `_seek`."""

EARLIER = (0.0, 10.0, 100.0)
"""How many seconds before a time to seek, one after another, to find the keyframe before it: some containers find the
keyframe after the time."""


def video_size(stream: BinaryIO, limits: Limits) -> Size:
    """The size of a video as displayed, counting the frames that can be decoded.

    If the header of an MP4 or MOV file lists all packets, only those at its start and end are read. All packets of
    other files are read.

    Raises:
        ValueError: the video could not be decoded correctly, or exceeds the limits. PyAV may raise other exceptions.
    """
    size = _size(stream, limits, by_header=True) or _size(stream, limits, by_header=False)
    assert size is not None
    return size


def _size(stream: BinaryIO, limits: Limits, by_header: bool) -> Size | None:
    """The size; ``None``: `by_header` is true, and the header lists only some of the packets."""
    stream.seek(0)
    with opened_container(stream, limits) as container:
        video = VideoStream(container, limits)
        packets, first = video.packets(), []
        start, frame = next(video.frames(_recorded(packets, first)), (0, None))
        if frame is None:
            raise ValueError("none of its frames can be decoded")
        tally = _Tally(video, start, limits)
        for packet in first:
            tally.add(packet)
        if by_header and tally.is_listed():
            if not tally.add_listed(packets):
                return None
        else:
            for packet in packets:
                tally.add(packet)
        height, width = (frame.width, frame.height) if _rotation(frame)[0] else (frame.height, frame.width)
        return Size(height, width, tally.frames, tally.seconds())


def _recorded(packets: Iterator[Any], into: list[Any]) -> Iterator[Any]:
    """The packets, each of which is appended to a list when it is read."""
    for packet in packets:
        into.append(packet)
        yield packet


class _Tally:
    """Counts the frames of a video by their packets.

    Args:
        start: time of the first frame that can be decoded; frames before it are not counted.
    """

    def __init__(self, video: VideoStream, start: int, limits: Limits) -> None:
        self.video, self.start, self.limits = video, start, limits
        self.frames, self.before = 0, 0
        self.last, self.duration = start, 0

    def add(self, packet: Any) -> None:
        """Count the frame of a packet.

        Raises:
            ValueError: the packet is damaged, or the video has too many frames.
        """
        time = self.video.time_of(packet)
        if time is None:
            return
        if time < self.start:
            self.before += 1
            return
        self.frames += 1
        self._check_frames()
        if time >= self.last:
            self.last, self.duration = time, packet.duration or 0

    def _check_frames(self) -> None:
        if self.frames > self.limits.frames:
            raise ValueError(self.limits.exceeded("frames", f"it has {self.frames:,} frames or more"))

    def is_listed(self) -> bool:
        """Whether the container has a list of packets, each of which has one frame."""
        named, listed = self.video.container.format.name, self.video.stream.index_entries
        return named.startswith("mov") and self.video.codec not in ("vp8", "vp9") and len(listed) > 0

    def add_listed(self, packets: Iterator[Any]) -> bool:
        """Count all packets, by the header's list and by reading the start and the end of the file.

        Args:
            packets: the next packets of the file.

        Returns: whether the header lists all packets.

        Raises:
            ValueError: the file breaks off.
        """
        listed = list(self.video.stream.index_entries)
        end, size = max(entry.pos + entry.size for entry in listed), self.video.container.size
        if end > size:
            raise ValueError(f"it breaks off: its header lists frames up to byte {end:,} of {size:,}")
        for packet in packets:  # their frames may be shown before the first that can be decoded
            self.add(packet)
            if packet.dts is None or packet.dts >= self.start:
                break
        self.video.seek(listed[-1].timestamp)
        for packet in self.video.packets():
            self.add(packet)
            if packet.dts is not None and packet.dts > listed[-1].timestamp:
                return False  # the header of a fragmented file lists only its first packets
        self.frames = sum(entry.size > 0 and not entry.is_discard for entry in listed) - self.before
        self._check_frames()
        return True

    def seconds(self) -> float:
        """The duration from the first frame to the end of the last."""
        if self.duration:
            duration = self.duration
        elif self.frames > 1:
            duration = (self.last - self.start) / (self.frames - 1)
        else:
            duration = 1 / (self.video.stream.guessed_rate or 25) / self.video.time_base
        return float((self.last - self.start + duration) * self.video.time_base)


def check_reading(file: File, size: Size, frames: int) -> None:
    """
    Args:
        frames: number of frames that are used.

    Raises:
        ExampleError: so many frames would need too much memory at once.
    """
    if frames * size.height * size.width > MAX_READ_PIXELS:
        raise ExampleError(
            f"{file.name} has {size.height} x {size.width} pixels in each of {frames} frames that are to be used; the "
            f"most is {MAX_READ_PIXELS:,} in all: lower max_frames or fps, or make the video smaller"
        )


def read_frames(file: File, size: Size, frames: Sequence[int], mode: Mode = "RGB") -> Tensor:
    """video_TCHW, uint8: the frames with these numbers, as displayed.

    The numbers count equally long parts of the video's time, as many as it has frames, and the frame that is shown in
    the middle of a part is read. If all frames last equally long, part 5 is frame 5.

    Args:
        size: the size that was measured.
        frames: numbers of the parts, in rising order.

    Raises:
        ExampleError: the file is missing or broken, or is not the one that was measured.
    """
    assert list(frames) == sorted(frames)
    limits = Limits(pixels=max(MAX_PIXELS, size.height * size.width))
    with opened(file, "decoded") as stream:
        with opened_container(stream, limits) as container:
            shown = _Shown(VideoStream(container, limits), size.seconds / size.frames, skip=SKIP)
            try:
                return _pixels(file, size, frames, mode, shown)
            except ValueError:
                if not shown.sought:
                    raise
        stream.seek(0)
        with opened_container(stream, limits) as container:  # some files have wrong times after a seek
            shown = _Shown(VideoStream(container, limits), size.seconds / size.frames, skip=math.inf)
            return _pixels(file, size, frames, mode, shown)


def _pixels(file: File, size: Size, frames: Sequence[int], mode: Mode, shown: "_Shown") -> Tensor:
    video_TCHW = torch.empty((len(frames), 3 if mode == "RGB" else 1, size.height, size.width), dtype=torch.uint8)
    for t, slot in enumerate(frames):
        pixels_CHW = _displayed(shown.at((slot + 0.5) * size.seconds / size.frames), mode)
        check_same(file, "{1} x {2}".format(*pixels_CHW.shape), f"{size.height} x {size.width}")
        video_TCHW[t] = pixels_CHW
    return video_TCHW


class _Shown:
    """The frames that a video shows at rising times.

    Args:
        length: duration of the last frame in seconds, if the video does not state it.
        skip: distance in seconds to the next wanted frame from which on it seeks.

    Attributes:
        sought: whether it has sought.
    """

    def __init__(self, video: VideoStream, length: float, skip: float) -> None:
        self.video, self.length = video, length
        self.skip, self.sought = skip if video.seekable else math.inf, False
        self._decode_from_here()
        if self.now is None:
            raise ValueError("none of its frames can be decoded")
        self.start = self.now[0]

    def _decode_from_here(self) -> None:
        self.frames = self.video.frames(self.video.packets())
        self.now = self.next = next(self.frames, None)

    def at(self, seconds: float) -> Any:
        """The frame that is shown at a time.

        Args:
            seconds: time since the first frame.

        Raises:
            ValueError: the video is damaged, or ends before that time.
        """
        time = self.start + math.floor(seconds / self.video.time_base + 1e-6)
        assert self.now is not None
        if (time - self.now[0]) * self.video.time_base > self.skip:
            self._seek(time, self.now[0])
        while self.next is not None and self.next[0] <= time:
            self.now, self.next = self.next, next(self.frames, None)
        if self.next is None and time > max(self.video.end, self.now[0] + self.length / self.video.time_base):
            raise ValueError(f"it breaks off at {self.video.seconds(self.video.end)}")
        return self.now[1]

    def _seek(self, time: int, reached: int) -> None:
        """Go to the last keyframe before a time, if it lies after the time that decoding has reached."""
        self.sought = True
        for earlier in (*EARLIER, math.inf):
            self.video.seek(self.start if earlier == math.inf else time - int(earlier / self.video.time_base))
            self._decode_from_here()
            if self.now is not None and self.now[0] <= time:
                break
        else:
            raise ValueError(f"its frames before {self.video.seconds(time)} are not found")
        if (
            self.now[0] <= reached
        ):  # these frames are decoded a second time, which must not happen often where keyframes are rare
            self.skip *= 2


def _displayed(frame: Any, mode: Mode) -> Tensor:
    """pixels_CHW of a frame, on white, and rotated by its display matrix."""
    if any(component.is_alpha for component in frame.format.components):
        pixels = np.array(on_white(PIL.Image.fromarray(frame.to_ndarray(format="rgba"))).convert(mode))
    else:
        pixels = frame.to_ndarray(format={"L": "gray", "RGB": "rgb24"}[mode])
    pixels_CHW = torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1)
    transposed, flipped = _rotation(frame)
    return (pixels_CHW.transpose(1, 2) if transposed else pixels_CHW).flip(flipped)


def _rotation(frame: Any) -> tuple[bool, list[int]]:
    """How a frame is rotated and mirrored for display.

    Returns: whether rows become columns, and the dimensions (of C, H, W) that are reversed after that.

    Raises:
        ValueError: it is rotated by an angle that is no right angle.
    """
    from av.sidedata.sidedata import SideDataContainer

    # frame.side_data and the frame would keep each other alive, and with them threads that a forked process lacks
    side_data: Any = SideDataContainer
    matrix = side_data(frame).get("DISPLAYMATRIX")
    if matrix is None:
        return False, []
    a, b, _, c, d, *_ = np.frombuffer(matrix, np.int32).astype(float)  # x' = ax + cy, y' = bx + dy
    across = abs(b) + abs(c) > abs(a) + abs(d)
    right, down, rest = (c, b, (a, d)) if across else (a, d, (b, c))
    if max(map(abs, rest)) >= 0.01 * min(abs(right), abs(down)):
        raise ValueError("it is to be turned by an angle other than 90, 180 or 270 degrees")
    return across, [dim for dim, sign in ((1, down), (2, right)) if sign < 0]
