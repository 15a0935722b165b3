"""The packets of a video: when the frame of each is shown, and the frames that come out of the decoder for them.

That each packet's frame does come, undamaged and in its order, is checked: a decoder may leave frames out, or make some
up. Knows PyAV; knows nothing of files' names or of pixels.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from heapq import heapify, heappop, heappush
from typing import Any, BinaryIO

from .opening import MAX_PIXELS

CONTAINERS = ("mov", "matroska", "avi", "mpegts", "mpeg", "flv", "asf", "gif")
"""By FFmpeg's names; "mov" is MP4, too. Others it could open are playlists, which have it open further files."""

SEEKABLE = ("mov", "matroska", "avi", "mpegts")
"""Containers that tell the time of each packet; in others FFmpeg reckons it from that of the packets before."""


@contextmanager
def opened_container(stream: BinaryIO) -> Iterator[Any]:
    import av
    import av.error

    try:
        container = av.open(stream, metadata_errors="ignore", options={"format_whitelist": ",".join(CONTAINERS)})
    except (av.error.ArgumentError, av.error.InvalidDataError, av.error.EOFError) as error:
        raise ValueError(
            f"it is no video, or broken from its first bytes on; containers that are read: {', '.join(CONTAINERS)}"
        ) from error
    try:
        with container:
            yield container
    except av.error.FFmpegError as error:
        raise ValueError(f"it is damaged, or of a kind that there is no decoder for: {error.strerror}") from error


class VideoStream:
    """The pictures of a container.

    Attributes:
        counted: whether a frame's time is told by its place among the others alone: AVI has no presentation times, and
            those that FFmpeg makes up are wrong where frames are not stored in the order in which they are shown.
        seekable: whether packets have the same times wherever reading starts.
        time_base: seconds, in which all times are counted.
        end: of the last frame whose packet was read.
    """

    def __init__(self, container: Any) -> None:
        """
        Raises:
            ValueError: there is none that could be decoded.
        """
        # the picture of a song's cover is a video stream, too
        streams = [s for s in container.streams.video if not s.disposition & s.disposition.attached_pic]
        if not streams:
            raise ValueError("it has sound, but no video" if container.streams.audio else "it has no video")
        self.container, self.stream = container, streams[0]
        context = self.stream.codec_context
        if context is None:
            raise ValueError("there is no decoder for its video")
        if context.width * context.height > MAX_PIXELS:
            raise ValueError(f"it has {context.height} x {context.width} pixels; the most is {MAX_PIXELS:,}")
        context.options = {"max_pixels": str(MAX_PIXELS)}
        context.thread_type = "SLICE"  # frame threads would decode ahead of what is wanted
        self.codec = context.codec.canonical_name
        self.counted = container.format.name == "avi" and context.has_b_frames
        self.seekable = container.format.name.startswith(SEEKABLE) and not self.counted
        self.time_base = self.stream.time_base
        self.end = 0

    def packets(self) -> Iterator[Any]:
        """From where the container stands; the last is empty, which makes the decoder give what it holds."""
        return self.container.demux(self.stream)

    def seek(self, time: int) -> None:
        """To the last keyframe before, as far as the container knows."""
        self.container.seek(time, stream=self.stream)

    def seconds(self, time: int) -> str:
        return f"{float(time * self.time_base):.2f} s"

    def time_of(self, packet: Any) -> int | None:
        """When its frame is shown; ``None``: it has none that is.

        Raises:
            ValueError: it is damaged.
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
        """Whether its frame is only there for others to refer to."""
        if self.codec == "vp8":
            return not memoryview(packet)[0] & 0x10  # show_frame
        if self.codec == "vp9":
            data = memoryview(packet)
            header = data[0] if data[0] & 0x30 == 0x30 else data[0] >> 1  # show_existing_frame, frame_type, show_frame
            return data[-1] & 0xE0 != 0xC0 and not header & 0x05  # not several frames, of which one is shown
        return False

    def frames(self, packets: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        """Frames with their times, in the order in which they are shown, from the first that can be decoded.

        Raises:
            ValueError: a packet or frame is damaged; a frame does not come, or has another size.
        """
        due: list[int] = []  # times of packets whose frames the decoder still has
        floor: int | None = None  # what is to be shown before refers to what lies before, and cannot be decoded
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
