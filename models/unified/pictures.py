"""What turns pictures into tokens of an LLM that draws them, and its hidden states into the velocity of the flow.

It is a rectified flow, as in `FlowGenerator`: x_s = (1 - s) * x_0 + s * noise, and the LLM predicts noise - x_0. Noise
and s come from the seed of the target.

Shape suffixes: B pictures, C channels, H and W pixels (or latent cells), N patches, E values of a patch, D width of the
LLM.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps, get_2d_sincos_pos_embed_from_grid
from torch import Tensor, nn

from bigmac_lightning.contracts.batch import MediaData, TargetItem
from bigmac_lightning.contracts.components import Encoder, Generator

from ..generation.codec import LatentCodec
from ..generation.flow import Draw
from ..initialization import frozen_as, seeded
from .shared_latents import LearntTarget

FREQUENCIES = 64
"""Of the sines and cosines that stand for s."""


class NoisyPictureEncoder(Encoder):
    """Turns a picture with noise into features: a linear layer of its patches, their places, and how noisy it is.

    A DataModule gives the picture, (C, H, W). `UnifiedLM` makes a dict of it: "picture", "noise", of the shape of its
    latents, and "time", the s; or, while a picture is drawn, "noisy", the latents, and "time".

    Attributes:
        codec: makes latents of pictures; ``None``: the flow works on pictures.
        draws: whether items are latents that are being drawn, so that the codec does not run.
        made: latents that the codec has made, one after another, until `UnifiedLM` takes them.
    """

    draws = False

    def __init__(
        self, width: int, channels: int = 3, patch_size: int = 2, seed: int = 0, codec: LatentCodec | None = None
    ) -> None:
        """
        Args:
            width: the width of the LLM, D; a multiple of 4.
            channels: the channels of pictures; a codec brings its own number.
            patch_size: the side of the square patches that become one token each.
            seed: the seed of the initial weights.
            codec: makes latents of pictures.

        Raises:
            ValueError: the width is no multiple of 4.
        """
        if width % 4:
            raise ValueError(
                f"width={width} is no multiple of 4, of which places have sines and cosines in two directions"
            )
        super().__init__()
        self.width, self.patch_size, self.seed, self.codec = width, patch_size, seed, codec
        self.channels, self.made = channels if codec is None else codec.channels, list[Tensor]()
        with torch.device("meta"):
            self.layers = self._new_layers()

    def _new_layers(self) -> nn.ModuleDict:
        values = self.channels * self.patch_size**2
        return nn.ModuleDict(
            {"patches": nn.Linear(values, self.width), "time": TimestepEmbedding(FREQUENCIES, self.width)}
        )

    def materialize(self) -> None:
        if self.codec is not None:
            self.codec.materialize()
        with seeded(self.seed, "noisy pictures"):
            self.layers = frozen_as(self.layers, self._new_layers())

    def forward(self, pixels: list[MediaData]) -> Tensor:
        return torch.cat([self._encode(item) for item in pixels])

    def batches(self, pixels: Sequence[MediaData]) -> list[list[int]]:
        return [[i] for i in range(len(pixels))]

    def smallest(self) -> MediaData:
        side, codec = self.patch_size, self.codec
        noise = torch.zeros(self.channels, side, side, dtype=self.input_dtype())
        time = torch.zeros((), dtype=noise.dtype)
        if codec is None or self.draws:
            return {"noisy": noise, "time": time}
        side *= codec.factor
        picture = torch.zeros(codec.autoencoder.config.in_channels, side, side, dtype=noise.dtype)
        return {"picture": picture, "noise": noise, "time": time}

    def _encode(self, item: MediaData) -> Tensor:
        if not isinstance(item, dict) or "time" not in item:
            raise ValueError("NoisyPictureEncoder gets noise from UnifiedLM: it is an encoder of that module alone")
        x_CHW, s = item.get("noisy"), item["time"]
        if x_CHW is None:
            clean_CHW = latents(self.codec, item["picture"])
            if self.codec is not None:
                self.made.append(clean_CHW)
            x_CHW = (1 - s) * clean_CHW + s * item["noise"]
        patches_NE = patched(x_CHW, self.patch_size)
        rows, columns = (torch.arange(size // self.patch_size, device=x_CHW.device) for size in x_CHW.shape[1:])
        grid = torch.stack(torch.meshgrid(columns, rows, indexing="xy"))
        places: Any = get_2d_sincos_pos_embed_from_grid(self.width, grid, output_type="pt")
        frequencies = Timesteps(FREQUENCIES, flip_sin_to_cos=True, downscale_freq_shift=0)(1000 * s.float().reshape(1))
        layers = self.layers
        return layers["patches"](patches_NE) + places.to(patches_NE) + layers["time"](frequencies.to(patches_NE))


class VelocityHead(Generator):
    """Predicts the velocity of the flow from the LLM's hidden states at a picture's tokens, by a linear layer.

    `sample` gives this velocity, with which `UnifiedLM` makes a step, of items that have the shape of latents.

    Attributes:
        codec: makes latents of targets; ``None``: the flow works on pictures.
    """

    def __init__(
        self, width: int, channels: int = 3, patch_size: int = 2, seed: int = 0, codec: LatentCodec | None = None
    ) -> None:
        """
        Args: see `NoisyPictureEncoder`, which has the same.
        """
        super().__init__()
        self.width, self.patch_size, self.seed, self.codec = width, patch_size, seed, codec
        self.channels = channels if codec is None else codec.channels
        self._build = partial(nn.Linear, width, self.channels * patch_size**2)
        with torch.device("meta"):
            self.linear = self._build()

    def materialize(self) -> None:
        if self.codec is not None:
            self.codec.materialize()
        with seeded(self.seed, "velocity"):
            self.linear = frozen_as(self.linear, self._build())

    def forward(self, conditions: list[Tensor], items: list[TargetItem]) -> Tensor:
        losses = list[Tensor]()
        for velocity_NE, item in zip(self._velocities(conditions), items, strict=True):
            if item.data is None:
                raise ValueError(
                    f"a target of generator {item.generator!r} has no data on its owner, rank {item.owner}"
                )
            clean_CHW = item.encoded if isinstance(item, LearntTarget) else None
            if clean_CHW is None:
                clean_CHW = latents(self.codec, item.data)
            noise_CHW = Draw(item.seed, tuple(clean_CHW.shape)).noise.to(clean_CHW)
            wanted_NE = patched(noise_CHW - clean_CHW, self.patch_size)
            losses.append((velocity_NE - wanted_NE.float()).square().mean())
        return torch.stack(losses).sum()

    def batches(self, items: Sequence[TargetItem]) -> list[list[int]]:
        return [[i] for i in range(len(items))] if self.codec is not None else super().batches(items)

    @torch.no_grad()
    def sample(self, conditions: list[Tensor], items: list[TargetItem]) -> list[Tensor]:
        """The velocity of each item."""
        velocities = self._velocities(conditions)
        return [unpatched(v, item.shape, self.patch_size) for v, item in zip(velocities, items, strict=True)]

    @torch.no_grad()
    def decode(self, x: list[Tensor]) -> list[Tensor]:
        """Pictures of latents."""
        assert self.codec is not None, "without a codec the flow works on pictures"
        return [self.codec.decode(one[None])[0].float() for one in x]

    def _velocities(self, conditions: list[Tensor]) -> Sequence[Tensor]:
        """velocities_NE of each item. The layer runs once, as ranks that gather its weights expect."""
        return self.linear(torch.cat(conditions)).float().split([len(condition) for condition in conditions])

    def smallest(self) -> tuple[Tensor, TargetItem]:
        side, channels, dtype = self.patch_size, self.channels, self.linear.weight.dtype
        if self.codec is not None:
            side, channels = side * self.codec.factor, self.codec.autoencoder.config.in_channels
        shape = (self.channels, self.patch_size, self.patch_size)  # of latents, as that of items to be drawn
        item = TargetItem("", 1, shape, data=torch.zeros(channels, side, side, dtype=dtype))
        return torch.zeros(1, self.width, dtype=dtype), item


def latents(codec: LatentCodec | None, picture_CHW: Tensor) -> Tensor:
    return picture_CHW if codec is None else codec.encode(picture_CHW[None])[0]


def patched(x_CHW: Tensor, side: int) -> Tensor:
    """Its patches, row by row: patches_NE."""
    channels, height, width = x_CHW.shape
    cut = x_CHW.reshape(channels, height // side, side, width // side, side)
    return cut.permute(1, 3, 0, 2, 4).flatten(2).flatten(0, 1)


def unpatched(patches_NE: Tensor, shape: tuple[int, ...], side: int) -> Tensor:
    """What `patched` was given, of this shape."""
    channels, height, width = shape
    cut = patches_NE.reshape(height // side, width // side, channels, side, side)
    return cut.permute(2, 0, 3, 1, 4).reshape(channels, height, width)
