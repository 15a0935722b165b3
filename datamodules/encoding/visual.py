"""Prepares images and videos for encoders, and images as targets of generators.

Shape suffixes: T frames, C channels, H and W pixels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from ..example import Image, Size, Video
from ..media.decoding import check_reading, read_frames, read_image
from ..media.frame_choice import evenly_spaced, frame_count
from .media_processor import Augment, MediaPlan, MediaProcessor


class VisualProcessor(MediaProcessor):
    """Prepares images and videos for one model."""


@dataclass(frozen=True)
class PatchProcessor(VisualProcessor):
    """Prepares images of any size for encoders that make one row of every patch, such as `VisionEncoder`.

    An item keeps its aspect ratio as far as whole patches allow, and its resolution as far as the limits of rows allow.

    Attributes:
        patch_size: side of a patch in pixels.
        min_rows, max_rows: limits of the number of rows of an image, or of a frame.
        fps: number of frames used per second of a video.
        max_frames: maximum number of frames of a video; longer videos are sampled more sparsely.
        max_video_rows: maximum number of rows of a video. To meet it, first the frames are made smaller, then fewer
            are used.
        channels: 3, or 1 for gray.
        mean, std: pixels in 0..1 become (pixel - mean) / std.
        image_encoder, video_encoder: the model's names of the encoders.
        attention_rows: rows of one image at which attention costs as much as the rest of the encoder.
    """

    patch_size: int = 16
    min_rows: int = 1
    max_rows: int = 256
    fps: float = 2.0
    max_frames: int = 64
    max_video_rows: int = 4096
    channels: int = 3
    mean: float = 0.5
    std: float = 0.5
    image_encoder: str = "image"
    video_encoder: str = "image"
    attention_rows: int = 4096

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise ValueError(f"channels={self.channels}: images are read with 1 (gray) or 3 (RGB)")
        if not 1 <= self.min_rows <= self.max_rows:
            raise ValueError(f"min_rows={self.min_rows} and max_rows={self.max_rows}: 1 <= min_rows <= max_rows")
        if self.max_frames < 1 or self.fps <= 0 or self.max_video_rows < 1:
            raise ValueError("fps, max_frames and max_video_rows must be positive")

    def plan(self, item: Image | Video, size: Size, alone: bool = True) -> MediaPlan:
        if isinstance(item, Image):
            height, width = self._fit(size, self.min_rows, self.max_rows)
            return self._plan(self.image_encoder, height, width, ())
        count = frame_count(size, self.fps, self.max_frames)
        most = max(self.min_rows, min(self.max_rows, self.max_video_rows // count))
        height, width = self._fit(size, self.min_rows, most)
        count = max(1, min(count, self.max_video_rows // (height * width)))
        check_reading(item.file, size, count)
        return self._plan(self.video_encoder, height, width, evenly_spaced(size.frames, count))

    def _plan(self, encoder: str, rows_down: int, rows_across: int, frames: tuple[int, ...]) -> MediaPlan:
        per_frame, count = rows_down * rows_across, max(1, len(frames))
        rows = per_frame * count
        cost = rows * (1 + per_frame / self.attention_rows)
        side = self.patch_size
        return MediaPlan(encoder, rows, cost, rows_down * side, rows_across * side, frames)

    def _fit(self, size: Size, least: int, most: int) -> tuple[int, int]:
        """The numbers of patches down and across: between `least` and `most` in all, in about the shape of the item."""
        down, across = size.height / self.patch_size, size.width / self.patch_size
        scale = math.sqrt(max(least, min(most, down * across)) / (down * across))
        rows, columns = max(1, round(down * scale)), max(1, round(across * scale))
        while rows * columns > most:
            if rows >= columns:
                rows -= 1
            else:
                columns -= 1
        while rows * columns < least:
            if rows <= columns:
                rows += 1
            else:
                columns += 1
        return (rows, columns) if rows * columns <= most else (least, 1)

    def load(self, item: Image | Video, size: Size, plan: MediaPlan, augment: Augment | None = None) -> Tensor:
        """(C, H, W) for an image, (T, C, H, W) for a video, float32."""
        mode = "RGB" if self.channels == 3 else "L"
        if isinstance(item, Image):
            pixels = read_image(item.file, size, mode)
        else:
            pixels = read_frames(item.file, size, plan.frames, mode)
        return self.finish(pixels if augment is None else augment(pixels), plan.height, plan.width)

    def finish(self, pixels: Tensor, height: int, width: int) -> Tensor:
        """Resize and normalize uint8 pixels (..., C, H, W)."""
        resized = functional.resize(pixels, [height, width], antialias=True)
        return (resized.float() / 255 - self.mean) / self.std


@dataclass(frozen=True)
class TargetProcessor:
    """Prepares targets for generators that make pixels: images of one shape with values in -1..1.

    Attributes:
        generator: the model's name of the generator.
        rows: number of tokens whose final hidden states condition the generator.
        shape: (C, H, W).
        cost: generator time of one image in a unit shared by all targets.
        encoder: the model's name of the `NoisyPictureEncoder` that also gets each target, of a `UnifiedLM`; `rows` is
            then the number of patches. ``None``: no encoder does.
    """

    generator: str = "image"
    rows: int = 4
    shape: tuple[int, int, int] = (3, 32, 32)
    cost: float = 1.0
    encoder: str | None = None

    def load(self, image: Image, size: Size) -> Tensor:
        """The target of an image, of `shape`, float32.

        Raises:
            ExampleError: the file is broken.
        """
        channels, height, width = self.shape
        pixels = read_image(image.file, size, "RGB" if channels == 3 else "L")
        return functional.resize(pixels, [height, width], antialias=True).float() / 127.5 - 1


def seeded_augment(transforms: Sequence[Augment], seed: int) -> Augment:
    """Transforms that draw the same random numbers in every process, and do not change the process's random state."""

    def augment(pixels: Tensor) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for transform in transforms:
                pixels = transform(pixels)
        return pixels

    return augment
