"""A stage: consecutive layers of a decoder, run by the decoder's own forward, from hidden states to hidden states.

The decoder of a stage is a *shell*: a shallow copy of the whole decoder that shares its submodules and passes through
the layers of other stages. What the decoder does before its first layer (a multiplier, a norm) must reach the first
stage alone, and what it does after its last layer the last stage alone. So the layers next to the stage are replaced by
modules through which hidden states enter and leave, whatever the decoder does outside of its layers.

Shape suffixes: B samples, S tokens, D width.
"""

import copy
from typing import Any

from torch import Tensor, nn

from ..pass_through import PassThrough, hidden_of
from .cross_attention import crossing
from .handed_on import SHARED_KEYS, Between, give_layer_inputs
from .rope import stateless_ropes


def shell_of(module: nn.Module, **replaced: nn.Module) -> Any:
    """A shallow copy that shares all submodules except the replaced ones."""
    shell: Any = copy.copy(module)
    shell._modules = {**module._modules, **replaced}
    shell.cross_attention_layers = ()  # the decoder would leave these out where it gets no image
    return shell


class _Boundary(PassThrough):
    """Stands in for a layer next to the stage.

    Attributes:
        hidden: the hidden states that enter or leave, while the forward runs.
        keys: keys and values that layers share, likewise.
    """

    hidden: Any = None
    keys: Any = None


class _Entrance(_Boundary):
    """Stands in for the layer before the stage. It returns what came from there, not what the decoder gives it."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.keys:
            cache = kwargs.get("cache")
            kwargs[SHARED_KEYS].update(self.keys if cache is None else cache.with_earlier(self.keys))
        return self.as_returned(self.hidden)


class _Exit(_Boundary):
    """Stands in for the layer after the stage. It records what is to go there."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.hidden, self.keys = hidden_of(args, kwargs), kwargs.get(SHARED_KEYS)
        return self.as_returned(self.hidden)


class Stage:
    """Some layers of a decoder.

    Attributes:
        shell: the decoder as this stage sees it.
    """

    def __init__(self, decoder: Any, layers: range, returned: int = 0) -> None:
        """
        Args:
            decoder: the decoder, in which the layers of other stages may have been dropped.
            layers: consecutive layers that the decoder has. The decoder's last layer brings what comes after it.
            returned: see `Names`.
        """
        whole: list[nn.Module] = list(decoder.layers)
        own = dict(enumerate(whole)) | crossing(decoder, layers)
        replaced = [own[k] if k in layers else PassThrough(layer, returned) for k, layer in enumerate(whole)]
        self._entrance = _Entrance(whole[layers.start - 1], returned) if layers.start > 0 else None
        self._exit = _Exit(whole[layers.stop], returned) if layers.stop < len(whole) else None
        if self._entrance is not None:
            replaced[layers.start - 1] = self._entrance
        if self._exit is not None:
            replaced[layers.stop] = self._exit
        self.shell = shell_of(decoder, layers=nn.ModuleList(replaced), **stateless_ropes(decoder))
        self._layer_inputs: Tensor | None = None
        if hasattr(decoder, "project_per_layer_inputs"):
            give_layer_inputs(self.shell, lambda *_: self._layer_inputs)

    def __call__(self, before: Between, **arguments: Any) -> Between:
        """
        Args:
            before: what goes into the first of these layers.
            arguments: further arguments of the decoder's forward. Without `cache`, it keeps no keys and values.

        Returns: what comes out of the last of these layers; if it is the decoder's last layer, after the final norm.
        """
        h_BSD = before.hidden if before.hidden.ndim == 3 else before.hidden[0]  # the shapes of all else go by it
        self._layer_inputs = before.layer_inputs
        try:
            if self._entrance is not None:
                self._entrance.hidden, self._entrance.keys = before.hidden, before.keys
            out = self.shell(inputs_embeds=h_BSD, use_cache="cache" in arguments, **arguments)
            if self._exit is None:
                return Between(out[0])
            return Between(self._exit.hidden, dict(self._exit.keys or {}), self._layer_inputs)
        finally:
            self._layer_inputs = None
            for boundary in (self._entrance, self._exit):
                if boundary is not None:
                    boundary.hidden = boundary.keys = None
