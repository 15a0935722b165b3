"""Consecutive layers of a decoder, run by the library's own forward, from hidden states to hidden states.

A stage is a *shell*: a shallow copy of the decoder that shares its submodules and passes through the layers of other
stages. Whatever the decoder does before its first layer (a multiplier, a norm) reaches the first stage alone, and what
it does after its last layer the last stage alone: between other layers hidden states are handed in and taken out at the
layers' own places. Knows decoders with `layers`; knows nothing of ranks or of what a decoder is made of besides.

Shape suffixes: B samples, S tokens, D width.
"""

import copy
from typing import Any

from torch import Tensor, nn

from ..surgery import PassThrough
from .rope import stateless_ropes


def shell_of(module: nn.Module, **replaced: nn.Module) -> Any:
    """A shallow copy that shares all submodules but those replaced."""
    shell = copy.copy(module)
    shell._modules = {**module._modules, **replaced}
    return shell


def hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The hidden states among the arguments of a layer."""
    return args[0] if args else kwargs["hidden_states"]


class _Door(PassThrough):
    """
    Attributes:
        hidden: states that go through, while the forward runs.
    """

    hidden: Any = None


class _Entrance(_Door):
    """Stands for the layer before a stage: hands in what came from there, whatever the decoder itself has made."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.hidden


class _Exit(_Door):
    """Stands for the layer after a stage: takes out what goes there."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.hidden = hidden_of(args, kwargs)
        return self.hidden


class Stage:
    """Some layers of a decoder."""

    def __init__(self, decoder: Any, layers: range) -> None:
        """
        Args:
            decoder: with `layers`, whichever of them are here.
            layers: consecutive ones, which are here; with the last one goes what the decoder does after it.
        """
        whole: list[nn.Module] = list(decoder.layers)
        kept = [layer if k in layers else PassThrough(layer) for k, layer in enumerate(whole)]
        self._entrance = _Entrance(whole[layers.start - 1]) if layers.start > 0 else None
        self._exit = _Exit(whole[layers.stop]) if layers.stop < len(whole) else None
        if self._entrance is not None:
            kept[layers.start - 1] = self._entrance
        if self._exit is not None:
            kept[layers.stop] = self._exit
        self.shell = shell_of(decoder, layers=nn.ModuleList(kept), **stateless_ropes(decoder))

    def __call__(self, h_BSD: Tensor, **arguments: Any) -> Tensor:
        """
        Args:
            h_BSD: what goes into the first of these layers; for the decoder's first layer, embeddings.
            arguments: of the decoder's forward.

        Returns: h_BSD after the last of them, after the final norm if it is the decoder's last.
        """
        try:
            if self._entrance is not None:
                self._entrance.hidden = h_BSD
            out = self.shell(inputs_embeds=h_BSD, use_cache=False, **arguments)
            return out[0] if self._exit is None else self._exit.hidden
        finally:
            for door in (self._entrance, self._exit):
                if door is not None:
                    door.hidden = None
