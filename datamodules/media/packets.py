"""The packets of a video: the time at which the frame of each is shown, and the frames that the decoder makes of them.

A decoder may silently leave frames of a damaged video out, or invent some. So it is checked that the frame of every
packet comes out of the decoder, undamaged and in order.
"""

import gc
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from heapq import heapify, heappop, heappush
from typing import Any, BinaryIO

from ..limits import Limits
from .mp4_samples import check_samples

# A decoder has threads, which a process that is forked off lacks. There the garbage collector might free a decoder of
# before, which a traceback has kept, and wait for its threads for ever. So it leaves alone what there was before.
os.register_at_fork(after_in_child=gc.freeze)

CONTAINERS = ("mov", "matroska", "avi", "mpegts", "mpeg", "flv", "asf", "gif")
"""FFmpeg's names of the containers of videos that are read; "mov" includes MP4. Others are playlists, for which FFmpeg
would open further files."""

SEEKABLE = ("mov", "matroska", "avi", "mpegts")
"""Containers that store the time of each packet. In others FFmpeg computes it from the times of the packets before."""


@contextmanager
def opened_container(
    stream: BinaryIO, limits: Limits, containers: Sequence[str] = CONTAINERS, what: str = "video"
) -> Iterator[Any]:
    """
    Args:
        containers: FFmpeg's names of those that may be read.
        what: what the file should be.

    Raises:
        ValueError: it is none, is damaged, or would take too much memory.
    """
    import av
    import av.error

    check_samples(stream)
    # FFmpeg decodes frames when it opens a file, so it must know the limit
    options = {"format_whitelist": ",".join(containers), "max_pixels": str(limits.pixels)}
    try:
        container = av.open(stream, metadata_errors="ignore", options=options)
    except (av.error.ArgumentError, av.error.InvalidDataError, av.error.EOFError) as error:
        raise ValueError(
            f"it is no {what}, or broken from its first bytes on; containers that are read: {', '.join(containers)}"
        ) from error
    try:
        with container:
            yield container
    except av.error.FFmpegError as error:
        raise ValueError(f"it is damaged, or of a kind that there is no decoder for: {error.strerror}") from error


class VideoStream:
    """The video stream of a container.

    Attributes:
        counted: whether the time of a frame follows only from its number: AVI has no presentation times, and those that
            FFmpeg invents are wrong if frames are not stored in the order in which they are shown.
        seekable: whether packets have the same times wherever reading starts.
        time_base: the unit of all times, in seconds.
        end: the end of the last frame whose packet was read.
    """

    def __init__(self, container: Any, limits: Limits) -> None:
        """
        Raises:
            ValueError: there is no video stream that can be decoded, or its frames are too large.
        """
        # the cover picture of a song is a video stream, too
        streams = [s for s in container.streams.video if not s.disposition & s.disposition.attached_pic]
        if not streams:
            raise ValueError("it has sound, but no video" if container.streams.audio else "it has no video")
        self.container, self.stream = container, streams[0]
        context = self.stream.codec_context
        if context is None:
            raise ValueError("there is no decoder for its video")
        if context.width * context.height > limits.pixels:
            raise ValueError(limits.exceeded("pixels", f"it has {context.height} x {context.width} pixels"))
        context.options = {"max_pixels": str(limits.pixels)}
        context.thread_type = "SLICE"  # frame threads would decode frames that nobody asked for
        self.codec = context.codec.canonical_name
        self.counted = container.format.name == "avi" and context.has_b_frames
        self.seekable = container.format.name.startswith(SEEKABLE) and not self.counted
        self.time_base = self.stream.time_base
        self.end = 0

    def packets(self) -> Iterator[Any]:
        """The packets from the current position on. The last one is empty, to flush the decoder."""
        return self.container.demux(self.stream)

    def seek(self, time: int) -> None:
        """Go to the last keyframe before a time, as far as the container knows."""
        self.container.seek(time, stream=self.stream)

    def seconds(self, time: int) -> str:
        return f"{float(time * self.time_base):.2f} s"

    def time_of(self, packet: Any) -> int | None:
        """The time at which the packet's frame is shown; ``None``: it has no frame that is shown.

        Raises:
            ValueError: the packet is damaged.
        """
        if packet.size == 0 or packet.is_discard or self._is_hidden(packet):
            return None
        time = packet.dts if self.counted else packet.pts
        if time is None:
            raise ValueError("it has packets without times")
        if packet.is_corrupt:
            raise ValueError(f"it is damaged or breaks off at {self.seconds(time)}")
        return time

    def _is_hidden(self, packet: Any) -> bool:
        """Whether the packet's frame is not shown, and only other frames refer to it."""
        if self.codec == "vp8":
            return not memoryview(packet)[0] & 0x10  # show_frame
        if self.codec == "vp9":
            data = memoryview(packet)
            header = data[0] if data[0] & 0x30 == 0x30 else data[0] >> 1  # show_existing_frame, frame_type, show_frame
            return data[-1] & 0xE0 != 0xC0 and not header & 0x05  # not several frames, of which one is shown
        return False

    def frames(self, packets: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        """The frames with their times, in the order in which they are shown, from the first that can be decoded.

        Raises:
            ValueError: a packet or frame is damaged; or a frame is missing, or has another size.
        """
        due: list[int] = []  # a heap of the times of packets whose frames the decoder has not returned yet
        floor: int | None = None  # frames before this time refer to frames before the start, and cannot be decoded
        keyed, begun, shape = False, False, None
        for packet in packets:
            is_last = packet.size == 0 and packet.dts is None
            if not is_last and (packet.size == 0 or not (keyed or packet.is_keyframe)):
                continue
            time = self.time_of(packet)
            if not keyed:
                keyed, floor = True, time
            if time is not None and (floor is None or time >= floor):
                heappush(due, time)
                self.end = max(self.end, time + (packet.duration or 0))
            for frame in packet.decode():
                if not begun and not self.counted:
                    if frame.pts is None or (floor is not None and frame.pts < floor):
                        continue
                    floor = frame.pts
                    due = [time for time in due if time >= frame.pts]
                    heapify(due)
                begun = True
                expected = heappop(due) if due else None
                if expected is None or frame.is_corrupt or not (self.counted or frame.pts == expected):
                    raise ValueError(f"it is damaged at {self.seconds(expected or frame.pts or 0)}")
                if shape not in (None, (frame.height, frame.width)):
                    raise ValueError(f"the size of its frames changes at {self.seconds(expected)}")
                shape = (frame.height, frame.width)
                yield expected, frame
        if due:
            raise ValueError(f"it is damaged or breaks off at {self.seconds(due[0])}")
