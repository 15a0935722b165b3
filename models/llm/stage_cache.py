"""The keys and values of a stage's layers, while a text is written token by token.

Shape suffixes: B samples, S tokens, D width.
"""

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin


class StageCache(DynamicCache):
    """The library's cache, in which layers without keys and values here only count tokens.

    A decoder asks its first layers, or the first of a kind, how many tokens are in the cache before it makes masks. On
    this rank these layers may never run; or they are in another stage, which has run the new tokens already.

    Args:
        config: of the decoder.
        layers: those layers of the stage that have keys and values of tokens.
        shared: by type of layer, the layer of an earlier stage whose keys and values this stage gets.

    Attributes:
        seen: what the next tokens see of images, where layers attend to these (see cross_attention.py).
    """

    def __init__(self, config: Any, layers: Collection[int], shared: Mapping[str, int]) -> None:
        super().__init__(config=config)
        self._shared = dict(shared)
        self._own = {*layers, *shared.values()}
        self.seen: Any = None

    def with_earlier(self, keys: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
        """Add shared keys and values of new tokens, by type of layer.

        Returns: those of all tokens that the cache has, as the layer that has made them returns them.
        """
        return {kind: self.update(*new, self._shared[kind]) for kind, new in keys.items()}

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
