"""LLMs with layers that attend to images (Llama 3.2 Vision). Rows of features replace no embeddings, but go from stage
to stage as extras, up to the last of these layers.

What a token sees depends on its own sample alone, as if the library ran each sample by itself. It sees the last image
before it, with the images that stand directly before that one. Tokens before the first image see all rows, also those
of tiles that only fill an image up, but the layer's MLP leaves them as they are; this is what the library does. A
sample without images passes these layers unchanged.

Shape suffixes: B samples, S tokens, F all B x S tokens (of a slice of rows, its own), N rows of features, I images, D
width.
"""

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from bigmac_lightning.contracts.slices import WHOLE_IDS, slice_bounds

from ..pass_through import PassThrough, hidden_of
from .attention import MASKED
from .exchange import Exchange
from .stage_cache import StageCache
from .text_inputs import SAMPLES

GRIDS = "image_grid_thw"
"""The input with three numbers for each image, (I, 3), whose product is the number of its tiles."""


@dataclass(frozen=True)
class _Seen:
    """What the tokens of a microbatch see of its images.

    Attributes:
        features: the rows of all images, (1, N, D); ``None``: `cache` has their keys and values.
        mask: is added to the scores of attention, (1, 1, F, N).
        sees: 1 for a token that sees an image, (1, 1, F, 1).
        has_images: whether a token's sample has an image, (1, F, 1).
        cache: keeps keys and values of these rows; ``None``: nothing does.
    """

    features: Tensor | None
    mask: Tensor
    sees: Tensor
    has_images: Tensor
    cache: DynamicCache | None = None

    def of_next(self) -> "_Seen":
        """What tokens see that are written after these. As none of them is an image, this is what the last one sees."""
        last = self.mask[:, :, -1:].clone(), self.sees[:, :, -1:].clone(), self.has_images[:, -1:].clone()
        return _Seen(None, *last, self.cache)


class _Crossing(PassThrough):
    """Runs a cross-attention layer with what the tokens see; without images it passes hidden states through."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        self.layer = layer

    def forward(self, *args: Any, cross_attention_states: _Seen | None = None, **kwargs: Any) -> Tensor:
        before, seen = hidden_of(args, kwargs), cross_attention_states
        if seen is None:
            return before
        before_1FD = before.flatten(0, 1)[None]
        after_1FD = self.layer(
            before_1FD,
            cross_attention_states=seen.features,
            cross_attention_mask=seen.mask,
            full_text_row_masked_out_mask=seen.sees,
            attention_mask=None,
            cache=seen.cache,
        )
        return torch.where(seen.has_images, after_1FD, before_1FD).view_as(before)


def crossing(decoder: Any, layers: range) -> dict[int, nn.Module]:
    """By index, what runs those of these layers of a decoder that attend to images."""
    return {k: _Crossing(decoder.layers[k]) for k in getattr(decoder, "cross_attention_layers", ()) if k in layers}


class CrossAttention:
    """How the layers of a decoder attend to images.

    Args:
        config: the config of the whole model.
        decoder: the decoder with all of its layers.
        attention: its attention implementation.

    Raises:
        ValueError: the attention implementation takes no mask.
    """

    def __init__(self, config: Any, decoder: Any, attention: str) -> None:
        if attention not in MASKED:
            raise ValueError(
                f"model_type {config.model_type!r} attends to images by a mask, which attn_implementation="
                f"{attention!r} does not take: use one of {MASKED}"
            )
        self._layers: list[int] = list(decoder.cross_attention_layers)
        self._token: int = config.image_token_id
        self._exchange: Exchange | None = None
        self._tile_rows, self._rows = rows_of(config)

    def of_slices(self, decoder: Any, exchange: Exchange, attention: str) -> None:
        """Let the tokens of a slice of rows attend to all images, which each rank has whole.

        Args:
            decoder: the decoder with layers of this rank.
            exchange: says which slice it is.
            attention: the implementation of attention.
        """
        self._exchange = exchange
        for layer in (decoder.layers[k] for k in self._layers):
            if not isinstance(layer, PassThrough):
                layer.cross_attn.config = copy.deepcopy(layer.cross_attn.config)
                layer.cross_attn.config._attn_implementation = attention

    def check(self, inputs: dict[str, Tensor]) -> None:
        """
        Raises:
            ValueError: the numbers of tiles of an image are missing.
        """
        tokens, grids = int((inputs["input_ids"] == self._token).sum()), len(inputs.get(GRIDS, ()))
        if tokens != grids:
            raise ValueError(
                f"a microbatch has {tokens} image tokens, but {grids} images in inputs[{GRIDS!r}]: give one token for "
                "each image, and there (1, tiles down, tiles across) of each, in the order of their tokens"
            )

    def shapes(self, layer: int, media_rows: int, width: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the extras that go into a layer."""
        return {"features": (1, media_rows, width)} if media_rows and self._needed(range(layer, 1 << 30)) else {}

    def _needed(self, layers: range) -> bool:
        return any(k in layers for k in self._layers)

    def arguments(
        self,
        features_1ND: Tensor | None,
        inputs: dict[str, Tensor],
        layers: range,
        extras: dict[str, Tensor],
        cache: StageCache | None,
    ) -> dict[str, Any]:
        """The arguments of the decoder for these layers. Features that later layers need are put into the extras.

        Args:
            features_1ND: ``None``, or of no rows: the tokens bring no images, but may follow some.
        """
        seen = None if cache is None else cache.seen
        if features_1ND is not None and features_1ND.shape[1]:
            if self._needed(range(layers.stop, 1 << 30)):
                extras["features"] = features_1ND
            seen = self._seen(features_1ND, inputs) if self._needed(layers) else None
            if seen is not None and cache is not None:
                seen = replace(seen, cache=DynamicCache())
                cache.seen = seen.of_next()
        return {} if seen is None else {"cross_attention_states": seen}

    def _seen(self, features_1ND: Tensor, inputs: dict[str, Tensor]) -> _Seen:
        ids_BS, positions_N = inputs.get(WHOLE_IDS, inputs["input_ids"]), inputs["media_positions"]
        S = ids_BS.shape[1]
        images_F = (ids_BS == self._token).flatten()
        sample_F = (torch.arange(len(ids_BS), device=ids_BS.device)[:, None] * S).expand(ids_BS.shape)
        if SAMPLES in inputs and inputs[SAMPLES].shape[1]:
            sample_F = sample_F + inputs[SAMPLES]
        sample_F = sample_F.flatten()
        first_F = images_F.clone()  # images that stand one directly after another are seen together
        first_F[1:] &= ~images_F[:-1]
        run_F = first_F.cumsum(0)

        tiles_N = inputs[GRIDS].prod(1)[images_F.cumsum(0)[positions_N] - 1]
        tile_N = torch.arange(len(positions_N), device=ids_BS.device) % self._rows // self._tile_rows
        places_F1 = torch.arange(len(images_F), device=ids_BS.device)[:, None]
        if self._exchange is not None:
            start, stop = slice_bounds(S, self._exchange.rank, self._exchange.size)
            places_F1 = places_F1.view(ids_BS.shape)[:, start:stop].reshape(-1, 1)
        own_FN = sample_F[places_F1] == sample_F[positions_N]
        sees_FN = own_FN & (run_F[places_F1] == run_F[positions_N]) & (positions_N <= places_F1) & (tile_N < tiles_N)
        sees_F1, has_F1 = sees_FN.any(1, keepdim=True), own_FN.any(1, keepdim=True)
        hidden_FN = ~torch.where(sees_F1, sees_FN, own_FN | ~has_F1)
        mask_FN = torch.zeros_like(hidden_FN, dtype=features_1ND.dtype)
        mask_FN = mask_FN.masked_fill(hidden_FN, torch.finfo(mask_FN.dtype).min)
        return _Seen(features_1ND, mask_FN[None, None], sees_F1.to(mask_FN.dtype)[None, None], has_F1[None])


def rows_of(config: Any) -> tuple[int, int]:
    """The rows of a tile and those of an image, which is filled up to the most tiles.

    Args:
        config: the config of the whole model.
    """
    vision = config.vision_config
    tile = (vision.image_size // vision.patch_size) ** 2 + 1
    return tile, tile * vision.max_num_tiles
