"""Prepares images and videos with a processor of the transformers library, and plans them from their sizes alone.

A plan is made by the library's own processor from tensors without values (on the meta device). So this file has no
rules for resizing, crops or the text around them, and does not distinguish families of models.

Shape suffixes: T frames, C channels, H and W pixels, E values of a patch.
"""

import copy
import inspect
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bigmac_lightning.contracts.batch import MediaData

from ..errors import ExampleError
from ..example import Image, Size, Video
from ..media.decoding import check_reading, read_frames, read_image
from ..media.frame_choice import evenly_spaced, frame_count
from .media_processor import Augment, MediaPlan
from .visual import VisualProcessor

USED = {"pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw", "image_sizes", "second_per_grid_ts"}
TILES = ("pixel_values", "spatial_shapes", "pixel_attention_mask")
"""What a processor makes of a picture that it cuts into tiles of patches (LFM2-VL)."""
PLACED = ("image_position_ids", "video_position_ids")
"""The places of patches in a picture or in frames, which a processor has padded (Gemma 4)."""
ALONG = ("target_sizes", "high_res_pixel_values")
"""What an encoder takes beside the pixels of a picture (MiniCPM-V, DeepSeek-VL)."""
MERGED = ("image_merge_sizes",)
"""The side of the squares of patches that are joined (VideoLLaMA 3). Its videos lose rows by what is to be seen in
them, so they cannot be planned."""
FILLED = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
"""What a processor makes of a picture that it cuts into tiles and fills up to the most tiles (Llama 3.2 Vision)."""
CROPPED = ("pixel_values", "image_sizes", "image_attention_mask")
"""What a processor makes of a picture: the whole one and crops, their size together, and which patches have no padding
(Phi-4-multimodal). It gives pixels another name."""
PATCH = 14
"""The side of a patch of these tiles in pixels, which the processor does not know unless it has a `patch_size`."""
UNUSED = {
    *("num_soft_tokens_per_image", "num_soft_tokens_per_video"),  # which are in the text that stands for the item
    *("video_metadata", "batch_num_images", "num_frames_per_video"),  # of several items, which come apart here
    *("num_patches", "num_crops", "num_patches_per_image"),
    *("rows", "cols", "image_rows", "image_cols"),  # which are in the text that stands for the item
    "pixel_attention_mask",  # of an item alone there is no padding
    "num_img_tokens",
}
MAX_PLANS = 16384
"""Most plans that are cached: a few hundred bytes each. A cache that is full is cleared."""


@dataclass(frozen=True)
class HFVisual(VisualProcessor):
    """Prepares media as the processor of a pretrained vision-language model does.

    `MediaItem.data` is the processor's output for an item:

    - patches, (t, h, w, E), if it makes a grid of them;
    - otherwise crops, (crops, C, H, W), or frames, (T, C, H, W);
    - if it returns the size of an image, too, a dictionary: "pixel_values" as above, and "image_sizes", (2,);
    - patches with their places, a dictionary: "pixel_values", (T, E), and "image_position_ids", (T, 2), -1 for padding;
      of a video with a dimension of frames before these;
    - if it returns what goes along with them, too, a dictionary with that: "target_sizes" or
      "high_res_pixel_values"; beside a grid of patches, "merge_sizes";
    - tiles that are filled up to the most tiles, a dictionary: "pixel_values", (most tiles, C, H, W),
      "aspect_ratio_ids", (), and "aspect_ratio_mask", (most tiles,);
    - a picture and its crops with what tells them from padding, a dictionary: "pixel_values", (crops, C, H, W),
      "image_sizes", (2,), and "image_attention_mask", (crops, patches down, patches across);
    - tiles of patches, a dictionary: "pixel_values", (tiles, T, E), "spatial_shapes", (tiles, 2), and
      "pixel_attention_mask", (tiles, T).

    A processor that makes anything else is refused when it plans its first item.

    Attributes:
        processor: a processor, as `AutoProcessor.from_pretrained` returns it; ``None``: that of the DataModule.
        fps: number of frames used per second of a video.
        max_frames: maximum number of frames of a video; longer videos are sampled more sparsely.
        image_encoder, video_encoder: the model's names of the encoders.
    """

    processor: Any = None
    fps: float = 2.0
    max_frames: int = 64
    image_encoder: str = "image"
    video_encoder: str = "video"
    _plans: dict[Any, MediaPlan] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.processor is None:
            return
        part = self.processor.image_processor
        if getattr(part, "backend", "torchvision") != "torchvision":
            raise ValueError(
                f"{type(part).__name__} has the backend {part.backend!r}, which needs pixels to plan an image: load "
                'the processor with AutoProcessor.from_pretrained(..., backend="torchvision")'
            )
        if getattr(part, "use_image_id", False):
            raise ValueError(
                f"{type(self.processor).__name__} numbers the images of a sample, and each of them is planned alone "
                "here: set use_image_id to false in its preprocessor_config.json"
            )

    def fingerprint(self) -> str:
        import transformers

        settings = (self.fps, self.max_frames, self.image_encoder, self.video_encoder, transformers.__version__)
        given = [self._arguments[name] for name in ("images_kwargs", "videos_kwargs")]
        return repr((settings, given, self.processor.to_json_string()))

    @cached_property
    def feature_tokens(self) -> dict[str, str]:
        """By modality, the token that features replace. The tokens for an item in a chat template may be others."""
        found: dict[str, str] = {}
        for modality in ("image", "video"):
            name = f"{modality}_token"
            token = getattr(self.processor.tokenizer, name, None) or getattr(self.processor, name, None)
            if token is not None:
                found[modality] = token
        return found

    def plan(self, item: Image | Video, size: Size, alone: bool = True) -> MediaPlan:
        if isinstance(item, Video):  # few videos have the same size
            planned = self._planned(size, True, is_video=True)
            check_reading(item.file, size, len(planned.frames))
            return planned
        alone = alone or "batch_num_images" not in self.processor.image_processor.model_input_names
        key = (size, alone)
        if key not in self._plans:
            if len(self._plans) >= MAX_PLANS:
                self._plans.clear()
            self._plans[key] = self._planned(size, alone, is_video=False)
        return self._plans[key]

    def _planned(self, size: Size, alone: bool, is_video: bool) -> MediaPlan:
        frames: tuple[int, ...] = ()
        shape = (3, size.height, size.width)
        if is_video:
            if getattr(self.processor, "video_processor", None) is None:
                raise ExampleError(f"has a video, which {type(self.processor).__name__} cannot prepare")
            frames = evenly_spaced(size.frames, frame_count(size, self.fps, self.max_frames))
            shape = (len(frames), *shape)
        try:
            made, text = self._prepare(self._without_values, torch.empty(shape, device="meta"), size, frames, alone)
        except NotImplementedError as error:
            why = str(error) or "it does not say which text stands for an item alone"
            raise ValueError(
                f"items cannot be planned with {type(self.processor).__name__}: {why}. Prepare the media with a "
                "processor of your own (see docs/data.md)"
            ) from error
        tiles = TILES if "spatial_shapes" in made else ()
        slices = ("grids",) if "target_sizes" in made else ()  # the text has the places of slices
        filled = (*FILLED, "num_tiles") if "aspect_ratio_ids" in made else ()
        if unknown := made.keys() - USED - UNUSED - {*tiles, *slices, *filled, *ALONG, *MERGED, *PLACED, *CROPPED}:
            raise ValueError(
                f"{type(self.processor).__name__} makes {', '.join(sorted(unknown))} of an item, which no encoder here "
                "takes: prepare the media with a processor of your own (see docs/data.md)"
            )
        grid = _grid(made)
        placeholder = placeholder_of(self.processor, "video" if is_video else "image")
        return MediaPlan(
            self.video_encoder if is_video else self.image_encoder,
            self._rows(made, text),
            float(_pixels(made).numel()),
            frames=frames,
            grid=grid,
            text=None if text == placeholder * self._tokens(text) else sys.intern(text),
            one_token=bool(filled),
            seconds=made["second_per_grid_ts"][0] if "second_per_grid_ts" in made else None,
            alone=alone,
        )

    def load(self, item: Image | Video, size: Size, plan: MediaPlan, augment: Augment | None = None) -> MediaData:
        if isinstance(item, Image):
            pixels, placeholder = read_image(item.file, size), placeholder_of(self.processor, "image")
        else:
            pixels, placeholder = read_frames(item.file, size, plan.frames), placeholder_of(self.processor, "video")
        pixels = pixels if augment is None else augment(pixels)
        made, text = self._prepare(self.processor, pixels, size, plan.frames, plan.alone)
        grid, pixel_values = _grid(made), _pixels(made)
        tokens = 1 if plan.one_token else plan.rows
        if grid != plan.grid or text != (placeholder * tokens if plan.text is None else plan.text):
            raise ExampleError(
                f"{item.file.name} became {self._rows(made, text)} rows of features in a grid of {grid}, but its plan "
                f"has {plan.rows} in a grid of {plan.grid}: with this processor, loading.augment must not change the "
                "size"
            )
        if plan.one_token:
            return {"pixel_values": pixel_values, **{name: made[name][0, 0] for name in FILLED[1:]}}
        if grid is not None:
            patches = pixel_values.flatten(1).unflatten(0, grid)
            sides = [made[name][0] for name in MERGED if name in made]
            return {"pixel_values": patches, "merge_sizes": torch.as_tensor(sides[0])} if sides else patches
        if along := {name: made[name] for name in ALONG if made.get(name) is not None}:
            return {"pixel_values": pixel_values, **along}
        if "spatial_shapes" in made:
            return {name: made[name] for name in TILES}
        for name in PLACED:
            if name in made:
                pixels, places = (
                    (pixel_values, made[name]) if isinstance(item, Video) else (pixel_values[0], made[name][0])
                )
                return {"pixel_values": pixels, "image_position_ids": places}
        if "image_attention_mask" in made:
            return {"pixel_values": pixel_values, **{name: made[name][0] for name in CROPPED[1:]}}
        if "image_sizes" in made:
            return {"pixel_values": pixel_values, "image_sizes": torch.as_tensor(made["image_sizes"][0])}
        return pixel_values

    def _rows(self, made: Any, text: str) -> int:
        """The number of rows of an item: those of all tiles, also of those that fill it up, with a class token each; or
        the tokens that features replace."""
        if "aspect_ratio_ids" not in made:
            return self._tokens(text)
        tiles, _, height, width = _pixels(made).shape
        side = getattr(self.processor.image_processor, "patch_size", PATCH)
        return tiles * ((height // side) * (width // side) + 1)

    def _tokens(self, text: str) -> int:
        return sum(text.count(token) for token in self.feature_tokens.values())

    def _prepare(
        self, processor: Any, pixels: Tensor, size: Size, frames: tuple[int, ...], alone: bool
    ) -> tuple[Any, str]:
        """The processor's output for one item, and the text that stands for the item."""
        if frames:
            metadata = _metadata(frames, size)
            given = {**self._arguments["videos_kwargs"], "do_sample_frames": False, "return_metadata": True}
            given["video_metadata"] = [metadata]
            if "video_to_audio_indices" not in inspect.signature(processor._process_videos).parameters:
                made, texts = processor._process_videos([pixels], **given)
            else:  # of the Omni models, which assume a rate of frames if they are told none
                given["fps"] = metadata.sampled_fps
                made, texts = processor._process_videos([pixels], **{**self._arguments, "videos_kwargs": given})
                made["second_per_grid_ts"] = made.pop("video_second_per_grid")
            return made, texts[0]
        images = [pixels]
        if not alone:
            images.append(
                pixels[:, :1, :1]
            )  # a second image, one pixel high and wide, makes the processor treat the first as not alone
        made, texts = processor._process_images([images], **self._of_images, **self._arguments["images_kwargs"])
        if "image_pixel_values" in made:
            made["pixel_values"] = made.pop("image_pixel_values")
        return made, texts[0]

    @cached_property
    def _of_images(self) -> dict[str, Any]:
        """Options of the whole processor that it uses when it prepares images."""
        taken = inspect.signature(self.processor._process_images).parameters
        return {k: value for k, value in self._arguments.items() if k in taken and not isinstance(value, dict)}

    @cached_property
    def _arguments(self) -> dict[str, Any]:
        """The arguments that the processor passes to its image and video processor when it is called."""
        return self.processor._merge_kwargs(
            tokenizer_init_kwargs=self.processor.tokenizer.init_kwargs,
            common_kwargs={"return_tensors": "pt", "input_data_format": "channels_first"},
        )

    @cached_property
    def _without_values(self) -> Any:
        """The processor, for tensors without values."""
        shell = copy.copy(self.processor)
        for name in ("image_processor", "video_processor"):
            if getattr(shell, name, None) is not None:
                setattr(shell, name, _WithoutValues(getattr(shell, name)))
        return shell


class _WithoutValues:
    """An image or video processor that accepts tensors on the meta device, and returns zeros of the same shapes."""

    def __init__(self, part: Any) -> None:
        self._part = part

    def __call__(self, media: Any, **arguments: Any) -> Any:
        with _MasksWithValues() if "image_attention_mask" in self._part.model_input_names else nullcontext():
            made = self._part(media, **{**arguments, "resample": 2})  # bilinear; shapes do not depend on it
        for name, value in made.items():
            if isinstance(value, Tensor) and value.is_meta:
                made[name] = torch.zeros((), dtype=value.dtype).expand(value.shape)
        return made

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copy and pickle ask for these before there is a part
            raise AttributeError(name)
        return getattr(self._part, name)


class _MasksWithValues(TorchFunctionMode):
    """Within this context, ones are made on the CPU, also for pixels on the meta device: a processor counts them."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        return function(*args, **({**given, "device": "cpu"} if function is torch.ones else given))


def placeholder_of(processor: Any, kind: str) -> Any:
    """The token that the chat template of a processor writes for an item, which Qianfan-OCR's features do not replace;
    ``None``: it takes no such items.

    Args:
        kind: "image" or "video".
    """
    other = getattr(processor, f"{kind}_placeholder_token", None)
    return getattr(processor, f"{kind}_token", None) if other is None else other


def _pixels(made: Any) -> Tensor:
    """The pixels of the first item."""
    pixels = made["pixel_values_videos" if "pixel_values_videos" in made else "pixel_values"]
    return pixels[(0,) * max(0, pixels.ndim - 4)]


def _grid(made: Any) -> tuple[int, int, int] | None:
    if "num_tiles" in made:
        return 1, 1, made["num_tiles"][0][0]
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
