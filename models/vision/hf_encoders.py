"""The towers and projectors of a Hugging Face vision- or audio-language model as an `Encoder`.

The whole model is built on the meta device and its LLM is dropped; parameters keep the names of the whole model.

Shape suffixes: N rows of an item, D width of the LLM.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from bigmac_lightning.contracts.batch import MediaData
from bigmac_lightning.contracts.components import Encoder
from bigmac_lightning.estimates.forward_cost import ForwardCost, attention_cost, forward_cost

from .. import loading, meta_model
from ..family_items import Encode, pixels_of
from ..hf_component import HFComponent
from ..llm import attention


class HFVisionEncoder(HFComponent, Encoder):
    """Towers and projector of a vision- or audio-language model, run by `get_image_features` of the library; by its
    `get_audio_features` if the model takes sounds and no images.

    An item is what the model's processor makes of one image:

    - for Qwen2/2.5/3-VL, the patches of an image or video, (t, h, w, values of a patch) with its grid (t, h, w);
    - for LLaVA-OneVision and Mistral 3, a dict with "pixel_values" as below and "image_sizes" of shape (2,), or the
      pixels alone if the image has their size;
    - for all others, (C, H, W), or (crops, C, H, W) where the processor cuts images into crops.

    Attributes:
        config: the config of the whole model.
        source: the folder that the weights are read from; ``None``: they are drawn.
        width: the width of the features, D, which is that of the model's own LLM.
    """

    def __init__(
        self,
        config: dict[str, Any] | str | PreTrainedConfig,
        seed: int = 0,
        attn_implementation: str = "sdpa",
        weights: str | None = None,
        dtype: str = "float32",
        gradient_checkpointing: bool = False,
    ) -> None:
        """
        Args:
            config, seed, attn_implementation, weights, dtype, gradient_checkpointing: see `HFDecoder`, for the same
                model.

        Raises:
            ValueError: the model has no vision part, or one that is not supported.
        """
        super().__init__()
        self._configure(config, seed, attn_implementation, weights, dtype, gradient_checkpointing)
        if self.family is None:
            raise ValueError(f"model_type {self.config.model_type!r} has no vision part: use it as an HFDecoder alone")
        self.width: int = self.config.get_text_config().hidden_size
        self._mixes_shapes = self.family.mixes_shapes
        if self.family.deepstack:
            self.levels = 1 + len(self.family.deepstack.layers(self.config))
        whole = self.build_whole()
        self._keep_vision(whole)
        self._hold(whole)

    def forward_cost(self, rows: int) -> ForwardCost:
        """The cost for an item that is one picture, whose patches all see each other."""
        assert self.family is not None, "the constructor refuses models without a vision part"
        tower: Any = self.config.audio_config if self.family.image is None else self.config.vision_config
        tower = getattr(tower, "encoder_config", tower)  # what comes after SAM in DeepSeek-OCR 2
        patches = rows * (self.family.joined or _patches_per_row(self.config))
        others = _OTHER_TOWERS if self.family.image is not None else ()

        def rows_of(name: str) -> int:
            if name.startswith(others):
                return 0
            return rows if _AFTER_MERGING.search(name) else patches

        cost = forward_cost(self, rows_of)
        if self.family.alone:
            return cost
        depth, width = (_first_of(tower, names) for names in (_DEPTHS, ("hidden_size", "d_model")))
        depth += getattr(tower, "num_global_layers", 0)
        cost = cost + attention_cost(width, patches, patches) * depth
        return cost.checkpointed(depth, width, patches) if self.gradient_checkpointing else cost

    def materialize(self) -> None:
        if not all(parameter.is_meta for parameter in self.parameters()):
            return
        keep = self._keep_vision if self.source is not None else lambda whole: None  # the LLM has been dropped already
        self._hold(self._materialized(keep, loading.rows_over(self.shard_mesh)))

    @staticmethod
    def _keep_vision(whole: Any) -> None:
        whole.all_tied_weights_keys = {}
        if isinstance(whole.get_decoder(), meta_model.PassThrough):
            return  # the LLM has been dropped, and without it some models fail in `get_output_embeddings`
        decoder = whole.get_decoder()
        inside = getattr(decoder, meta_model.AROUND_TOWERS, None)
        llm = [decoder] if inside is None else [child for child in decoder.children() if child is not inside]
        for part in (whole.get_output_embeddings(), *llm):
            if part is not None:
                meta_model.drop(whole, meta_model.path_of(part, whole))

    def batches(self, pixels: Sequence[MediaData]) -> list[list[int]]:
        """Items of the same shape, or of any shape if the model can, are encoded together; each sound alone."""
        if self.family is not None and self.family.image is None:
            return [[i] for i in range(len(pixels))]
        of_shape: dict[torch.Size | None, list[int]] = {}
        for i, item in enumerate(pixels):
            of_shape.setdefault(None if self._mixes_shapes else pixels_of(item).shape, []).append(i)
        return list(of_shape.values())

    def smallest(self) -> MediaData:
        assert self.family is not None, "the constructor refuses models without a vision part"
        if self.family.image is None:
            return self.smallest_sound()
        if self.family.calls_vary:
            raise ValueError(
                f"parts of the tower of model_type {self.config.model_type!r} run more often for some images than for "
                "others, so ranks with weights in shards would not meet: set sharding.encoders to zero1 or ddp"
            )
        vision: Any = self.config.vision_config
        if self.family.smallest is not None:
            return _as_type(self.family.smallest(self.config), self.input_dtype())
        if self._mixes_shapes:
            return smallest_grid(vision).to(self.input_dtype())
        side = vision.image_size if isinstance(vision.image_size, int) else vision.image_size[0]
        # ones, because Idefics takes an image of zeros for padding, and leaves it out
        return torch.ones(getattr(vision, "num_channels", 3), side, side, dtype=self.input_dtype())

    def smallest_sound(self) -> MediaData:
        assert self.family is not None, "the constructor refuses models without a vision part"
        return _as_type(self.family.smallest_sound(self.config), self.input_dtype())

    def forward(self, pixels: list[MediaData], encode: Encode | None = None) -> Tensor:
        """
        Args:
            encode: encodes items of the same shape; ``None``: as images, or as sounds if the model takes no images.
        """
        attention.check_device(self._attention, pixels_of(pixels[0]).device)
        assert self.family is not None, "the constructor refuses models without a vision part"
        base, encode = self._whole.base_model, encode or self.family.own
        rows: dict[int, Tensor] = {}
        for indices in self.batches(pixels):
            out = encode(base, [pixels[i] for i in indices])
            deeper = getattr(out, "deepstack_features", ()) if self.levels > 1 else ()  # sounds have none
            levels = [out.pooler_output, *deeper]
            by_item = zip(*(_by_item(level, len(indices)) for level in levels), strict=True)
            rows.update({i: torch.cat(item_levels) for i, item_levels in zip(indices, by_item, strict=True)})
        return torch.cat([rows[i] for i in range(len(pixels))])


class _OfTower(Encoder):
    """Encodes other media than images with a part of an `HFVisionEncoder`, without parameters of its own.

    Attributes:
        width: the width of the features, D.
        tower: the encoder of images, to which the weights belong.
    """

    def __init__(self, vision: HFVisionEncoder, encode: Encode | None, refused: str) -> None:
        """
        Args:
            encode: the family's way to encode these media.
            refused: what is said of a family that has none.
        """
        super().__init__()
        if encode is None:
            raise ValueError(f"model_type {vision.config.model_type!r} {refused}")
        self.width, self._encode = vision.width, encode
        self._unregistered = (vision,)  # in a tuple, because its parameters are registered once, by their owner

    @property
    def tower(self) -> HFVisionEncoder:
        return self._unregistered[0]

    def input_dtype(self) -> torch.dtype | None:
        return self.tower.input_dtype()

    def forward(self, pixels: list[MediaData]) -> Tensor:
        return self.tower(pixels, self._encode)


class HFVideoEncoder(_OfTower):
    """Encodes videos with the tower and projector of an `HFVisionEncoder`, without parameters of its own.

    An item has the shape (t, h, w, values of a patch) for Qwen's models, else (frames, C, H, W).

    Attributes:
        width: the width of the features, D.
    """

    def __init__(self, vision: HFVisionEncoder) -> None:
        """
        Args:
            vision: the encoder of images, to which the weights belong.

        Raises:
            ValueError: the model takes no videos.
        """
        encode = None if vision.family is None else vision.family.video
        super().__init__(vision, encode, "takes no videos, only images")
        self.levels = vision.levels

    def batches(self, pixels: Sequence[MediaData]) -> list[list[int]]:
        return self.tower.batches(pixels)

    def smallest(self) -> MediaData:
        image, steps = self.tower.smallest(), getattr(self.tower.config.vision_config, "temporal_merge_size", 1)
        if isinstance(image, Tensor):
            return image[None] if image.ndim == 3 else image.repeat_interleave(steps, 0)
        if "image_position_ids" in image:
            return {name: value[None] for name, value in image.items()}
        return pixels_of(image) if "image_sizes" in image else image  # only images are cut into crops


class HFAudioEncoder(_OfTower):
    """Encodes sounds with the audio tower of an `HFVisionEncoder` of a model that takes images and sounds, without
    parameters of its own.

    An item is a dict: "input_features" (windows, bands, columns) and "input_features_mask" (windows, columns).

    Attributes:
        width: the width of the features, D.
    """

    def __init__(self, vision: HFVisionEncoder) -> None:
        """
        Args:
            vision: the encoder of images, to which the weights belong.

        Raises:
            ValueError: the model takes no sounds.
        """
        super().__init__(vision, None if vision.family is None else vision.family.audio, "takes no sounds")

    def batches(self, pixels: Sequence[MediaData]) -> list[list[int]]:
        return [[i] for i in range(len(pixels))]

    def smallest(self) -> MediaData:
        return self.tower.smallest_sound()


def encoders_of(tower: HFVisionEncoder) -> dict[str, Encoder]:
    """All encoders of a model, by the names of media; the others have their weights from the first one."""
    family = tower.family
    assert family is not None, "its constructor refuses models without a vision part"
    if family.image is None:
        return {"audio": tower}
    encoders: dict[str, Encoder] = {"image": tower}
    if family.video is not None:
        encoders["video"] = HFVideoEncoder(tower)
    if family.audio is not None and tower.config.audio_config is not None:
        encoders["audio"] = HFAudioEncoder(tower)
    return encoders


_AFTER_MERGING = re.compile("merger|projector|connector|img_projection")
"""The modules that get rows: several patches joined to one."""
_OTHER_TOWERS = tuple(
    f"{around}{name}"
    for around in ("", "model.")
    for name in ("audio_tower", "video_tower", "embed_tokens_extend.audio_embed")
)
_DEPTHS = ("num_hidden_layers", "encoder_layers", "depth")


def smallest_grid(vision: Any) -> Tensor:
    """An item of zeros for Qwen's towers, (t, h, w, values of a patch), that makes one row of features.

    Args:
        vision: the config of the tower.
    """
    side = getattr(vision, "spatial_merge_size", None) or getattr(vision, "merge_size", None)
    side = side or vision.merge_kernel_size[0]
    named = (getattr(vision, name, None) for name in ("in_channels", "in_chans", "num_channels"))
    channels = next((number for number in named if number is not None), 3)
    frames = getattr(vision, "temporal_patch_size", None) or getattr(vision, "patch_temporal", 1)
    return torch.zeros(1, side, side, channels * frames * vision.patch_size**2)


def _first_of(config: Any, names: Sequence[str]) -> int:
    return next(value for name in names if (value := getattr(config, name, None)))


def _as_type(item: MediaData, dtype: torch.dtype | None) -> MediaData:
    """With pixels, or spectrograms, of this type."""
    if isinstance(item, Tensor):
        return item.to(dtype)
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in item.items()}


def _patches_per_row(config: Any) -> int:
    """The number of patches that a model joins to one row of features."""
    vision: Any = config.vision_config
    side = getattr(vision, "spatial_merge_size", None) or getattr(config, "spatial_merge_size", None)
    side = side or getattr(config, "scale_factor", None) or getattr(config, "downsample_factor", None)
    side = side or getattr(vision, "merge_kernel_size", [None])[0] or getattr(vision, "pooling_kernel_size", None)
    side = side or getattr(vision, "merge_size", None) or getattr(vision, "scale_factor", None)
    side = side or getattr(config, "projector_pooling_ratio", None) or round(1 / getattr(config, "downsample_ratio", 1))
    perceiver = getattr(config, "perceiver_config", None)
    if rows := getattr(perceiver, "resampler_n_latents", None) or getattr(config, "mm_tokens_per_image", None):
        return (vision.image_size // vision.patch_size) ** 2 // rows
    return side**2


def _by_item(level: Any, items: int) -> list[Tensor]:
    """features_ND of each item, from a tensor or a list that has an entry for each item, or for each crop."""
    parts = list(level)
    crops = len(parts) // items
    return [torch.cat([p.flatten(0, -2) for p in parts[i * crops : (i + 1) * crops]]) for i in range(items)]
