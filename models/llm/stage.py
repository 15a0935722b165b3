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

from ..meta_model import PassThrough
from .rope import stateless_ropes


def shell_of(module: nn.Module, **replaced: nn.Module) -> Any:
    """A shallow copy that shares all submodules except the replaced ones."""
    shell = copy.copy(module)
    shell._modules = {**module._modules, **replaced}
    return shell


def hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The hidden states among the arguments of a layer."""
    return args[0] if args else kwargs["hidden_states"]


class _Boundary(PassThrough):
    """Stands in for a layer next to the stage.

    Attributes:
        hidden: the hidden states that enter or leave, while the forward runs.
    """

    hidden: Any = None


class _Entrance(_Boundary):
    """Stands in for the layer before the stage. It returns what came from there, not what the decoder gives it."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.hidden


class _Exit(_Boundary):
    """Stands in for the layer after the stage. It records what is to go there."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.hidden = hidden_of(args, kwargs)
        return self.hidden


class Stage:
    """Some layers of a decoder.

    Attributes:
        shell: the decoder as this stage sees it.
    """

    def __init__(self, decoder: Any, layers: range) -> None:
        """
        Args:
            decoder: the decoder, in which the layers of other stages may have been dropped.
            layers: consecutive layers that the decoder has. The decoder's last layer brings what comes after it.
        """
        whole: list[nn.Module] = list(decoder.layers)
        replaced = [layer if k in layers else PassThrough(layer) for k, layer in enumerate(whole)]
        self._entrance = _Entrance(whole[layers.start - 1]) if layers.start > 0 else None
        self._exit = _Exit(whole[layers.stop]) if layers.stop < len(whole) else None
        if self._entrance is not None:
            replaced[layers.start - 1] = self._entrance
        if self._exit is not None:
            replaced[layers.stop] = self._exit
        self.shell = shell_of(decoder, layers=nn.ModuleList(replaced), **stateless_ropes(decoder))

    def __call__(self, h_BSD: Tensor, **arguments: Any) -> Tensor:
        """
        Args:
            h_BSD: the input of the first of these layers; for the decoder's first layer, embeddings.
            arguments: further arguments of the decoder's forward. Without `cache`, it keeps no keys and values.

        Returns: h_BSD after the last of these layers, and after the final norm if it is the decoder's last layer.
        """
        try:
            if self._entrance is not None:
                self._entrance.hidden = h_BSD
            out = self.shell(inputs_embeds=h_BSD, use_cache="cache" in arguments, **arguments)
            return out[0] if self._exit is None else self._exit.hidden
        finally:
            for boundary in (self._entrance, self._exit):
                if boundary is not None:
                    boundary.hidden = None
