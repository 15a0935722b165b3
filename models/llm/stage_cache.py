"""The keys and values of a stage's layers, while a text is written token by token.

Shape suffixes: B samples, S tokens, D width.
"""

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin


class StageCache(DynamicCache):
    """The library's cache, in which other layers than those of the stage only count tokens.

    A decoder asks its first layers, or the first of a kind, how many tokens are in the cache before it makes masks. On
    this rank these layers may never run; or they are in another stage, which has run the new tokens already.

    Args:
        config: of the decoder.
        layers: those of the stage.
    """

    def __init__(self, config: Any, layers: range) -> None:
        super().__init__(config=config)
        self._own = layers

    def count(self, h_BSD: Tensor) -> None:
        """Let the other layers know of tokens that the stage has run."""
        nothing = h_BSD.new_zeros(h_BSD.shape[0], 1, h_BSD.shape[1], 1)
        for k, layer in enumerate(self.layers):
            if k in self._own:
                continue
            if isinstance(layer, LinearAttentionCacheLayerMixin):
                layer.has_previous_state = dict.fromkeys(layer.has_previous_state, True)
            if isinstance(layer, CacheLayerMixin):
                layer.update(nothing, nothing)
