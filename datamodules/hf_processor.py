"""Images and videos as a processor of the transformers library prepares them, planned from their sizes alone.

Covers processors that cut media into patches on a grid (Qwen2-VL, Qwen2.5-VL, Qwen3-VL and those that share their
parts) and those that make one crop of a fixed size per image. Knows processors; knows nothing of models or ranks.

Shape suffixes: T frames, C channels, H and W pixels, E values of a patch.
"""

import sys
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from .decoding import read_frames, read_image
from .example import ExampleError, Image, Size, Video
from .visual import Augment, MediaPlan, VisualProcessor


@dataclass(frozen=True)
class HFVisual(VisualProcessor):
    """What the folder of a pretrained vision-language model says about its media.

    `MediaItem.data` is the processor's patches of an item, (t, h, w, E), where it makes a grid; else a crop, (C, H, W).

    Attributes:
        processor: as `AutoProcessor.from_pretrained` gives it.
        fps: frames of a video that are used per second.
        max_frames: of a video; longer ones are sampled more sparsely.
        image_encoder, video_encoder: the model's names.
    """

    processor: Any
    fps: float = 2.0
    max_frames: int = 64
    image_encoder: str = "image"
    video_encoder: str = "video"

    def fingerprint(self) -> str:
        settings = (self.fps, self.max_frames, self.image_encoder, self.video_encoder)
        parts = [getattr(self.processor, name, None) for name in ("image_processor", "video_processor")]
        return repr((settings, [part.to_json_string() for part in parts if part is not None]))

    @cached_property
    def _makes_grids(self) -> bool:
        return "image_grid_thw" in self.processor.image_processor.model_input_names

    def plan(self, item: Image | Video, size: Size) -> MediaPlan:
        if isinstance(item, Video):
            return self._plan_video(size)
        if not self._makes_grids:
            rows = self.processor._get_num_multimodal_tokens(image_sizes=[[size.height, size.width]])
            count = int(rows["num_image_tokens"][0])
            return MediaPlan(self.image_encoder, count, float(count), size.height, size.width)
        part = self.processor.image_processor
        height, width = _module(part).smart_resize(
            size.height,
            size.width,
            factor=part.patch_size * part.merge_size,
            min_pixels=part.size["shortest_edge"],
            max_pixels=part.size["longest_edge"],
        )
        return self._grid_plan(part, self.image_encoder, 1, height, width, ())

    def _plan_video(self, size: Size) -> MediaPlan:
        part = getattr(self.processor, "video_processor", None)
        if part is None or "video_grid_thw" not in part.model_input_names:
            raise ExampleError(f"has a video, which {type(self.processor).__name__} cannot prepare")
        count = max(1, min(round(size.seconds * self.fps), size.frames, self.max_frames))
        frames = tuple(int((i + 0.5) * size.frames / count) for i in range(count))
        arguments = {
            "factor": part.patch_size * part.merge_size,
            "min_pixels": part.size["shortest_edge"],
            "max_pixels": part.size["longest_edge"],
        }
        resize = _module(part).smart_resize
        if "num_frames" in resize.__code__.co_varnames:  # Qwen3-VL's pixel limits are those of the whole video
            arguments |= {"num_frames": count, "temporal_factor": part.temporal_patch_size}
        height, width = resize(height=size.height, width=size.width, **arguments)
        return self._grid_plan(
            part, self.video_encoder, -(-count // part.temporal_patch_size), height, width, frames, size
        )

    def _grid_plan(
        self,
        part: Any,
        encoder: str,
        t: int,
        height: int,
        width: int,
        frames: tuple[int, ...],
        video: Size | None = None,
    ) -> MediaPlan:
        grid = (t, height // part.patch_size, width // part.patch_size)
        patches = grid[0] * grid[1] * grid[2]
        text = None if video is None else self._video_text(grid, frames, video)
        return MediaPlan(encoder, patches // part.merge_size**2, float(patches), height, width, frames, grid, text)

    def _video_text(self, grid: tuple[int, int, int], frames: tuple[int, ...], size: Size) -> str:
        """What stands for a video in the text: with Qwen3-VL, each of its time steps with the time it shows."""
        import torch

        given = {"video_grid_thw": torch.tensor([grid]), "video_metadata": [_metadata(frames, size)]}
        return self.processor.replace_video_token(given, 0)

    def load(self, item: Image | Video, size: Size, plan: MediaPlan, augment: Augment | None = None) -> Tensor:
        if isinstance(item, Image):
            pixels = read_image(item.file, size)
            pixels = pixels if augment is None else augment(pixels)
            made = self.processor.image_processor(images=[pixels], return_tensors="pt")
            if plan.grid is None:
                return made["pixel_values"][0]
            return self._checked(item, made["pixel_values"], made["image_grid_thw"], plan.grid)
        pixels = read_frames(item.file, size, plan.frames)
        pixels = pixels if augment is None else augment(pixels)
        made = self.processor.video_processor(
            videos=[pixels], video_metadata=[_metadata(plan.frames, size)], do_sample_frames=False, return_tensors="pt"
        )
        assert plan.grid is not None, "videos have a grid"
        return self._checked(item, made["pixel_values_videos"], made["video_grid_thw"], plan.grid)

    def _checked(self, item: Image | Video, patches: Tensor, grids: Tensor, grid: tuple[int, int, int]) -> Tensor:
        if tuple(grids[0].tolist()) != grid:
            raise ExampleError(
                f"{item.file.name} became a grid of {grids[0].tolist()} patches, but {grid} was expected of its size: "
                "augmentation must keep the size with this processor"
            )
        return patches.unflatten(0, grid)


def _metadata(frames: tuple[int, ...], size: Size) -> Any:
    from transformers.video_utils import VideoMetadata

    return VideoMetadata(
        total_num_frames=size.frames,
        fps=size.frames / size.seconds,
        duration=size.seconds,
        height=size.height,
        width=size.width,
        frames_indices=list(frames),
    )


def _module(part: Any) -> Any:
    """The module of the transformers library that a processor's class stands in: there is its resizing rule."""
    return sys.modules[type(part).__module__]
