"""A text that a model writes token by token: what the model runs next. Every rank of a pipeline has the same.

Shape suffixes: S tokens.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bigmac_lightning.contracts.batch import PROMPT_TOKENS, Batch, MediaItem, Microbatch
from bigmac_lightning.contracts.components import LanguageModel


class GrowingText:
    """A prompt and the tokens after it.

    Attributes:
        begun: whether the prompt has been run.
        caches: what keeps keys and values (`LanguageModel.new_cache`), by the layers of this process's stages; empty:
            nothing does, and all tokens run again for each new one.
        features: feature rows of the prompt's media where the first stage is; ``None`` if it has none.
    """

    def __init__(self, prompt: Batch) -> None:
        """
        Args:
            prompt: a batch with one microbatch of one sample, on the CPU.
        """
        [self._whole] = prompt.microbatches
        self._next = self._whole
        self._prompt = self._whole.shape[1]
        self._positions = self._whole.inputs["input_ids"]
        self.begun, self.caches, self.features = False, dict[range, Any](), None

    @property
    def media(self) -> list[MediaItem]:
        """The prompt's items."""
        return self._whole.media

    def media_on(self, device: torch.device) -> list[MediaItem]:
        """The prompt's items with their data on a device, before the text has begun."""
        return Batch([self._whole]).to(device).microbatches[0].media

    def begin(self, caches: Mapping[range, Any], features: Tensor | None) -> None:
        """Let the prompt run next; see the attributes. The data of items are dropped."""
        self.begun, self.caches, self.features = True, dict(caches), features
        self._next = self._whole = replace(self._whole, media=[replace(item, data=None) for item in self.media])

    def upcoming(self, llm: LanguageModel) -> Microbatch:
        """What runs next, prepared: all tokens, or the last one if caches have those before it."""
        prompt = {PROMPT_TOKENS: torch.tensor([self._prompt])} if llm.sees_prompts else {}
        ready = replace(self._next, inputs=llm.prepare(self._next.inputs | prompt))
        self._positions = ready.inputs.get("position_ids", ready.inputs["input_ids"])
        return ready

    def append(self, token: int) -> None:
        """Add a token, after what came before it was run."""
        inputs, ids_1S = self._whole.inputs, torch.tensor([[token]])
        if self.caches:
            self._next = Microbatch({"input_ids": ids_1S, "position_ids": next_positions(self._positions)})
            return
        per_token = {  # the grid of one image, (1, 3), has the shape of three tokens
            name: value
            for name, value in inputs.items()
            if value.shape == inputs["input_ids"].shape and not name.endswith("_grid_thw")
        }
        longer = {name: torch.cat([value, value[:, -1:]], dim=1) for name, value in per_token.items()}
        longer["input_ids"] = torch.cat([inputs["input_ids"], ids_1S], dim=1)
        longer["position_ids"] = torch.arange(longer["input_ids"].shape[1])[None]
        self._next = self._whole = replace(self._whole, inputs=inputs | longer)


def next_positions(positions: Tensor) -> Tensor:
    """The positions of one token after others: (1, 1) of (1, S), or (4, 1, 1) of (4, 1, S). Of the latter, the first
    row counts tokens, and in the others a text goes on after the largest position of all (Qwen2-VL, arXiv
    2409.12191)."""
    last = positions[..., -1:] + 1
    if positions.ndim == 3:
        last = torch.cat([last[:1], (positions[1:].max() + 1).expand(len(positions) - 1, 1, 1)])
    return last
