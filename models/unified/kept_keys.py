"""Keys and values that are kept.

While pictures are drawn, those of all other tokens stay the same, as these do not see the pictures. After the first
step, only the tokens of the pictures run. While text is written, no later token sees a picture that was drawn.

Shape suffixes: B samples, S tokens, H heads, E width of a head, N tokens of pictures.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from bigmac_lightning.contracts.batch import MediaItem, Microbatch

from ..llm.stage_cache import StageCache
from ..llm.text_inputs import SAMPLES
from .masks import PICTURES
from .two_weights import DRAWN, OTHERS

NUMBER = "drawn_microbatch"
"""The input with the number of the microbatch of which keys and values are kept."""
SEEN, PLACES = "seen_by_drawings", "places_of_drawings"
"""The inputs of a microbatch of drawings alone: which of the whole one's B * S tokens each token sees, (N, B * S); and
the flat index that it has there."""
MASKED = ("sdpa", "eager")
"""The attention implementations that take masks as tensors."""


class KeptKeys(DynamicCache):
    """The keys and values of a microbatch, by layer."""

    def __init__(self) -> None:
        super().__init__()
        self.places: Tensor | None = None
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *further: Any, **more: Any) -> Any:
        """At first it keeps those of all tokens, BHSE, and then it gets those of pictures, 1HNE.

        Returns: those that are given at first; then all of the microbatch in one row.
        """
        given = (key_states, value_states)
        if self.places is None:
            keys, values = (one.transpose(0, 1).flatten(1, 2)[None] for one in given)
            self._kept[layer_idx] = keys, values
            return given
        places, kept = self.places, self._kept[layer_idx]
        return tuple(old.index_copy(2, places, new) for old, new in zip(kept, given, strict=True))

    def count(self, h_BSD: Tensor) -> None:
        """The library's cache would count tokens."""


class TextKeys(StageCache):
    """The keys and values of a stage while text is written, without those of tokens of drawn pictures.

    Attributes:
        others: the places of all other tokens among those that run.
    """

    others: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *further: Any, **more: Any) -> Any:
        """Keeps those of other tokens.

        Returns: those of all tokens, of a prompt; then those that are kept, and the new ones.
        """
        assert self.others is not None, "it is set before layers run"
        if len(self.others) == key_states.shape[2]:
            return super().update(key_states, value_states, layer_idx, *further, **more)
        assert not self.get_seq_length(layer_idx), "pictures are drawn in the prompt"
        keys, values = (states[:, :, self.others] for states in (key_states, value_states))
        super().update(keys, values, layer_idx, *further, **more)
        return key_states, value_states

    def count(self, h_BSD: Tensor) -> None:
        super().count(h_BSD[:, self.others])


def numbered(microbatch: Microbatch, number: int) -> Microbatch:
    """A microbatch whose keys and values are kept."""
    return replace(microbatch, inputs={**microbatch.inputs, NUMBER: torch.tensor(number)})


def drawings_alone(microbatch: Microbatch, media: list[MediaItem], alone: bool) -> Microbatch:
    """The tokens of a microbatch's pictures, in one row, without targets.

    Args:
        microbatch: it has its number, and has run once.
        media: the pictures, in the order of their targets.
        alone: whether each of them sees itself only.
    """
    inputs, places = microbatch.inputs, microbatch.target_positions
    one_row = {name: inputs[name].flatten()[places][None] for name in ("input_ids", "position_ids")}
    own = torch.arange(len(places), device=places.device)
    found = {SEEN: _seen(inputs, places, alone), PLACES: places, NUMBER: inputs[NUMBER]}
    return Microbatch(
        inputs={**one_row, **found, DRAWN: own, OTHERS: own[:0]},
        media=media,
        media_positions=own,
        target_positions=own,
    )


def _seen(inputs: dict[str, Tensor], places: Tensor, alone: bool) -> Tensor:
    pictures_BS, sample_BS, mask_BS = inputs[PICTURES], inputs.get(SAMPLES), inputs.get("attention_mask")
    B, S = pictures_BS.shape
    start_B1 = S * torch.arange(B, device=places.device)[:, None]  # no two rows have a picture or a sample in common
    picture = torch.where(pictures_BS < 0, -1, start_B1 + pictures_BS).flatten()
    seen = picture[places, None] == picture
    if alone:
        return seen
    if sample_BS is None or not sample_BS.shape[1]:
        sample_BS = torch.zeros_like(pictures_BS)
    sample = (start_B1 + sample_BS).flatten()
    before = torch.arange(B * S, device=places.device) < places[:, None]
    text = (picture < 0) if mask_BS is None else (picture < 0) & (mask_BS.flatten() > 0)
    return seen | (text & before & (sample[places, None] == sample))
