"""Videos by PyAV: sizes from packets, of which the first alone is decoded, and what is shown at given times.

A frame is shown from its packet's presentation time to that of the next. What a container says of its duration counts
for nothing: it may be that of the sound. Knows video files; knows nothing of encoders or tokens.

Shape suffixes: T frames, C channels, H and W pixels.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from ..example import ExampleError, File, Size
from .images import Mode, on_white
from .opening import check_same, opened
from .packets import VideoStream, opened_container

MAX_FRAMES = 4 * 1024 * 1024
"""Of a video: 19 hours of 60 per second."""

MAX_READ_PIXELS = 2 * 1024 * 1024 * 1024
"""Of the frames of a video that are read together, at three bytes each."""

SKIP = 4.0
"""Seconds of a video from which on jumping to the keyframe before the next frame wanted beats decoding up to it."""

EARLIER = (0.0, 10.0, 100.0)
"""Seconds before a time at which to look for the keyframe before it: some containers find the one behind it."""


def video_size(stream: BinaryIO) -> Size:
    """As displayed, of the frames that can be decoded.

    Of an MP4 or MOV file whose header lists all packets, only those of its start and end are read; of others all are.

    Raises:
        ValueError: it could not be decoded rightly; and whatever PyAV raises.
    """
    size = _measured(stream, by_header=True) or _measured(stream, by_header=False)
    assert size is not None
    return size


def _measured(stream: BinaryIO, by_header: bool) -> Size | None:
    """``None``: the header lists only some of the packets."""
    stream.seek(0)
    with opened_container(stream) as container:
        video = VideoStream(container)
        packets, first = video.packets(), []
        start, frame = next(video.frames(_noted(packets, first)), (0, None))
        if frame is None:
            raise ValueError("none of its frames can be decoded")
        tally = _Tally(video, start)
        for packet in first:
            tally.add(packet)
        if by_header and tally.is_listed():
            if not tally.add_listed(packets):
                return None
        else:
            for packet in packets:
                tally.add(packet)
        height, width = (frame.width, frame.height) if _turn(frame)[0] else (frame.height, frame.width)
        return Size(height, width, tally.frames, tally.seconds())


def _noted(packets: Iterator[Any], into: list[Any]) -> Iterator[Any]:
    for packet in packets:
        into.append(packet)
        yield packet


class _Tally:
    """Counts the frames of a video by their packets.

    Args:
        start: time of the first frame that can be decoded; those before do not count.
    """

    def __init__(self, video: VideoStream, start: int) -> None:
        self.video, self.start = video, start
        self.frames, self.before = 0, 0
        self.last, self.duration = start, 0

    def add(self, packet: Any) -> None:
        """
        Raises:
            ValueError: it is damaged, or one too many.
        """
        time = self.video.time_of(packet)
        if time is None:
            return
        if time < self.start:
            self.before += 1
            return
        self.frames += 1
        if self.frames > MAX_FRAMES:
            raise ValueError(f"it has more than {MAX_FRAMES:,} frames")
        if time >= self.last:
            self.last, self.duration = time, packet.duration or 0

    def is_listed(self) -> bool:
        """Whether the container has a list of packets, and a packet is a frame."""
        named, listed = self.video.container.format.name, self.video.stream.index_entries
        return named.startswith("mov") and self.video.codec not in ("vp8", "vp9") and len(listed) > 0

    def add_listed(self, packets: Iterator[Any]) -> bool:
        """All packets, from the list and from what is read at the file's start and end; ``False``: there are more.

        Args:
            packets: that come next.

        Raises:
            ValueError: it breaks off.
        """
        listed = list(self.video.stream.index_entries)
        end, size = max(entry.pos + entry.size for entry in listed), self.video.container.size
        if end > size:
            raise ValueError(f"it breaks off: its header lists frames up to byte {end:,} of {size:,}")
        for packet in packets:  # whose frames may be shown before the first that can be decoded
            self.add(packet)
            if packet.dts is None or packet.dts >= self.start:
                break
        self.video.seek(listed[-1].timestamp)
        for packet in self.video.packets():
            self.add(packet)
            if packet.dts is not None and packet.dts > listed[-1].timestamp:
                return False  # a fragmented file, whose header lists its first packets only
        self.frames = sum(entry.size > 0 and not entry.is_discard for entry in listed) - self.before
        return True

    def seconds(self) -> float:
        """From the first frame to the end of the last."""
        if self.duration:
            duration = self.duration
        elif self.frames > 1:
            duration = (self.last - self.start) / (self.frames - 1)
        else:
            duration = 1 / (self.video.stream.guessed_rate or 25) / self.video.time_base
        return float((self.last - self.start + duration) * self.video.time_base)


def check_reading(file: File, size: Size, frames: int) -> None:
    """
    Raises:
        ExampleError: so many frames would need too much memory at once.
    """
    if frames * size.height * size.width > MAX_READ_PIXELS:
        raise ExampleError(
            f"{file.name} has {size.height} x {size.width} pixels in each of {frames} frames that are to be used; the "
            f"most is {MAX_READ_PIXELS:,} in all: lower max_frames or fps, or make the video smaller"
        )


def read_frames(file: File, size: Size, frames: Sequence[int], mode: Mode = "RGB") -> Tensor:
    """video_TCHW, uint8: what is shown in the middle of each of these slots, in rising order, as displayed.

    The video's time is cut into as many equal slots as it has frames: where all last equally long, slot 5 is frame 5.

    Raises:
        ExampleError: the file is missing or broken, or another than was measured.
    """
    assert list(frames) == sorted(frames)
    with opened(file, "decoded") as stream:
        with opened_container(stream) as container:
            shown = _Shown(VideoStream(container), size.seconds / size.frames, skip=SKIP)
            try:
                return _pixels(file, size, frames, mode, shown)
            except ValueError:
                if not shown.jumped:
                    raise
        stream.seek(0)
        with opened_container(stream) as container:  # some files tell wrong times behind a jump: do without
            shown = _Shown(VideoStream(container), size.seconds / size.frames, skip=math.inf)
            return _pixels(file, size, frames, mode, shown)


def _pixels(file: File, size: Size, frames: Sequence[int], mode: Mode, shown: "_Shown") -> Tensor:
    video_TCHW = torch.empty((len(frames), 3 if mode == "RGB" else 1, size.height, size.width), dtype=torch.uint8)
    for t, slot in enumerate(frames):
        pixels_CHW = _displayed(shown.at((slot + 0.5) * size.seconds / size.frames), mode)
        check_same(file, "{1} x {2}".format(*pixels_CHW.shape), f"{size.height} x {size.width}")
        video_TCHW[t] = pixels_CHW
    return video_TCHW


class _Shown:
    """What a video shows at times that only rise.

    Args:
        length: seconds that the last frame is shown, if nothing says how long.
        skip: from how many seconds on it jumps.

    Attributes:
        jumped: whether it has.
    """

    def __init__(self, video: VideoStream, length: float, skip: float) -> None:
        self.video, self.length = video, length
        self.skip, self.jumped = skip if video.seekable else math.inf, False
        self._go_on_from_here()
        if self.now is None:
            raise ValueError("none of its frames can be decoded")
        self.start = self.now[0]

    def _go_on_from_here(self) -> None:
        self.frames = self.video.frames(self.video.packets())
        self.now = self.next = next(self.frames, None)

    def at(self, seconds: float) -> Any:
        """The frame that is shown.

        Args:
            seconds: from its first frame.

        Raises:
            ValueError: it is damaged, or ends before.
        """
        time = self.start + math.floor(seconds / self.video.time_base + 1e-6)
        assert self.now is not None
        if (time - self.now[0]) * self.video.time_base > self.skip:
            self._jump(time, self.now[0])
        while self.next is not None and self.next[0] <= time:
            self.now, self.next = self.next, next(self.frames, None)
        if self.next is None and time > max(self.video.end, self.now[0] + self.length / self.video.time_base):
            raise ValueError(f"it breaks off at {self.video.seconds(self.video.end)}")
        return self.now[1]

    def _jump(self, time: int, reached: int) -> None:
        """To the last keyframe before a time, if one lies ahead."""
        self.jumped = True
        for earlier in (*EARLIER, math.inf):
            self.video.seek(self.start if earlier == math.inf else time - int(earlier / self.video.time_base))
            self._go_on_from_here()
            if self.now is not None and self.now[0] <= time:
                break
        else:
            raise ValueError(f"its frames before {self.video.seconds(time)} are not found")
        if self.now[0] <= reached:  # decoded once more: do not make a habit of it where keyframes are rare
            self.skip *= 2


def _displayed(frame: Any, mode: Mode) -> Tensor:
    """pixels_CHW of a frame, on white and turned as its display matrix says."""
    if any(component.is_alpha for component in frame.format.components):
        pixels = np.array(on_white(PIL.Image.fromarray(frame.to_ndarray(format="rgba"))).convert(mode))
    else:
        pixels = frame.to_ndarray(format={"L": "gray", "RGB": "rgb24"}[mode])
    pixels_CHW = torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1)
    transposed, flipped = _turn(frame)
    return (pixels_CHW.transpose(1, 2) if transposed else pixels_CHW).flip(flipped)


def _turn(frame: Any) -> tuple[bool, list[int]]:
    """Whether rows become columns, and the dimensions to be reversed then.

    Raises:
        ValueError: it is to be turned by other than right angles.
    """
    from av.sidedata.sidedata import SideDataContainer

    # not frame.side_data: the two would hold each other and outlive the reading, with threads that a fork lacks
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
