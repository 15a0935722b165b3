"""A decoder with a second set of weights in its layers, for the tokens of pictures that are being drawn."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from bigmac_lightning.contracts.parallel import ParallelSizes

from .. import loading, meta_model
from ..llm.decoder import HFDecoder
from ..llm.multimodal_inputs import text_positions
from ..llm.stage_cache import StageCache
from .kept_keys import MASKED, NUMBER, PLACES, SEEN, KeptKeys, TextKeys
from .masks import PICTURES, mask_of, pictures_of
from .two_weights import OTHERS, Places, TwoWeights, divide, for_both, positions_of

DRAWN = "drawn"
"""The name that placeholders of drawn pictures have among the modalities."""


class UnifiedDecoder(HFDecoder):
    """A text decoder of the transformers library that also draws: tokens of a picture have weights of their own in the
    layers and in the final norm, and see each other both ways. No other token sees them, as they are noisy; a picture
    that later text is about has to come again, as an image that is read.

    Both sets of weights start as those of the decoder.
    """

    def __init__(
        self,
        config: dict[str, Any] | str | PreTrainedConfig,
        drawn_token: int,
        seed: int = 0,
        attn_implementation: str = "sdpa",
        weights: str | None = None,
        dtype: str = "float32",
        gradient_checkpointing: bool = False,
        trust_remote_code: bool = False,
    ) -> None:
        """
        Args:
            drawn_token: the id of the token that stands for a patch of a picture that is being drawn; between two such
                pictures of a sample there has to be another token.
            config, seed, attn_implementation, weights, dtype, gradient_checkpointing, trust_remote_code: see
                `HFDecoder`.

        Raises:
            ValueError: the decoder is part of a vision-language model, or one of its layers has weights that are more
                than linear layers and norms.
        """
        trusts = {"trust_remote_code": trust_remote_code}
        super().__init__(config, seed, attn_implementation, weights, dtype, gradient_checkpointing, **trusts)
        kind = f"model_type {self.config.model_type!r}"
        if self.family is not None:
            raise ValueError(f"{kind} has encoders of its own: give its decoder alone, config.get_text_config()")
        if not self._takes_masks:
            raise ValueError(f"attn_implementation={attn_implementation!r} takes no mask: use sdpa or eager")
        if self._handed_on or self._routers is not None:
            raise ValueError(f"{kind}: layers that hand on more than hidden states cannot have two sets of weights")
        text: Any = self.config.get_text_config()
        if {*(getattr(text, "layer_types", None) or ())} - {"full_attention"} or getattr(text, "sliding_window", None):
            raise ValueError(f"{kind} has layers with other masks than those of full attention: choose another decoder")
        self.placeholders = {DRAWN: drawn_token}
        self._places = Places()
        self._kept: dict[int, KeptKeys] | None = None
        self._divide(self._whole)
        self._division.tensor_plan = for_both(self._division.tensor_plan, self._whole)

    def _divide(self, whole: Any) -> None:
        decoder, norm = whole.get_submodule(self._names.decoder), self._names.norm
        try:
            divide(decoder.layers, self._places)
        except ValueError as error:
            kind = self.config.model_type
            raise ValueError(f"model_type {kind!r} cannot have two sets of weights: layer {error}") from error
        if any(True for _ in decoder.get_submodule(norm).parameters()):
            decoder.set_submodule(norm, TwoWeights(decoder.get_submodule(norm), self._places))

    def _materialized(self, keep: Callable[[Any], None], cut: loading.Cut | None = None) -> Any:
        whole = self.build_whole()
        meta_model.keep_language_model(whole, self._names, range(self.num_layers), embedding=True, head=True)
        made = loading.materialize(whole, keep, self.source, self.seed, self.dtype, cut)
        self._divide(made)
        if self.gradient_checkpointing:
            made.activation_checkpointing_enable({"use_reentrant": False, "context_fn": self._places.contexts})
        return made

    def why_not_parallel(self, sizes: ParallelSizes) -> str:
        if sizes.context > 1 or sizes.expert > 1:
            return "UnifiedDecoder cannot have context or expert parallelism: leave out the sizes of context, expert"
        return super().why_not_parallel(sizes)

    def prepare(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Adds where the tokens of drawn pictures are."""
        if SEEN in inputs:
            return inputs
        inputs = super().prepare(inputs)
        if PICTURES not in inputs:
            drawn_BS = inputs["input_ids"] == self.placeholders[DRAWN]
            pictures_BS = pictures_of(drawn_BS, text_positions(inputs["position_ids"]))
            inputs |= {PICTURES: pictures_BS, **positions_of(drawn_BS)}
        return inputs

    def _mask(self, h_BSD: Tensor, inputs: dict[str, Tensor]) -> Any:
        if isinstance(self._cache, StageCache) and self._cache.get_seq_length():
            return None  # a token of a text sees all that are kept
        if SEEN not in inputs:
            return mask_of(self._decoder.config, h_BSD, inputs)
        seen_11NK = inputs[SEEN][None, None]
        if self._attention == "sdpa":
            return seen_11NK
        return torch.where(seen_11NK, 0.0, torch.finfo(h_BSD.dtype).min).to(h_BSD.dtype)

    def run_layers(self, h_BSD: Tensor, inputs: dict[str, Tensor], layers: range, extras: dict[str, Tensor]) -> Tensor:
        kept = self._kept_of(inputs)
        if isinstance(self._cache, TextKeys):
            self._cache.others = inputs[OTHERS]
        with self._places.given(inputs), nullcontext() if kept is None else self.using_cache(kept):
            return super().run_layers(h_BSD, inputs, layers, extras)

    @contextmanager
    def keeping_keys(self) -> Iterator[bool]:
        """Within this context, keys and values of microbatches with a `NUMBER` are kept, if that is possible."""
        self._kept = {} if self._attention in MASKED else None
        try:
            yield self._kept is not None
        finally:
            self._kept = None

    def _kept_of(self, inputs: dict[str, Tensor]) -> KeptKeys | None:
        if self._kept is None or NUMBER not in inputs:
            return None
        kept = self._kept.setdefault(int(inputs[NUMBER]), KeptKeys())
        kept.places = inputs.get(PLACES)
        return kept

    def new_cache(self, layers: range) -> Any:
        possible = super().new_cache(layers) is not None
        return TextKeys(self._decoder.config, layers, {}) if possible else None
