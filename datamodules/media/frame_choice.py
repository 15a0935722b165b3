"""Which frames of a video are used."""

from ..example import Size


def frame_count(size: Size, fps: float, most: int) -> int:
    """How many frames of a video are used.

    Args:
        fps: frames used per second.
        most: maximum number of frames; longer videos are sampled more sparsely.
    """
    return max(1, min(round(size.seconds * fps), size.frames, most))


def evenly_spaced(frames: int, count: int) -> tuple[int, ...]:
    """The numbers of `count` of a video's frames: the middle ones of `count` equally long parts."""
    return tuple(int((i + 0.5) * frames / count) for i in range(count))
