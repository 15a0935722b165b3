"""A frozen autoencoder between pictures and the latents that a generator makes.

Shape suffixes: B pictures, C channels, H and W pixels, L latent channels, h and w latent cells.
"""

from typing import Any, Self

import torch
from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor, nn

from bigmac_lightning.checkpoints.fetching import local_folder

from ..folders import has_safetensors, reading_weights
from ..initialization import seeded

_CLASSES: dict[str, Any] = {"AutoencoderKL": AutoencoderKL, "AutoencoderDC": AutoencoderDC}


class LatentCodec(nn.Module):
    """An `AutoencoderKL` or `AutoencoderDC` of diffusers, which is never trained.

    A picture's latents are the mode of the encoder's distribution, not a sample, so they depend on the picture alone.

    Attributes:
        channels: the number of latent channels, L.
        factor: the number of pixels per latent cell, in each direction.
    """

    def __init__(self, config: dict[str, Any] | str, seed: int = 0) -> None:
        """
        Args:
            config: the folder of a pretrained autoencoder; or ``{"_class_name": "AutoencoderKL", ...}`` with arguments
                of the class, for initial weights.
            seed: the seed of initial weights.

        Raises:
            ValueError: the config is for another class.
        """
        super().__init__()
        self.source = config if isinstance(config, str) else None
        load: Any = AutoencoderKL.load_config
        given: dict[str, Any] = dict(load(local_folder(config)) if isinstance(config, str) else config)
        name = given.pop("_class_name", None)
        if name not in _CLASSES:
            raise ValueError(f"a latent codec needs _class_name {' or '.join(_CLASSES)} in its config, not {name!r}")
        self._class = _CLASSES[name]
        self._arguments, self.seed = given, seed
        with torch.device("meta"):
            self.autoencoder: Any = self._class.from_config(given)
        config_of = self.autoencoder.config
        self.channels = config_of.latent_channels
        blocks = config_of.block_out_channels if name == "AutoencoderKL" else config_of.encoder_block_out_channels
        self.factor = 2 ** (len(blocks) - 1)
        self.shift, self.scale = getattr(config_of, "shift_factor", None) or 0.0, config_of.scaling_factor
        self.requires_grad_(False).eval()

    @property
    def weights(self) -> tuple[object, ...]:
        """What says which weights it has."""
        return (self.source, self.seed if self.source is None else None, self._class, self._arguments)

    def materialize(self) -> None:
        """Read the weights, or draw them."""
        if not next(self.autoencoder.parameters()).is_meta:
            return
        if self.source is None:
            with seeded(self.seed, "codec"):
                self.autoencoder = self._class.from_config(self._arguments)
        else:
            load = self._class.from_pretrained
            with reading_weights(self.source, self._class.__name__) as folder:
                self.autoencoder = load(
                    folder,
                    torch_dtype=torch.float32,
                    local_files_only=True,
                    use_safetensors=has_safetensors(folder),
                )
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        """Does nothing: the codec stays in evaluation mode."""
        return super().train(False)

    def latent_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape (L, h, w) of the latents of a picture of shape (C, H, W).

        Raises:
            ValueError: the picture does not consist of whole cells.
        """
        _, height, width = shape
        if height % self.factor or width % self.factor:
            raise ValueError(
                f"pictures of {height} * {width} pixels do not fit the codec: resize to multiples of {self.factor}"
            )
        return (self.channels, height // self.factor, width // self.factor)

    @torch.no_grad()
    def encode(self, pictures_BCHW: Tensor) -> Tensor:
        """latents_BLhw, shifted and scaled to about unit variance, of pictures with values in [-1, 1]."""
        encoded = self.autoencoder.encode(pictures_BCHW)
        latents_BLhw = encoded.latent if self._class is AutoencoderDC else encoded.latent_dist.mode()
        return (latents_BLhw - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, latents_BLhw: Tensor) -> Tensor:
        """pictures_BCHW, with values of about [-1, 1]."""
        latents_BLhw = (latents_BLhw / self.scale + self.shift).to(self.autoencoder.dtype)
        return self.autoencoder.decode(latents_BLhw).sample
