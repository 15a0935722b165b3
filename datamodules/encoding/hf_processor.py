"""Images and videos as a processor of the transformers library prepares them, planned from their sizes alone.

A plan is what the library's own processor makes of pixels without values: sizes are computed, pixels never exist. So no
rule of resizing, of crops or of the text around them is written down here, and there is nothing to tell one family of
models from another. Knows processors; knows nothing of models or ranks.

Shape suffixes: T frames, C channels, H and W pixels, E values of a patch.
"""

import copy
import sys
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bigmac_lightning.contracts.batch import MediaData

from ..example import ExampleError, Image, Size, Video
from ..media.decoding import check_reading, read_frames, read_image
from .visual import Augment, MediaPlan, VisualProcessor

KEPT = 16384
"""Plans of images that are kept, of the sizes that came last."""


@dataclass(frozen=True)
class HFVisual(VisualProcessor):
    """What the folder of a pretrained vision-language model says about its media.

    `MediaItem.data` is what the processor makes of an item:

    - patches, (t, h, w, E), where it makes a grid of them;
    - else crops, (crops, C, H, W), or frames, (T, C, H, W);
    - where it tells the size of an image as well, a dict: "pixel_values" as above and "image_sizes", (2,).

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
    _plans: dict[Any, MediaPlan] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        part = self.processor.image_processor
        if getattr(part, "backend", "torchvision") != "torchvision":
            raise ValueError(
                f"{type(part).__name__} works by {part.backend!r}, which has to see pixels to tell their size: load "
                'the processor with AutoProcessor.from_pretrained(..., backend="torchvision")'
            )

    def fingerprint(self) -> str:
        import transformers

        settings = (self.fps, self.max_frames, self.image_encoder, self.video_encoder, transformers.__version__)
        given = [self._arguments[name] for name in ("images_kwargs", "videos_kwargs")]
        return repr((settings, given, self.processor.to_json_string()))

    @cached_property
    def feature_tokens(self) -> tuple[str, ...]:
        """The tokens that features replace; those that stand for an item in a chat template may be others."""
        found: list[str] = []
        for name in ("image_token", "video_token"):
            token = getattr(self.processor.tokenizer, name, None) or getattr(self.processor, name, None)
            if token is not None:
                found.append(token)
        return tuple(found)

    def plan(self, item: Image | Video, size: Size, alone: bool = True) -> MediaPlan:
        if isinstance(item, Video):  # hardly two are alike
            planned = self._planned(size, True, is_video=True)
            check_reading(item.file, size, len(planned.frames))
            return planned
        alone = alone or "batch_num_images" not in self.processor.image_processor.model_input_names
        key = (size, alone)
        if key not in self._plans:
            if len(self._plans) >= KEPT:
                self._plans.clear()
            self._plans[key] = self._planned(size, alone, is_video=False)
        return self._plans[key]

    def _planned(self, size: Size, alone: bool, is_video: bool) -> MediaPlan:
        frames: tuple[int, ...] = ()
        shape = (3, size.height, size.width)
        if is_video:
            if getattr(self.processor, "video_processor", None) is None:
                raise ExampleError(f"has a video, which {type(self.processor).__name__} cannot prepare")
            count = max(1, min(round(size.seconds * self.fps), size.frames, self.max_frames))
            frames = tuple(int((i + 0.5) * size.frames / count) for i in range(count))
            shape = (count, *shape)
        made, text = self._prepare(self._without_values, torch.empty(shape, device="meta"), size, frames, alone)
        grid = _grid(made)
        placeholder = self.processor.video_token if is_video else self.processor.image_token
        return MediaPlan(
            self.video_encoder if is_video else self.image_encoder,
            self._rows(text),
            float(_pixels(made).numel()),
            frames=frames,
            grid=grid,
            text=None if text == placeholder * self._rows(text) else sys.intern(text),
            seconds=made["second_per_grid_ts"][0] if "second_per_grid_ts" in made else None,
            alone=alone,
        )

    def load(self, item: Image | Video, size: Size, plan: MediaPlan, augment: Augment | None = None) -> MediaData:
        if isinstance(item, Image):
            pixels, placeholder = read_image(item.file, size), self.processor.image_token
        else:
            pixels, placeholder = read_frames(item.file, size, plan.frames), self.processor.video_token
        pixels = pixels if augment is None else augment(pixels)
        made, text = self._prepare(self.processor, pixels, size, plan.frames, plan.alone)
        grid, pixel_values = _grid(made), _pixels(made)
        if grid != plan.grid or text != (placeholder * plan.rows if plan.text is None else plan.text):
            raise ExampleError(
                f"{item.file.name} became {self._rows(text)} rows of features in a grid of {grid}, but {plan.rows} in "
                f"a grid of {plan.grid} were expected of its size: augmentation must keep the size with this processor"
            )
        if grid is not None:
            return pixel_values.unflatten(0, grid)
        if "image_sizes" in made:
            return {"pixel_values": pixel_values, "image_sizes": torch.as_tensor(made["image_sizes"][0])}
        return pixel_values

    def _rows(self, text: str) -> int:
        return sum(text.count(token) for token in self.feature_tokens)

    def _prepare(
        self, processor: Any, pixels: Tensor, size: Size, frames: tuple[int, ...], alone: bool
    ) -> tuple[Any, str]:
        """What a processor makes of one item, and the text that then stands for it."""
        if frames:
            given = {**self._arguments["videos_kwargs"], "do_sample_frames": False, "return_metadata": True}
            made, texts = processor._process_videos([pixels], video_metadata=[_metadata(frames, size)], **given)
            return made, texts[0]
        images = [pixels]
        if not alone:
            images.append(pixels[:, :1, :1])  # by a second one, of one pixel, it sees that the image is not alone
        made, texts = processor._process_images([images], **self._arguments["images_kwargs"])
        return made, texts[0]

    @cached_property
    def _arguments(self) -> dict[str, dict[str, Any]]:
        """What the processor passes on to its parts when it is called."""
        return self.processor._merge_kwargs(
            tokenizer_init_kwargs=self.processor.tokenizer.init_kwargs,
            common_kwargs={"return_tensors": "pt", "input_data_format": "channels_first"},
        )

    @cached_property
    def _without_values(self) -> Any:
        """The processor, for pixels that have no values."""
        shell = copy.copy(self.processor)
        for name in ("image_processor", "video_processor"):
            if getattr(shell, name, None) is not None:
                setattr(shell, name, _WithoutValues(getattr(shell, name)))
        return shell


class _WithoutValues:
    """An image or video processor that takes tensors on the meta device, and gives such as can be looked at."""

    def __init__(self, part: Any) -> None:
        self._part = part

    def __call__(self, media: Any, **arguments: Any) -> Any:
        made = self._part(media, **{**arguments, "resample": 2})  # bilinear; shapes do not depend on it
        for name, value in made.items():
            if isinstance(value, Tensor) and value.is_meta:
                made[name] = torch.zeros((), dtype=value.dtype).expand(value.shape)
        return made

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked for by copy and pickle, before there is a part
            raise AttributeError(name)
        return getattr(self._part, name)


def _pixels(made: Any) -> Tensor:
    """Of the one item, or of the first."""
    pixels = made["pixel_values_videos" if "pixel_values_videos" in made else "pixel_values"]
    return pixels[0] if pixels.ndim == 5 else pixels


def _grid(made: Any) -> tuple[int, int, int] | None:
    for name in ("image_grid_thw", "video_grid_thw"):
        if name in made:
            t, h, w = made[name][0].tolist()
            return t, h, w
    return None


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
